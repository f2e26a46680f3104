"""The transformer, (params, tokens) -> logits, which training and inference share."""
