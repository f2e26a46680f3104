"""Code in C that XLA calls on a CPU: int8 products. XLA computes to the same bits where it cannot be built."""
