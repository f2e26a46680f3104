"""Benchmarks: how fast and how much, against what this machine could do. Prints tables, or a line of JSON."""
