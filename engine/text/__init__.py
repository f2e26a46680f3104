"""From bytes to batches: tokenizer, corpus, conversations, templates, packing; the order of training data."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None] | None  # called with (done, total)
