"""The operations in plain torch: any device, no Triton, float64 too, nothing logits-sized kept for
the backward pass.
"""
