"""PrefixCache: chunks of prompts' KV cache, for later prompts that begin alike, within a bound on memory.

Chunks start at fixed positions and are computed by one program from those before them, so a hit has
the bits of a miss. A chunk's key is a hash of namespace, adapter and tokens up to its end; the last
chunk of a prompt may be shorter. A chunk is of no use without those before it, so the last of a
prompt is dropped first.
"""

import array
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


def root_key(namespace: str, adapter: str = "") -> bytes:
    """Returns the key of an empty prompt, the parent of first chunks. `adapter`: a digest."""
    key = hashlib.sha256(namespace.encode("utf-8", "surrogatepass"))
    if adapter:
        key.update(hashlib.sha256(adapter.encode()).digest())
    return key.digest()


def chunk_key(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    return hashlib.sha256(parent + array.array("i", tokens).tobytes()).digest()


class _CachedChunk(NamedTuple):
    """A chunk, its size in bytes, its parent's key, and the keys of those of its prefixes that find it."""

    chunk: Any
    size: int
    parent: bytes | None
    prefixes: Sequence[bytes]


class PrefixCache:
    """Holds chunks by key, at most `limit` bytes; drops the least recently used."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._chunks: OrderedDict[bytes, _CachedChunk] = OrderedDict()  # the least recently used first
        self._prefixes: dict[bytes, bytes] = {}  # key of a prefix -> key of the last chunk put that begins so

    def get(self, key: bytes) -> Any | None:
        """Returns the chunk, or one of which this is a prefix, or None. It and those before it
        count as used now.
        """
        if key not in self._chunks:
            if key not in self._prefixes:
                return None
            key = self._prefixes[key]
        used: bytes | None = key
        while used is not None:
            self._chunks.move_to_end(used)
            used = self._chunks[used].parent
        return self._chunks[key].chunk

    def put(self, key: bytes, chunk: Any, parent: bytes | None, prefixes: Sequence[bytes] = ()) -> None:
        """Adds a chunk (any tree of arrays), if its parent (None: a prompt's start) is here; drops
        others to fit.

        It is found by `prefixes` too: the keys of some of its first tokens.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(chunk))
        if key in self._chunks or size > self.limit:
            return
        if parent is not None and parent not in self._chunks:
            return
        self._chunks[key] = _CachedChunk(chunk, size, parent, prefixes)
        self._prefixes |= dict.fromkeys(prefixes, key)
        self.bytes += size
        self.get(key)
        while self.bytes > self.limit:
            oldest_key, oldest = self._chunks.popitem(last=False)
            self.bytes -= oldest.size
            for prefix in oldest.prefixes:
                if self._prefixes.get(prefix) == oldest_key:  # else another chunk's, which may be gone
                    del self._prefixes[prefix]
