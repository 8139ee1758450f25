"""The operations as custom ops: schema, fake, autograd formula, choice of implementation."""
