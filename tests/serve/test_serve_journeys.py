"""Conversations as long as the context (S15)."""

from tests.serve.tiny_server import good, refused
from tests.text.chat_models import talk


def test_a_conversation_of_any_length_that_fits_is_answered(roomy_client):
    """40 turns, and as many as the context holds; one more is refused and nothing of it left out."""

    def chat(messages, **fields):
        body = {"messages": messages, "temperature": 0, "max_tokens": 8} | fields
        return roomy_client.post("/v1/chat/completions", json=body)

    def tokenize(messages):
        return good(roomy_client.post("/tokenize", json={"messages": messages}))

    messages = talk(*["Hello there, how are you? I am well. 1234"] * 39)
    assert good(chat(messages))["choices"][0]["message"]["content"]
    reply = tokenize(messages)
    context, one_turn = reply["max_model_len"], reply["count"] // len(messages)
    messages = talk(*["1 2"] * (context // one_turn))
    while (count := tokenize(messages)["count"]) < context:
        full = messages
        messages = talk(*["1 2"] * (len(messages) + 2 * max(1, (context - count) // 50)))
    usage = good(chat(full, max_tokens=None, ignore_eos=True))["usage"]
    assert usage["total_tokens"] == context
    assert refused(chat(messages))["code"] == "context_length_exceeded"
