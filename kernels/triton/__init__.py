"""Triton forms of the ops one folder up, imported only when the tensors are on a GPU (or under the interpreter)."""
