"""Constraints: the tokens with which a grammar lets a completion go on, as bit masks. llguidance follows the grammar.

    constraint = GrammarCompiler(tokenizer, cfg.vocab, end_ids).compile(json_grammar(schema))
    engine.submit(Request(prompt, sampling, constraint=constraint))

`grammars.py` writes grammars. Imports no jax.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from engine.errors import UserError
from engine.inference.grammars import check_size
from engine.text.tokenizer import Tokenizer

MAX_FORCED_BYTES = 16_384  # with which every text would begin
# Bounds on what a token may cost, and on the memory of a completion: a grammar that exceeds them
# ends it.
LIMITS = {"step_max_items": 20_000, "max_lexer_states": 50_000, "verbose_errors": False}


class Constraint(Protocol):
    """Follows one completion, and says with which tokens it may go on.

    `failed`: it can follow no further. `can_run_ahead`: a sampled token may be allowed without its mask.
    """

    can_run_ahead: bool

    @property
    def failed(self) -> bool: ...

    def begin(self) -> "Constraint":
        """Returns one at the beginning, for another completion."""

    def fill(self, masks: Any, rows: Sequence[int], drafts: Sequence[int]) -> None:
        """Writes the allowed tokens into masks (R, ceil(V/32)) uint32: rows[0]'s, and rows[n]'s
        after n allowed drafts.
        """

    def allowed_drafts(self, drafts: Sequence[int], count: int) -> list[int]:
        """Returns up to `count` tokens that must come next, else those of the drafts that may."""

    def allows(self, token: int) -> bool:
        """Whether a token, which is no end, may come next."""

    def accept(self, token: int) -> Literal["stop", "grammar"] | None:
        """Goes on by a sampled token. Returns stop when only the end can follow, grammar when the
        grammar has failed.
        """


class GrammarConstraint:
    """Follows a completion through a grammar, and has `failed` when that became too complex on the way."""

    can_run_ahead = True

    def __init__(self, matcher: Any, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids

    def begin(self) -> "GrammarConstraint":
        return GrammarConstraint(self._matcher.deep_copy(), self._end_ids)

    @property
    def failed(self) -> bool:
        return self._matcher.is_error()

    def fill(self, masks: Any, rows: Sequence[int], drafts: Sequence[int]) -> None:
        for row, draft in zip(rows, [*drafts, None]):
            self._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
            if self.failed:  # any token: it does not count
                masks[row] = ~np.uint32(0)
            elif draft is not None:
                self._matcher.consume_token(draft)
        if drafts and not self.failed:
            self._matcher.rollback(len(drafts))

    def allowed_drafts(self, drafts: Sequence[int], count: int) -> list[int]:
        forced = self._matcher.compute_ff_tokens()[:count]
        if forced or not drafts:
            return forced
        before_end = [*itertools.takewhile(lambda token: token not in self._end_ids, drafts)]
        return before_end[: self._matcher.validate_tokens(before_end)]

    def allows(self, token: int) -> bool:
        return token not in self._end_ids and self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> Literal["stop", "grammar"] | None:
        if not self._matcher.consume_token(token):
            return "grammar"
        if self._matcher.is_stopped():
            return "stop"
        return None


class ForcedTokens:
    """Lets a completion be nothing but these tokens, whose log-probabilities are asked for."""

    can_run_ahead = False
    failed = False

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self._done = 0

    def begin(self) -> "ForcedTokens":
        return ForcedTokens(self.tokens)

    def fill(self, masks: Any, rows: Sequence[int], drafts: Sequence[int]) -> None:
        for row, token in zip(rows, self.tokens[self._done :]):
            masks[row] = 0
            masks[row, token // 32] = np.uint32(1) << np.uint32(token % 32)

    def allowed_drafts(self, drafts: Sequence[int], count: int) -> list[int]:
        return list(self.tokens[self._done : self._done + count])

    def allows(self, token: int) -> bool:
        return self.allowed_drafts([], 1) == [token]

    def accept(self, token: int) -> None:
        self._done += 1


class GrammarCompiler:
    """Compiles grammars for a tokenizer, and a model of `vocab` ids. Each of `end_ids` may end a
    text where the grammar does.

    Raises UserError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise UserError(
                "Grammars need llguidance: install the extra `serve` (uv sync --extra serve)."
            ) from None
        self._library: Any = llguidance
        self._tokenizer = self._library.LLTokenizer(
            _Vocabulary(tokenizer, vocab, min(end_ids)), vocab, sorted(end_ids)
        )
        self._limits = self._library.LLParserLimits(**LIMITS)
        self._end_ids = frozenset(end_ids)

    def compile(self, grammar: str) -> GrammarConstraint:
        """Compiles a grammar, in about a second at most, without Python's lock. Raises UserError,
        which says what is wrong.
        """
        check_size(grammar)
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        # A beginning that has no end shows in the first mask, or in what is forced.
        trial = GrammarConstraint(matcher.deep_copy(), self._end_ids)
        trial.fill(np.zeros((1, -(-self._tokenizer.vocab_size // 32)), np.uint32), [0], [])
        if trial.failed:
            raise UserError(_explain(trial._matcher.get_error()))
        if len(trial._matcher.compute_ff_bytes()) > MAX_FORCED_BYTES:
            raise UserError("no text satisfies it, for it has no end")
        return GrammarConstraint(matcher, self._end_ids)


class _Vocabulary:
    """The tokens, as llguidance asks for them; no text contains control tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int, end: int) -> None:
        controls = tokenizer.controls
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.special_token_ids = [*controls]
        self.tokens = []
        for token in range(vocab):
            if token in controls:
                self.tokens.append(controls[token].content.encode())
            else:
                self.tokens.append(tokenizer.bytes_of(token))

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, continued=True).tolist()


def _explain(error: str) -> str:
    if "NoExtension" in error:
        return "no text satisfies it"
    error = re.sub(
        r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?|\n *\d+ \| .*|<non-verbose/>",
        "",
        error,
        flags=re.S,
    )
    return re.sub(r"\s+", " ", error).strip()[:300]
