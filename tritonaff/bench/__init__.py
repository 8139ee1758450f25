"""The bench: parity first, then time and memory against eager PyTorch and torch.compile."""
