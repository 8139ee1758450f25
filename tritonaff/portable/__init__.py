"""The operations in plain torch: any device, no Triton, float64 too."""
