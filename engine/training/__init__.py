"""Training, forward and backward: alone has an optimizer or a gradient. Inference may not import it."""
