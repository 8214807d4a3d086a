"""The OpenAI-compatible HTTP API: requests in, bytes out. Knows the engine only by `submit`."""
