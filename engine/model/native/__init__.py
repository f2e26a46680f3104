"""Code in C that XLA calls on a CPU: products with blocks and adapters, and attention. Elsewhere XLA computes."""
