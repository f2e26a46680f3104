"""The kinds of weights (Array, Int8, Blocks, LoRA), each a class that multiplies by itself, and products of several."""
