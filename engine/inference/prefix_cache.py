"""Prefixes: chunks of prompts that have been computed, kept for whoever begins the same way, within a bound on memory.

Chunks start at fixed positions and are computed by one program from what is before them, so a chunk that is found again
has the bits it would be given anew: a hit is faster and otherwise cannot be told from a miss. Its name is a hash of
everything up to its end, tokens and namespace, so that chunks of different prompts or namespaces never meet. A chunk is
of no use without those before it, so of one prompt the last leaves first.
"""

import hashlib
from collections import OrderedDict
from typing import Any

import jax
import numpy as np

Key = bytes


def first_key(namespace: str) -> Key:
    """What the name of a prompt's first chunk is made from."""
    return hashlib.sha256(namespace.encode("utf-8", "surrogatepass")).digest()


def next_key(key: Key, tokens: tuple[int, ...]) -> Key:
    """The name of the chunk with these tokens behind the chunk (or start) named `key`."""
    return hashlib.sha256(key + np.asarray(tokens, np.int32).tobytes()).digest()


class Prefixes:
    """Chunks by name, at most `limit` bytes of them: the ones used longest ago leave first. A limit of 0 keeps none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._chunks: OrderedDict[Key, tuple[Any, int, Key | None]] = OrderedDict()  # chunk, its bytes, who is before it

    def __len__(self) -> int:
        return len(self._chunks)

    def find(self, key: Key) -> Any | None:
        """The chunk of that name, or None. It and those before it have been used now."""
        found = self._chunks.get(key)
        used: Key | None = key if found else None
        while used is not None:
            self._chunks.move_to_end(used)
            used = self._chunks[used][2]
        return found[0] if found else None

    def keep(self, key: Key, chunk: Any, before: Key | None) -> None:
        """Keeps a chunk (any tree of arrays), and drops others until all fit. `before` names the one before it, None at the
        start of a prompt; where that one is not kept, neither is this."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(chunk))
        if key in self._chunks or size > self.limit or (before is not None and before not in self._chunks):
            return
        self._chunks[key] = (chunk, size, before)
        self.bytes += size
        self.find(key)
        while self.bytes > self.limit:
            self.bytes -= self._chunks.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Forgets all."""
        self._chunks.clear()
        self.bytes = 0
