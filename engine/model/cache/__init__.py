"""The KV cache: contiguous, or in segments for many slots."""
