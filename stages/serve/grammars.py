"""Compiles the grammars that requests ask for, off the event loop; the last ones are kept, for agents ask again and again."""

import asyncio
import functools
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from engine.errors import UserError
from engine.inference.constraints import Constraint, GrammarCompiler
from engine.text.tokenizer import Tokenizer
from stages.serve.errors import ApiError

CACHED = 32  # grammars


class Grammar(NamedTuple):
    """The grammar for which the field of a request asks; `make` returns it."""

    field: str
    make: Callable[[], str]


class GrammarPool:
    """Compiles grammars in a thread, which sorts the tokens for it when the first comes. Takes what GrammarCompiler does."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_ids: Collection[int]) -> None:
        self._arguments = tokenizer, vocab, end_ids
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def compile(self, grammar: Grammar) -> Constraint:
        """Raises ApiError, which names the field, for a grammar that cannot be followed."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._compile_cached(grammar.make()))
        except UserError as error:
            raise ApiError(400, f"{grammar.field}: {error}.", param=grammar.field) from None

    @functools.cached_property
    def _compile_cached(self) -> Callable[[str], Constraint]:
        return functools.lru_cache(CACHED)(GrammarCompiler(*self._arguments).compile)
