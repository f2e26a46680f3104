"""Measuring a model on a text or on conversations."""
