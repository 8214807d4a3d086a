"""`gossamer profile`: from a model's name to a policy file, a report and what they need."""
