"""Models, adapters, checkpoints and named assets on disk; find.py loads a model by its name or path.

Every reader raises UserError, in a sentence, for a file that is missing, damaged, or holds what is not understood here.
"""

from collections.abc import Callable

Report = Callable[[int, int], None] | None  # called with how much is done, and of how much
