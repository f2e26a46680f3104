"""The KV cache, an argument and a result of the forward pass: contiguous, or in segments for many slots."""
