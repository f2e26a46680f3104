"""Forward and backward: the only room with an optimizer or a gradient. Inference may not import it."""
