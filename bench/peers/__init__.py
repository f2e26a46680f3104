"""Measurements beside other libraries: PyTorch, transformers, llama.cpp."""
