"""Beside what people would use instead: PyTorch, transformers, llama.cpp."""
