"""Constraints: a completion keeps to its grammar, whoever decodes beside it; a grammar that cannot be followed is refused."""

import json
import math
import time
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from engine.errors import UserError
from engine.inference.constraints import GrammarCompiler, GrammarConstraint
from engine.inference.grammars import (
    _rust_pattern,
    choice_grammar,
    json_grammar,
    json_rule,
    lark_grammar,
    regex_grammar,
)
from engine.inference.scheduler import Sequence
from tests.inference.engine_requests import (
    GRAMMARS,
    LETTERS,
    SCHEMA,
    SLOTS,
    complete,
    complete_alone,
    constraint_of,
    make_engine,
    text,
)
from tests.tiny import request_of

ENDS = tuple(LETTERS.controls)


def constrained(grammar=GRAMMARS[0], max_tokens=50, seed=0, **fields):
    fields = {"stop_token_ids": ENDS} | fields
    return request_of(text(seed, 9), max_tokens, seed=seed, constraint=constraint_of(grammar), **fields)


@pytest.mark.law("constrained decoding")
def test_an_answer_is_valid_or_was_cut_off():
    """Beside one another; `test_engine_company` holds that each is what it is alone, and plain
    neighbours too.
    """
    requests = [
        constrained(max_tokens=size, seed=seed, temperature=0.8)
        for size in (50, 49, 12)
        for seed in range(SLOTS)
    ]
    completions = complete(make_engine("float32"), requests)
    assert {each.finish_reason for each in completions} == {"stop", "length"}
    for completion in completions:
        answer = LETTERS.decode(completion.tokens)
        if completion.finish_reason == "stop":
            jsonschema_rs.validate(SCHEMA, json.loads(answer))
        else:
            assert (
                json.loads('{"name": "a", "age": 1, "more": ["red"]}').keys() == SCHEMA["properties"].keys()
            )
            assert '{"name": "'.startswith(answer[:10])


def test_what_a_grammar_forces_is_decoded_in_fewer_steps():
    """`test_engine_company` holds that the tokens are the same."""
    forced = constrained(choice_grammar(["abcdefghi" * 3]), temperature=1.0)
    steps = {}
    for speculate in (False, True):
        engine = make_engine("float32", speculate=speculate)
        (completion,) = complete(engine, [forced])
        assert (LETTERS.decode(completion.tokens), completion.finish_reason) == ("abcdefghi" * 3, "stop")
        steps[speculate] = engine.steps_decoded
    assert steps[False] == 27
    assert steps[True] < 10


def test_tokens_that_a_grammar_would_not_forbid_are_decoded_in_fewer_calls(monkeypatch):
    """Greedy ones, to the bit as with a mask for each; now and then one that ran ahead is
    forbidden.
    """
    grammars = [regex_grammar(f"[^{letters}]*") for letters in ("a-e", "f-k", "l-z")]
    requests = [
        constrained(grammar, seed=seed, temperature=0.0, logprobs=2)
        for seed, grammar in enumerate((*grammars, "start: /.*/"))
    ]
    completions, calls, allowed = [], [0, 0], list[bool]()
    allows = GrammarConstraint.allows
    monkeypatch.setattr(
        GrammarConstraint, "allows", lambda *each: allowed.append(allows(*each)) or allowed[-1]
    )
    for at, runs_ahead in enumerate((vars(Sequence)["runs_ahead"], False)):
        monkeypatch.setattr(Sequence, "runs_ahead", runs_ahead)
        engine = make_engine("float32", speculate=False)
        decode = engine.runner.decode

        def count(*arguments, at=at, decode=decode, **more):
            calls[at] += 1
            return decode(*arguments, **more)

        monkeypatch.setattr(engine.runner, "decode", count)
        completions.append(complete(engine, requests))
    assert completions[0] == completions[1]
    if engine.config.backend.in_c:  # else a forbidden token might leave a NaN that the next reads
        assert calls[0] < calls[1]
        assert {*allowed} == {False, True}


def test_any_token_that_ends_a_text_ends_it_where_the_grammar_lets_it():
    for end in ENDS:
        bias = {token: (100.0 if token == end else -100.0) for token in ENDS}
        completion = complete_alone(
            "float32", constrained(regex_grammar("ab*"), logit_bias=bias, temperature=0.0)
        )
        assert (LETTERS.decode(completion.tokens), completion.finish_reason) == ("a", "stop")


def test_log_probabilities_are_the_models_own_whatever_the_grammar_allows():
    (free,) = complete(make_engine("float32"), [request_of(text(0, 9), 1, temperature=0.0, logprobs=20)])
    (held,) = complete(make_engine("float32"), [constrained(max_tokens=1, temperature=0.0, logprobs=20)])
    assert held.logprobs[0][2] == free.logprobs[0][2]
    assert LETTERS.decode(held.tokens) == "{" != LETTERS.decode(free.tokens)


def test_a_grammar_that_becomes_too_complex_ends_its_completion_alone():
    endless = {
        "$defs": {"c": {"type": "object", "properties": {"c": {"$ref": "#/$defs/c"}}, "required": ["c"]}}
    }
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"$ref": "#/$defs/c"}},
        "required": ["a", "b"],
    }
    lazily = json_grammar(endless | {"anyOf": [schema, {"const": 1}]})
    beside = request_of(text(1, 9), 30, temperature=0.0)
    completions = complete(make_engine("float32"), [constrained(lazily, logit_bias={0: 100.0}), beside])
    assert completions[0].finish_reason == "grammar"
    assert completions[1] == complete_alone("float32", beside)


