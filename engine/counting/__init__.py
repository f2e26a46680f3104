"""What work costs: FLOPs and memory by formula, this machine's ceilings by measurement."""
