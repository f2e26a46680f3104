"""Checks and measures a GPU or TPU in one command."""
