"""HTTP, scheduling, models and the command line."""
