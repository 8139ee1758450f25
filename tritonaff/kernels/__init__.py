"""Triton tiles and their launchers: tensors in, tensors out; no autograd, no policy."""
