"""The engine: one thread that accepts requests, runs steps and publishes tokens."""
