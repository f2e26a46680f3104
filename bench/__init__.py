"""Benchmarks: how fast and how much, against what this machine could do. Each command ends in one line of JSON."""
