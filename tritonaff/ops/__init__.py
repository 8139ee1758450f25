"""The operations as torch.library custom ops: schema, fake, autograd formula, choice of
implementation.
"""
