"""The kinds of weights (Array, Int8, Blocks, LoRA), and the product with any of them."""
