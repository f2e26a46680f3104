"""Log-probabilities of given tokens: /v1/score, and echo of /v1/completions, as lm-eval asks for it."""

import math

import openai
import pytest

from stages.serve.tokenizer_pool import token_text
from tests.serve.tiny_server import CAPACITY, good, refused, say

PROMPT = "Hello there, how are you"
SEVERAL = [PROMPT, "1234", "The assistant answers what the user asks"]


@pytest.fixture
def score(client):
    return lambda **body: good(client.post("/v1/score", json=body))


def test_a_completion_scored_has_the_log_probabilities_it_was_given_with(client, score, tiny_server):
    """To the bit: they come from one program, whether the tokens were sampled or are given."""
    tokenizer = tiny_server.model.tokenizer
    ids = {token_text(tokenizer, token)[0]: token for token in range(tokenizer.vocab)}
    said = good(client.complete(PROMPT, 12, logprobs=0, ignore_eos=True, seed=1, temperature=1))["choices"][
        0
    ]["logprobs"]
    (result,) = score(prompt=PROMPT, candidates=[[ids[name] for name in said["tokens"]]])["data"]
    assert result["token_logprobs"] == said["token_logprobs"]
    assert result["logprob"] == math.fsum(result["token_logprobs"])


def test_candidates_are_compared(client, score, tiny_server):
    tiny = ["a", "Hello there", "the user asks", "1234 5678", "é"]
    reply = score(prompt=PROMPT, candidates=tiny)
    assert [each["index"] for each in reply["data"]] == list(range(5))
    assert math.isclose(sum(each["share"] for each in reply["data"]), 1)
    first = reply["data"][0]
    for each in reply["data"]:
        assert math.isclose(each["share"] / first["share"], math.exp(each["logprob"] - first["logprob"]))
    assert reply["data"] == [
        {
            **score(prompt=PROMPT, candidates=[text])["data"][0],
            "index": index,
            "share": reply["data"][index]["share"],
        }
        for index, text in enumerate(tiny)
    ]  # the bits of a candidate do not depend on the others
    counts = [len(client.tokens(text, add_special_tokens=False)) for text in tiny]
    assert [len(each["token_logprobs"]) for each in reply["data"]] == counts
    assert reply["usage"]["prompt_tokens"] == len(client.tokens(PROMPT)) + sum(counts)
    assert reply["usage"]["completion_tokens"] == 0


def test_an_answer_of_the_assistants_is_scored(client, score):
    said = good(client.chat(most=6, logprobs=True))["choices"][0]
    (result,) = score(messages=say()["messages"], candidates=[said["message"]["content"]])["data"]
    given = [each["logprob"] for each in said["logprobs"]["content"]]
    assert len(result["token_logprobs"]) != len(given) or result["token_logprobs"] == given


def test_echo_has_the_prompts_log_probabilities(tiny_server, client):
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any") as ai:
        reply = ai.completions.create(model="tiny", prompt=SEVERAL, max_tokens=0, echo=True, logprobs=2)
        plain = ai.completions.create(model="tiny", prompt=SEVERAL, max_tokens=4, temperature=0, logprobs=2)
        both = ai.completions.create(
            model="tiny", prompt=SEVERAL, max_tokens=4, temperature=0, echo=True, logprobs=2
        )
    for text, choice, own, joined in zip(SEVERAL, reply.choices, plain.choices, both.choices, strict=True):
        count, scores = len(client.tokens(text)), choice.logprobs
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == count
        assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
        assert all(
            value <= max(top.values())
            for value, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:])
        )
        assert [
            text[offset:][: len(name)] for offset, name in zip(scores.text_offset, scores.tokens)
        ] == scores.tokens
        assert joined.text == text + own.text
        assert joined.logprobs.token_logprobs == scores.token_logprobs + own.logprobs.token_logprobs
    assert reply.usage.completion_tokens == 0
    same = plain.usage.model_copy(update={"prompt_tokens_details": both.usage.prompt_tokens_details})
    assert both.usage == same


def test_echo_without_log_probabilities(client):
    choice = good(client.complete(PROMPT, 0, echo=True))["choices"][0]
    assert (choice["text"], choice["logprobs"]) == (PROMPT, None)
    alone = good(client.complete(PROMPT, 5))["choices"][0]["text"]
    choices = good(client.complete(PROMPT, 5, echo=True, n=2))["choices"]
    assert [choice["text"] for choice in choices] == [PROMPT + alone] * 2


@pytest.mark.parametrize("prompt", ["", ["a", ""], [[]], [[2**18]]])
def test_a_prompt_without_tokens_or_with_an_unknown_one_is_refused(client, prompt):
    echo = {"max_tokens": 0, "echo": True}
    for more in (echo, echo | {"logprobs": 1}, {"max_tokens": 3}):
        assert refused(client.post("/v1/completions", json={"prompt": prompt} | more))["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"candidates": ["a"]}, "prompt"),
        ({"prompt": "a"}, "candidates"),
        ({"prompt": "a", "candidates": []}, "candidates"),
        ({"prompt": "a", "messages": say()["messages"], "candidates": ["a"]}, "prompt"),
        ({"prompt": "a", "candidates": [""]}, "candidates[0]"),
        ({"prompt": "a", "candidates": [[9999]]}, "candidates"),
        ({"prompt": "a", "candidates": [[5] * CAPACITY]}, "candidates"),
        ({"prompt": [], "candidates": ["a"]}, "prompt"),
        ({"prompt": "a", "candidates": ["a"] * 129}, "candidates"),
        ({"prompt": [9999], "candidates": ["a"]}, "prompt"),
    ],
)
def test_what_cannot_be_scored(client, body, param):
    problem = refused(client.post("/v1/score", json=body))
    assert problem["param"].startswith(param.partition("[")[0])


def test_what_cannot_be_echoed(client):
    for fields, param in (({"stream": True}, "echo"), ({"echo": False}, "max_tokens")):
        assert refused(client.complete(PROMPT, 0, **{"echo": True} | fields))["param"] == param
    for tokens in ([5] * (CAPACITY + 1), [5, 9999], [9999, 5]):
        assert refused(client.complete(tokens, 0, echo=True, logprobs=1))["param"] == "prompt"
    assert client.complete([5] * CAPACITY, 0, echo=True, logprobs=1).status_code == 200
