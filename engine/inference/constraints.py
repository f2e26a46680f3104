"""Constraints: the tokens with which a grammar lets a completion go on, as bit masks. llguidance follows the grammar.

    constraint = GrammarCompiler(tokenizer, cfg.vocab, end_ids).compile(json_grammar(schema))
    engine.submit(Request(prompt, sampling, constraint=constraint))

A grammar is in llguidance's dialect of Lark. Imports no jax.
"""

import itertools
import json
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from engine.errors import UserError
from engine.text.tokenizer import Tokenizer

# of a grammar: the time to compile a schema grows with the square of its properties, to about 1 s
MAX_BYTES = 65_536
MAX_FORCED_BYTES = 16_384  # with which every text would begin
MAX_DEPTH = 100  # of a schema
# of `multipleOf`, without its point: the time to compile it grows with the square
MAX_MULTIPLE = 10_000
# Bounds on what a token may cost, and on the memory of a completion: a grammar that exceeds them
# ends it.
LIMITS = {"step_max_items": 20_000, "max_lexer_states": 50_000, "verbose_errors": False}
# The formats of strings that are enforced. JSON Schema lets any other be a note for people, as
# OpenAPI's `password` is.
FORMATS = frozenset(
    ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
)
# JSON as Python's `json.dumps` writes it. With free white space next to nothing would be forced,
# and a model may write line ends for ever.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# The characters that both ECMAScript and Rust's regex crate count as white space, or in a negated class
# those that either does, by the bracket that opened the class of characters, if any.
SPACE_IN_CLASS = {"": r"[ \t\n\r\f\v]", "[": r" \t\n\r\f\v", "[^": r"\s\x{FEFF}"}
# Those that both count as no white space, or in a negated class those that either does.
OTHERS_IN_CLASS = {"": r"[^\s\x{FEFF}]", "[": r"[^\s\x{FEFF}]", "[^": r"\S\x{85}"}


