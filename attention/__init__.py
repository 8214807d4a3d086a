"""Which keys each query block attends to: policies, selectors, the index, and `attend`."""
