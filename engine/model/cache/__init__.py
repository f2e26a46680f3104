"""The KV cache of many slots; `transformer.py` has the one of rows that start together."""
