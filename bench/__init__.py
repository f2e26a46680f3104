"""Measurement only: how fast, how much, beside what this machine could do. Each command ends in one line of JSON."""
