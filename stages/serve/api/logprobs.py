"""Log-probabilities of sampled tokens, as the clients of OpenAI and Ollama read them."""

from collections.abc import Callable

import msgspec

from engine.inference.request import LogProb


class TopLogProb(msgspec.Struct):
    """A token, its log-probability in nats, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogProb(TopLogProb):
    """The sampled token, and the most probable ones in its place."""

    top_logprobs: list[TopLogProb]


def token_logprob(logprob: LogProb, text_of: Callable[[int], tuple[str, bytes]]) -> TokenLogProb:
    """Returns a sampled token and its log-probability as clients read them.

    `text_of`: a token's id -> its text, its bytes.
    """

    def fields(token: int, nats: float) -> tuple[str, float, list[int]]:
        text, content = text_of(token)
        return text, nats, list(content)

    top = [TopLogProb(*fields(token, nats)) for token, nats in logprob.top]
    return TokenLogProb(*fields(logprob.token, logprob.logprob), top)
