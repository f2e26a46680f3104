"""Bytes to batches: tokenizer, corpus, token file, and an order that is a function of (seed, step)."""
