"""Training, forward and backward: the only package with an optimizer or a gradient. Inference may not import it."""
