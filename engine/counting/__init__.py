"""What work costs: FLOPs, bytes and memory by formula, by reading the program, and by XLA; a machine's ceilings measured."""
