"""Code in C that XLA calls on a CPU: int8 products, and attention of decoding. XLA computes where it cannot be built."""
