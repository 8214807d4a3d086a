"""What a policy is profiled with: tasks whose answers depend on far tokens."""
