"""Puts this folder on the path of the tests below it, for `gguf_files`, `hf_folders` and `golden`."""
