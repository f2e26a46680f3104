"""Evaluation of a model on a text or on conversations."""
