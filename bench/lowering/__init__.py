"""Lowers every program for platforms that need not be here, and says what is in it."""
