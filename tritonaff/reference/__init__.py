"""The papers' equations in eager PyTorch, with autograd for the gradients: the specification."""
