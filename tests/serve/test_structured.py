"""J1: a structured answer parses and validates, or its finish reason says why not, and nobody beside it notices."""

import datetime
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.tiny_server import ask, events, good, say

# the token of a quotation mark, so that strings of a model without sense have an end
QUOTE = {"1": 2.5}


def schema_strategy() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of JSONSchemaBench's kind: records within lists within records, and what is said of
    their leaves.
    """
    # what a record says of names that are not its own
    others = st.sampled_from(
        [{"additionalProperties": False}, {}, {"additionalProperties": {"type": "integer", "maximum": 9}}]
    )
    few, names = st.integers(0, 3), st.sampled_from(["name", "a", "id 2", "größe", 'q"uote', "n\\t"])
    values = st.one_of(st.text(max_size=5), st.integers(-20, 20), st.booleans(), st.none(), st.just(1.5))
    span = lambda low, high: st.tuples(st.integers(low, high), few).map(lambda pair: (pair[0], sum(pair)))
    leaf = st.one_of(
        st.builds(lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}, span(0, 3)),
        st.sampled_from(["^[a-c]{2,4}$", "^\\d{3}-\\d{4}$", "^(yes|no)\\s?$", "^[^\\s]\\S.$"]).map(
            lambda p: {"type": "string", "pattern": p}
        ),
        st.sampled_from(["date", "time", "uuid", "ipv4"]).map(
            lambda name: {"type": "string", "format": name}
        ),
        st.builds(lambda n: {"type": "integer", "minimum": n[0], "maximum": n[1]}, span(-9, 200)),
        st.builds(lambda n: {"type": "number", "minimum": n[0], "exclusiveMaximum": n[1] + 1}, span(-9, 9)),
        st.sampled_from(
            [{"type": "integer", "multipleOf": 7, "minimum": 0}, {"type": "boolean"}, {"type": "null"}]
        ),
        st.lists(values, min_size=1, max_size=3).map(lambda each: {"enum": each}),
        values.map(lambda value: {"const": value}),
        st.just(
            {"type": ["string", "null"], "maxLength": 3, "title": "T", "description": "D", "default": None}
        ),
        st.just({"$ref": "#/$defs/leaf"}),
    )

    def record(properties: dict[str, Any], required: int, others: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": [*properties][:required], **others}

    def grow(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        return st.one_of(
            st.builds(record, st.dictionaries(names, inner, max_size=4), few, others),
            st.builds(
                lambda item, n: {"type": "array", "items": item, "minItems": n[0], "maxItems": n[1]},
                inner,
                span(0, 1),
            ),
            st.builds(
                lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)},
                st.lists(inner, min_size=1, max_size=2),
            ),
            st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each}),
            st.just({"$ref": "#/$defs/tree"}),
        )

    tree = record(
        {"value": {"$ref": "#/$defs/leaf"}, "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        1,
        {"additionalProperties": False},
    )
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

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[*HealthCheck],
        database=None,
    )
    @given(
        schemas=st.lists(schema_strategy(), min_size=4, max_size=4),
        temperature=st.sampled_from([0.0, 0.8, 1.5]),
    )
    def answers_validate(schemas, temperature):
        with ThreadPoolExecutor(5) as pool:
            beside = pool.submit(client.post, "/v1/completions", json=plain)
            reasons.extend(
                pool.map(
                    lambda pair: answer_validates(client, pair[1], temperature, pair[0]), enumerate(schemas)
                )
            )
            assert good(beside.result())["choices"] == alone

    answers_validate()
    assert len(reasons) >= 4 * examples
    assert reasons.count("stop") > 0.7 * len(reasons)
    assert server.engine.steps_decoded > before
    assert server.state.engine.compiles_after_ready == compiled
    attested = good(client.get("/v1/attestation"))
    assert attested["digest"] == attested["digest_at_load"]


@pytest.mark.law("constrained decoding")
def test_dozens_of_random_schemas(tiny_server, client):
    try_schemas(tiny_server, client, 12)


@pytest.mark.law("constrained decoding")
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
    anything = good(client.chat("Hi", 100, response_format={"type": "json_object"}, logit_bias=QUOTE))[
        "choices"
    ][0]
    assert anything["message"]["content"].startswith("{")
    for ignore_eos in (False, True):
        ended = complete(guided_choice=["yes"], ignore_eos=ignore_eos)
        assert (ended["text"], ended["finish_reason"]) == ("yes", "stop")


@pytest.fixture
def gpt(tiny_server):
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def structured(gpt):
    """The answer of a chat with vLLM's `structured_outputs`, sent as people send it: by the
    client's extra_body.
    """

    def answer(outputs: dict[str, Any], most: int = 60, **more: Any) -> str:
        fields: Any = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": most,
            "temperature": 0,
        }
        reply = gpt.chat.completions.create(**fields, extra_body={"structured_outputs": outputs} | more)
        return reply.choices[0].message.content

    return answer


def test_vllms_structured_outputs(structured, client):
    assert json.loads(structured({"json": SCHEMA}))["color"] in ("red", "blue")
    assert json.loads(structured({"json": json.dumps(SCHEMA)}))["size"] in (1, 22)
    assert structured({"regex": "[ab]{3}c"}).strip("ab") == "c"
    assert structured({"choice": ["yes", "no"]}) in ("yes", "no")
    assert structured({"grammar": 'root ::= "x" [yz] "!"'}) in ("xy!", "xz!")
    assert structured({"json_object": True}, 5).startswith("{")
    usual = {
        "regex": None,
        "json_object": False,
        "structural_tag": None,
        "disable_any_whitespace": False,
        "disable_additional_properties": False,
        "disable_fallback": True,
        "whitespace_pattern": None,
        "_backend": None,
    }
    assert structured({"choice": ["maybe"]} | usual) == "maybe"
    outputs = {"choice": ["yes, indeed"]}
    assert (
        good(client.complete("Hello", 40, structured_outputs=outputs))["choices"][0]["text"] == "yes, indeed"
    )


TAG = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<a>", "schema": {"const": 1}, "end": "]"},
        {"begin": "<b>", "schema": {"const": "x"}, "end": "]"},
        {"begin": "#", "schema": {"enum": [2, 3]}},
    ],
    "triggers": ["<", "#"],
}


@pytest.mark.parametrize("seed", range(4))
def test_text_goes_on_with_a_structure_where_it_has_come_to_a_trigger(client, seed):
    bias = {str(client.tokens(mark)[-1]): 6 for mark in ("#", "<")}
    body = ask(
        "Hello",
        60,
        structured_outputs={"structural_tag": json.dumps(TAG)},
        temperature=1.3,
        seed=seed,
        logit_bias=bias,
    )
    text = good(client.post("/v1/completions", json=body))["choices"][0]["text"]
    for trigger, wholes in {"#": ["2", "3"], "<": ["a>1]", 'b>"x"]']}.items():
        assert trigger in text
        for match in re.finditer(trigger, text):
            rest = text[match.end() :]
            assert any(
                rest.startswith(whole) or whole.startswith(rest) for whole in wholes
            )  # the last may be cut


def test_the_structures_of_an_object_are_those_of_its_text(structured, gpt):
    only = {
        "type": "structural_tag",
        "structures": [{"begin": "@", "schema": {"const": 7}, "end": "."}],
        "triggers": ["@"],
    }
    texts = [structured({"structural_tag": tag}, 20) for tag in (only, json.dumps(only))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({}, "structured_outputs must have exactly one of json, .* has none"),
        ({"json_object": False}, "has none"),
        ({"json": SCHEMA, "regex": "a"}, "has json and regex"),
        ({"json": "{"}, "structured_outputs.json: it is no JSON schema"),
        ({"json": {"not": {}}}, "structured_outputs.json: .*not"),
        ({"regex": "(a"}, "structured_outputs.regex: "),
        ({"grammar": "b"}, "structured_outputs.grammar: it is neither Lark nor GBNF"),
        ({"choice": []}, "structured_outputs.choice: "),
        ({"json": SCHEMA, "whitespace_pattern": " *"}, "structured_outputs.whitespace_pattern: .*one line"),
        ({"json": SCHEMA, "disable_additional_properties": True}, "Say additionalProperties: false"),
        ({"structural_tag": "{}"}, "structured_outputs.structural_tag: it is no structural tag: .*`type`"),
        (
            {"structural_tag": {"type": "structural_tag"}},
            "structured_outputs.structural_tag: it has no structures",
        ),
        (
            {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}},
            "structures with triggers",
        ),
        ({"structural_tag": TAG | {"triggers": ["#"]}}, "no trigger begins the structure '<a>'"),
        ({"structural_tag": TAG | {"triggers": ["<", "#", "%"]}}, "no structure begins with the trigger '%'"),
    ],
)
def test_structured_outputs_that_cannot_be_granted_are_named(structured, outputs, words):
    with pytest.raises(openai.BadRequestError, match=words):
        structured(outputs)


def test_only_one_grammar_is_kept_to(structured):
    fields = {"response_format": {"type": "json_object"}}
    with pytest.raises(
        openai.BadRequestError, match=r"response_format is sent beside structured_outputs\.choice"
    ):
        structured({"choice": ["a"]}, **fields)
    with pytest.raises(
        openai.BadRequestError, match=r"guided_regex is sent beside structured_outputs\.choice"
    ):
        structured({"choice": ["a"]}, guided_regex="a")


def test_a_schema_needs_no_name_and_its_unknown_formats_are_notes(client):
    """As in OpenAPI, whose `password` and `int32` are for people; a format that is known is
    enforced beside them.
    """
    properties = {
        "note": {"const": "a", "format": "password"},
        "day": {"type": "string", "format": "date"},
        "format": {"type": "string", "format": "regex", "pattern": "^b$"},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }
    body = say("A", 100, response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    answer = json.loads(
        good(client.post("/v1/chat/completions", json=body))["choices"][0]["message"]["content"]
    )
    assert (answer["note"], answer["format"]) == ("a", "b")
    assert datetime.date.fromisoformat(answer["day"])
