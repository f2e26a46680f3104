"""The one function both paths share: (params, tokens) -> logits."""
