"""Shared by all training stages: flags, data, estimate, run folder, loop, resuming."""
