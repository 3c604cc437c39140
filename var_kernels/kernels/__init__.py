"""Tile kernels: arithmetic on one tile of logits. No autograd, no policy; depends on torch (and triton) alone."""
