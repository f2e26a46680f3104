"""Models, adapters, checkpoints and named assets on disk; find.py loads a model by its name or path."""

from collections.abc import Callable

Report = Callable[[int, int], None] | None  # called with how much is done, and of how much