class Constraint:
    """Follows one completion through a grammar, which has `failed` when it became too complex on the way."""

    can_run_ahead = True  # whether a sampled token may be allowed without its mask

    def __init__(self, matcher: Any, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids

    def begin(self) -> "Constraint":
        return Constraint(self._matcher.deep_copy(), self._end_ids)

    @property
    def failed(self) -> bool:
        return self._matcher.is_error()

    def fill(self, masks: Any, rows: Sequence[int], drafts: Sequence[int]) -> None:
        """Writes the allowed tokens into masks (R, ceil(V/32)) uint32: rows[0]'s, and rows[n]'s
        after n allowed drafts.
        """
        for row, draft in zip(rows, [*drafts, None]):
            self._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
            if self.failed:  # any token: it does not count
                masks[row] = ~np.uint32(0)
            elif draft is not None:
                self._matcher.consume_token(draft)
        if drafts and not self.failed:
            self._matcher.rollback(len(drafts))

    def allowed_drafts(self, drafts: Sequence[int], count: int) -> list[int]:
        """Returns up to `count` tokens that the grammar forces, else those of the drafts that it allows."""
        forced = self._matcher.compute_ff_tokens()[:count]
        if forced or not drafts:
            return forced
        before_end = [*itertools.takewhile(lambda token: token not in self._end_ids, drafts)]
        return before_end[: self._matcher.validate_tokens(before_end)]

    def allows(self, token: int) -> bool:
        """Whether a token, which is no end, may come next."""
        return token not in self._end_ids and self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> Literal["stop", "grammar"] | None:
        """Goes on by a sampled token. Returns stop when only the end can follow, grammar when the
        grammar has failed.
        """
        if not self._matcher.consume_token(token):
            return "grammar"
        if self._matcher.is_stopped():
            return "stop"
        return None


class ForcedTokens(Constraint):
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

    def compile(self, grammar: str) -> Constraint:
        """Compiles a grammar, in about a second at most, without Python's lock. Raises UserError,
        which says what is wrong.
        """
        check_size(grammar)
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        # A beginning that has no end shows in the first mask, or in what is forced.
        trial = Constraint(matcher.deep_copy(), self._end_ids)
        trial.fill(np.zeros((1, -(-self._tokenizer.vocab_size // 32)), np.uint32), [0], [])
        if trial.failed:
            raise UserError(_explain(trial._matcher.get_error()))
        if len(trial._matcher.compute_ff_bytes()) > MAX_FORCED_BYTES:
            raise UserError("no text satisfies it, for it has no end")
        return Constraint(matcher, self._end_ids)


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


def json_grammar(schema: dict[str, Any]) -> str:
    return f"start: {json_rule(schema)}"


def json_rule(schema: dict[str, Any], lenient: bool = False) -> str:
    """Returns the schema as a part of a rule.

    A keyword that cannot be enforced is ignored if `lenient`, and else refused, here or by the
    compiler. Raises UserError for that, and for a schema that is nested too deeply or has too many
    bytes.
    """
    options = JSON_OPTIONS | {"lenient": lenient}
    text = json.dumps({**_check_schema(schema, 0, lenient), "x-guidance": options}, ensure_ascii=False)
    check_size(text)
    return f"%json {text}"


def check_size(text: str) -> None:
    if len(text.encode()) > MAX_BYTES:
        raise UserError(f"it has more than {MAX_BYTES:,} bytes")


def choice_grammar(choices: Sequence[str]) -> str:
    # a terminal may have thousands, and a rule not
    return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, choices))}"


def regex_grammar(pattern: str) -> str:
    """Returns a grammar of the texts that a pattern matches from beginning to end, in the syntax of
    Rust's regex crate.
    """
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(pattern)}/"


def tag_grammar(structures: Sequence[tuple[str, dict[str, Any], str]], triggers: Sequence[str]) -> str:
    """Returns a grammar of texts with structures in them: a beginning, JSON that satisfies a
    schema, and an end.

    Text that has come to one of the `triggers`, with which a structure begins, goes on with a
    structure to its end. Raises UserError for a structure without a trigger, for a trigger without
    a structure, and as `json_rule`.
    """
    rules: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    for begin, schema, end in structures:
        matching = [trigger for trigger in rules if begin.startswith(trigger)]
        if not matching:
            raise UserError(f"no trigger begins the structure {begin[:80]!r}")
        trigger = min(matching, key=len)  # the text comes to it first
        rest = begin.removeprefix(trigger)
        parts = [json_rule(schema)]
        if rest:
            parts.insert(0, json.dumps(rest))
        if end:
            parts.append(json.dumps(end))
        rules[trigger].append(" ".join(parts))
    lines = []
    for number, (trigger, bodies) in enumerate(rules.items()):
        if not bodies:
            raise UserError(f"no structure begins with the trigger {trigger[:80]!r}")
        lines.append(f"tag_{number}: trigger_{number} ({' | '.join(bodies)})")
        lines.append(f"trigger_{number}[lazy]: TEXT {json.dumps(trigger)}")
    names = " | ".join(f"tag_{number}" for number in range(len(rules)))
    return "\n".join([f"start: ({names})* text", "text: TEXT", "TEXT: /(?s:.*)/", *lines])


def lark_grammar(text: str) -> str:
    """Returns a grammar in Lark as it is, and one in llama.cpp's GBNF as Lark. Raises UserError."""
    from llguidance.gbnf_to_lark import any_to_lark

    if "%json" in text:  # llguidance's own; it would pass by the bounds on what a schema costs
        raise UserError("a schema cannot be a part of it (%json): send the schema alone")
    try:
        return any_to_lark(text)
    except Exception as error:
        raise UserError(f"it is neither Lark nor GBNF: {error}") from None


def _check_schema(schema: Any, depth: int, lenient: bool) -> Any:
    """Returns a schema, or a part of one, at this depth, without what need not be enforced. Raises as
    `json_rule`.
    """
    if depth > MAX_DEPTH:
        raise UserError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(schema, list):
        return [_check_schema(value, depth + 1, lenient) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if not _can_enforce_multiple(schema):
        if not lenient:
            multiple = schema["multipleOf"]
            raise UserError(f"multipleOf {multiple} cannot be enforced, for it is 0 or has too many digits")
        schema = {name: value for name, value in schema.items() if name != "multipleOf"}
    if not lenient and not _can_enforce_least(schema):
        least = schema["minProperties"]
        raise UserError(
            f"minProperties {least} cannot be enforced, for a name that is not required may come twice"
        )
    fields: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if name == "pattern" and isinstance(value, str):
            fields[name] = _rust_pattern(value)
        elif name == "patternProperties" and isinstance(value, dict):
            by_pattern = {}
            for pattern, inner in value.items():
                by_pattern[_rust_pattern(pattern)] = _check_schema(inner, depth + 2, lenient)
            fields[name] = by_pattern
        else:
            inner = _check_schema(value, depth + 1, lenient)
            if name in ("const", "enum"):  # values, not schemas: they stay as they are
                inner = value
            fields[name] = inner
    return fields


def _can_enforce_multiple(schema: dict[str, Any]) -> bool:
    multiple = schema.get("multipleOf")
    if not isinstance(multiple, int | float):
        return True
    return 0 < _digits(multiple) <= MAX_MULTIPLE


def _can_enforce_least(schema: dict[str, Any]) -> bool:
    """Whether `minProperties` asks for no more than the names that are required, or for one."""
    least = schema.get("minProperties")
    if not isinstance(least, int):
        return True
    required = schema.get("required")
    names: set[str] = set()
    if isinstance(required, list):
        names = {str(name) for name in required}
    return least <= max(1, len(names))


def _rust_pattern(pattern: str) -> str:
    """Returns an ECMAScript pattern, as JSON Schema has them, for Rust's regex crate: texts that
    match it match both.

    White space and line ends are other characters in each: U+0085 is none in ECMAScript, U+FEFF and
    U+2028 are none in Rust.
    """
    parts = []
    inside = ""  # the bracket that opened a class of characters
    for part in re.findall(r"\\.|\[\^?|.", pattern, re.S):
        if part == r"\s":
            parts.append(SPACE_IN_CLASS[inside])
        elif part == r"\S":
            parts.append(OTHERS_IN_CLASS[inside])
        elif part == "." and not inside:
            parts.append(r"[^\n\r\x{2028}\x{2029}]")
        else:
            parts.append(part)
        if part == "]":
            inside = ""
        elif not inside and part in ("[", "[^"):
            inside = part
    return "".join(parts)


def _digits(number: float) -> int:
    """Returns a number without its point: 25 for 0.25."""
    return int(f"{number:.15f}".rstrip("0").replace(".", "") or 0)


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
