"""Code in C that XLA calls on a CPU: int8 products. Where it cannot be built XLA computes, to the same bits."""
