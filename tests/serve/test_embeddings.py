"""/v1/embeddings through OpenAI's client: the mean of the last hidden states, whatever else is asked meanwhile."""

import jax.numpy as jnp
import numpy as np
import openai
import pytest

from engine.model.transformer import hidden_states
from tests.serve.tiny_server import CAPACITY, refused

TEXTS = ["Hello there", "1234", "The assistant answers what the user asks; the system says how. " * 3]


@pytest.fixture
def embed(tiny_server):
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any") as ai:
        yield lambda texts, **more: ai.embeddings.create(model="tiny", input=texts, **more)


def vectors(reply):
    return np.array([each.embedding for each in reply.data])


def test_an_embedding_is_the_mean_of_the_last_hidden_states(embed, client, tiny_server):
    reply = embed(TEXTS)
    for text, vector in zip(TEXTS, vectors(reply)):
        tokens = jnp.array([client.tokens(text)])
        positions = jnp.arange(tokens.shape[1])[None]
        mean = np.asarray(
            hidden_states(tiny_server.engine.cfg, tiny_server.engine.params, tokens, positions)[0][0]
        ).mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-5)
    assert reply.usage.prompt_tokens == sum(len(client.tokens(text)) for text in TEXTS)
    assert [each.index for each in reply.data] == [0, 1, 2]


def test_forms_and_dimensions(embed, client):
    whole = vectors(embed(TEXTS))
    np.testing.assert_array_equal(
        vectors(embed(TEXTS, encoding_format="float")).astype(np.float32), whole.astype(np.float32)
    )
    np.testing.assert_array_equal(vectors(embed([client.tokens(text) for text in TEXTS])), whole)
    np.testing.assert_array_equal(vectors(embed(TEXTS[0]))[0], whole[0])
    cut = vectors(embed(TEXTS, dimensions=5))
    np.testing.assert_allclose(
        cut, whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [9999]}, "input"),
        ({"input": [5] * CAPACITY}, "input"),
        ({"input": ["a"] * 129}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 10**6}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded(client, body, param):
    assert refused(client.post("/v1/embeddings", json=body))["param"] == param
