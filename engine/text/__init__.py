"""Bytes to batches: tokenizer, corpus and token file; conversations, chat templates and packing; orders by (seed, step)."""