def nested(depth):
    return {"type": "array", "items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (
            lambda: json_grammar({"type": "integer", "minimum": 5, "maximum": 3}),
            r"minimum \(5\) is greater than maximum \(3\)",
        ),
        (lambda: json_grammar({"$ref": "#"}), "no text satisfies it"),
        (
            lambda: json_grammar({"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}),
            "it has no end",
        ),
        (lambda: json_grammar(nested(500)), "nested more than 100 deep"),
        (lambda: json_grammar({"not": {"type": "string"}}), "not"),
        (lambda: json_grammar({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (lambda: json_grammar({"$ref": "http://elsewhere/x.json"}), "elsewhere"),
        (lambda: json_grammar({"multipleOf": 999983}), "multipleOf 999983 cannot be enforced"),
        (lambda: json_grammar({"multipleOf": 10**400}), "multipleOf 10+ cannot be enforced"),
        (lambda: json_grammar({"multipleOf": math.inf}), "multipleOf inf cannot be enforced"),
        (lambda: f"start: {json_rule({'multipleOf': 999983}, lenient=True)}", None),
        (
            lambda: json_grammar({"minProperties": 2, "patternProperties": {"^x$": {}}}),
            "minProperties 2 cannot be enforced",
        ),
        (lambda: json_grammar({"minProperties": 2, "required": 3}), "minProperties 2 cannot be enforced"),
        (lambda: json_grammar({"minProperties": 2, "required": ["a", "b"]}), None),
        (lambda: json_grammar({"enum": ["x" * 66_000]}), "more than 65,536 bytes"),
        (lambda: json_grammar({"properties": {f"p{n}": {"enum": [1, 2]} for n in range(800)}}), None),
        (lambda: regex_grammar("(a"), "unclosed group"),
        (lambda: regex_grammar("(?=a)b"), "look-around"),
        (lambda: regex_grammar("(((a{1,100}){1,100}){1,100}){1,100}"), None),
        (lambda: regex_grammar("[ab]*a[ab]{25}c"), None),
        (lambda: lark_grammar("neither"), "neither Lark nor GBNF"),
        (lambda: lark_grammar("start: missing"), "missing"),
        (
            lambda: lark_grammar('start: %json {"type": "integer", "multipleOf": 999983}'),
            "send the schema alone",
        ),
        (lambda: lark_grammar("start: start start"), "no text satisfies it"),
    ],
)
def test_a_grammar_is_compiled_in_bounded_time_or_refused(grammar, reason):
    begun = time.thread_time()
    if reason:
        with pytest.raises(UserError, match=reason) as refused:
            GrammarCompiler(LETTERS, 41, ENDS).compile(grammar())
        assert "\n" not in str(refused.value)
        assert "x-guidance" not in str(refused.value)
    else:
        GrammarCompiler(LETTERS, 41, ENDS).compile(grammar())
    assert time.thread_time() - begun < 5


LEAF: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "enforced"),
    [
        (LEAF, LEAF | CLOSED),
        (LEAF | {"type": ["object", "null"]}, LEAF | {"type": ["object", "null"]} | CLOSED),
        ({"type": "array", "items": LEAF}, {"type": "array", "items": LEAF | CLOSED}),
        (
            {"$defs": {"x": LEAF}, "anyOf": [{"$ref": "#/$defs/x"}, LEAF]},
            {"$defs": {"x": LEAF | CLOSED}, "anyOf": [{"$ref": "#/$defs/x"}, LEAF | CLOSED]},
        ),
        (
            {"type": "object", "properties": {"enum": LEAF}},
            {"type": "object", "properties": {"enum": LEAF | CLOSED}} | CLOSED,
        ),
        ({"const": LEAF}, None),
        ({"type": "object"}, None),
        (LEAF | {"additionalProperties": True}, None),
        (LEAF | {"required": ["b"]}, None),
        (LEAF | {"minProperties": 1}, None),
        (LEAF | {"patternProperties": {"^b": {"type": "null"}}}, None),
        ({"allOf": [LEAF, LEAF]}, None),
        ({"anyOf": [LEAF], "required": ["b"]}, None),
        (
            {
                "type": "object",
                "$defs": {"x": LEAF},
                "properties": {"b": {"$ref": "#/$defs/x", "required": ["c"]}},
            },
            None,
        ),
    ],
)
def test_an_object_is_closed_where_its_schema_alone_names_its_properties(schema, enforced):
    rule = json.loads(json_rule(schema).removeprefix("%json "))
    del rule["x-guidance"]
    assert rule == (enforced or schema)


@pytest.mark.parametrize(
    ("pattern", "translated"),
    [
        (r"\S", r"[^\s\x{FEFF}]"),
        (r"[\S]+", r"[[^\s\x{FEFF}]]+"),
        (r"[a\S]", r"[a[^\s\x{FEFF}]]"),
        (r"[^\S]", r"[^\S\x{85}]"),
        (r"[^\s]", r"[^\s\x{FEFF}]"),
        (r"\s[\s]", r"[ \t\n\r\f\v][ \t\n\r\f\v]"),
    ],
)
def test_white_space_is_that_of_ecmascript_and_of_rust(pattern, translated):
    assert _rust_pattern(pattern) == translated
    constraint_of(json_grammar({"type": "string", "pattern": pattern}))


def test_llamas_grammars_are_read_too():
    compiler = GrammarCompiler(LETTERS, 41, ENDS)
    for source in ('root ::= "ab" [c-d]', 'start: "ab" /[c-d]/'):
        masks = np.zeros((1, 2), np.uint32)
        compiler.compile(lark_grammar(source)).begin().fill(masks, [0], [])
        assert masks.tolist() == [[1 << LETTERS.SYMBOLS.index("a"), 0]]
