"""What a weight can be (an array, Int8, LoRA), and the one place that multiplies by any of them."""
