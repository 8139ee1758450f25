"""Triton kernels and their launchers: tensors and block sizes in, tensors out; no autograd, no
policy. A package for each operation; ``blocks`` and ``shared`` serve all of them.
"""
