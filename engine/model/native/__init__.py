"""Code in C that XLA calls on a CPU: products with int8 and with blocks, and attention. Elsewhere XLA computes."""
