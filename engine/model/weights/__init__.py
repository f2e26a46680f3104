"""The kinds of weights (Array, Int8, LoRA), and the product with any of them."""
