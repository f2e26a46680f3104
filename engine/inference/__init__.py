"""Inference, forward only: no gradient, no optimizer, no weight changed, no request remembered. May not import training."""
