"""J1: a structured answer parses and validates, or its finish reason says why not, and nobody beside it notices."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_server import ask, events, good, say

QUOTE = {"1": 2.5}  # the token of a quotation mark, so that strings of a model without sense have an end


def schema_strategy() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of JSONSchemaBench's kind: records within lists within records, and what is said of their leaves."""
    few, names = st.integers(0, 3), st.sampled_from(["name", "a", "id 2", "größe", 'q"uote', "n\\t"])
    values = st.one_of(st.text(max_size=5), st.integers(-20, 20), st.booleans(), st.none(), st.just(1.5))
    span = lambda low, high: st.tuples(st.integers(low, high), few).map(lambda pair: (pair[0], sum(pair)))
    leaf = st.one_of(
        st.builds(lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}, span(0, 3)),
        st.sampled_from(["^[a-c]{2,4}$", "^\\d{3}-\\d{4}$", "^(yes|no)\\s?$", "^[^\\s]\\S.$"]).map(
            lambda p: {"type": "string", "pattern": p}
        ),
        st.sampled_from(["date", "time", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
        st.builds(lambda n: {"type": "integer", "minimum": n[0], "maximum": n[1]}, span(-9, 200)),
        st.builds(lambda n: {"type": "number", "minimum": n[0], "exclusiveMaximum": n[1] + 1}, span(-9, 9)),
        st.sampled_from([{"type": "integer", "multipleOf": 7, "minimum": 0}, {"type": "boolean"}, {"type": "null"}]),
        st.lists(values, min_size=1, max_size=3).map(lambda each: {"enum": each}),
        values.map(lambda value: {"const": value}),
        st.just({"type": ["string", "null"], "maxLength": 3, "title": "T", "description": "D", "default": None}),
        st.just({"$ref": "#/$defs/leaf"}),
    )

    def record(properties: dict[str, Any], required: int, closed: bool) -> dict[str, Any]:
        kept = {"additionalProperties": False} if closed else {"additionalProperties": {"type": "integer", "maximum": 9}}
        return {"type": "object", "properties": properties, "required": [*properties][:required], **kept}

    def grow(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        return st.one_of(
            st.builds(record, st.dictionaries(names, inner, max_size=4), few, st.integers(0, 4).map(bool)),
            st.builds(lambda item, n: {"type": "array", "items": item, "minItems": n[0], "maxItems": n[1]}, inner, span(0, 1)),
            st.builds(
                lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)},
                st.lists(inner, min_size=1, max_size=2),
            ),
            st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each}),
            st.just({"$ref": "#/$defs/tree"}),
        )

    tree = record({"value": {"$ref": "#/$defs/leaf"}, "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, 1, True)
    definitions = {"leaf": {"type": "integer", "minimum": 1, "maximum": 3}, "tree": tree}
    return st.recursive(leaf, grow, max_leaves=6).map(lambda schema: {"$defs": definitions, **schema})


def answer_validates(client, schema, temperature, seed) -> str:
    body = ask("A", 130, guided_json=schema, temperature=temperature, seed=seed, logit_bias=QUOTE)
    (choice,) = good(client.post("/v1/completions", json=body))["choices"]
    if choice["finish_reason"] == "stop":
        jsonschema_rs.validate(schema, json.loads(choice["text"]))
    else:
        assert choice["finish_reason"] == "length"
    return choice["finish_reason"]


def try_schemas(server, client, examples: int) -> None:
    """Four answers at a time to schemas, beside one to a prompt, which is what it is alone."""
    plain = ask("Hello there", 60, temperature=0.9, seed=3, logprobs=2)
    alone, before = good(client.post("/v1/completions", json=plain))["choices"], server.engine.steps_decoded
    reasons: list[str] = []

    compiled = server.state.engine.compiles_after_ready

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck], database=None)
    @given(schemas=st.lists(schema_strategy(), min_size=4, max_size=4), temperature=st.sampled_from([0.0, 0.8, 1.5]))
    def answers_validate(schemas, temperature):
        with ThreadPoolExecutor(5) as pool:
            beside = pool.submit(client.post, "/v1/completions", json=plain)
            reasons.extend(pool.map(lambda pair: answer_validates(client, pair[1], temperature, pair[0]), enumerate(schemas)))
            assert good(beside.result())["choices"] == alone

    answers_validate()
    assert len(reasons) >= 4 * examples
    assert reasons.count("stop") > 0.7 * len(reasons)
    assert server.engine.steps_decoded > before
    assert server.state.engine.compiles_after_ready == compiled
    attested = good(client.get("/v1/attestation"))
    assert attested["digest"] == attested["digest_at_load"]


def test_dozens_of_random_schemas(tiny_server, client):
    try_schemas(tiny_server, client, 12)


@pytest.mark.night
@pytest.mark.timeout(3600)
def test_2000_random_schemas(tiny_server, client):
    try_schemas(tiny_server, client, 500)


SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "size": {"enum": [1, 22]}},
    "required": ["color", "size"],
    "additionalProperties": False,
}


def test_each_choice_has_its_own_way_through_the_grammar_streamed_or_not(client):
    body = say(
        "A",
        60,
        n=4,
        seed=5,
        temperature=1.5,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    )
    choices = good(client.post("/v1/chat/completions", json=body))["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    for choice, text in zip(choices, texts):
        assert choice["finish_reason"] == "stop"
        jsonschema_rs.validate(SCHEMA, json.loads(text))
    assert len({*texts}) > 1
    streamed = [""] * 4
    for chunk in events(client.post("/v1/chat/completions", json=body | {"stream": True}).text):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert streamed == texts


def test_every_kind_of_grammar_beside_stop_strings_and_log_probabilities(client):
    complete = lambda **fields: good(client.complete("Hello", 40, **fields))["choices"][0]
    assert complete(guided_choice=["yes", "no"])["text"] in ("yes", "no")
    many = [f"{n} 🙂"[: n % 3 + 3] for n in range(4_000)]  # some begin others
    assert complete(guided_choice=many)["text"] in many
    assert complete(guided_regex="[ab]{3}c")["text"].strip("ab") == "c"
    assert complete(grammar='root ::= "x" [yz] "!"')["text"] in ("xy!", "xz!")
    assert complete(guided_grammar='start: "x" /[yz]/ "!"')["text"] in ("xy!", "xz!")
    stopped = complete(guided_choice=["yes, no"], stop=[", "], logprobs=1)
    assert (stopped["text"], stopped["finish_reason"]) == ("yes", "stop")
    anything = good(client.chat("Hi", 100, response_format={"type": "json_object"}, logit_bias=QUOTE))["choices"][0]
    assert anything["message"]["content"].startswith("{")
    for ignore_eos in (False, True):
        ended = complete(guided_choice=["yes"], ignore_eos=ignore_eos)
        assert (ended["text"], ended["finish_reason"]) == ("yes", "stop")
