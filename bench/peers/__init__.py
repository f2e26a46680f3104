"""Comparisons with other libraries: PyTorch, transformers, llama.cpp."""
