"""Benchmarks: how fast and how much, against what this machine could do. Each prints tables, or with --json a line of JSON."""
