"""Train a model from random weights."""
