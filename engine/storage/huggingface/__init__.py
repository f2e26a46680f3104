"""Hugging Face folders, read and written: config, safetensors, tokenizer."""
