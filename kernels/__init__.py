"""Tensors in, tensors out: each op is a public function, a torch twin and a Triton kernel."""
