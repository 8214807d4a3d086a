"""Gossamer: an OpenAI-compatible server for long-context models whose attention is sparse, head by head."""

__version__ = "0.1.0"
