"""Train a draft for speculative decoding."""
