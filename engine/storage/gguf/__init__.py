"""GGUF files, read and written: header, config, tokenizer, weights."""
