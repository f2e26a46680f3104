"""From bytes to batches: tokenizer, corpus, token files; conversations, chat templates, packing; the order of training data."""
