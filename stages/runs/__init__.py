"""Shared by every training run: flags, folder, state, estimate, loop, and the scaffold that carries it out."""
