"""Counts FLOPs, bytes and memory: by formula, from the jaxpr, and by XLA. Measures a machine's ceilings."""
