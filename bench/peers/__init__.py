"""Comparisons with other libraries: PyTorch and llama.cpp."""
