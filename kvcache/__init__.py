"""Which pages exist and who owns them."""
