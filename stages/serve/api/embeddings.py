"""POST /v1/embeddings: texts as vectors."""

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from engine.errors import InvalidField
from engine.inference.request import SamplingParams
from stages.serve.api.fields import AnswerRequest, Texts, prompt_texts
from stages.serve.api.generation import MAX_COMPLETIONS, Generation, choices_of
from stages.serve.api.jobs import TextPrompts, make_request
from stages.serve.api.requests import ApiCall
from stages.serve.api.writer import Piece, Usage
from stages.serve.bill import Bill
from stages.serve.tokenizer_pool import context_overflow


class EmbeddingsRequest(AnswerRequest, kw_only=True):
    """POST /v1/embeddings. `input`: a text, several, a list of token ids, or several such lists.

    `dimensions`: how many of an embedding's first numbers are wanted; they are scaled to length 1
    again.
    """

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None

    @property
    def choices(self) -> int:
        return len(prompt_texts("input", self.input, MAX_COMPLETIONS))


class Embedding(msgspec.Struct):
    """`embedding`: numbers, or in base64 the bytes of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    cost: Bill | UnsetType = UNSET


class EmbeddingsReply(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingsUsage


async def create_embedding(call: ApiCall[EmbeddingsRequest]) -> ASGIApp:
    """Texts as vectors."""
    body = call.body
    model = call.model.name
    in_base64 = body.encoding_format == "base64"

    def encode(vector: Any) -> list[float] | str:
        return base64.b64encode(vector.tobytes()).decode() if in_base64 else vector.tolist()

    def reply(vectors: list[Any], usage: Usage) -> EmbeddingsReply:
        data = [Embedding(index, encode(vector)) for index, vector in enumerate(vectors)]
        own_usage = EmbeddingsUsage(usage.prompt, usage.prompt, usage.cost)
        return EmbeddingsReply(model=model, data=data, usage=own_usage)

    prompts = TextPrompts("input", prompt_texts("input", body.input, MAX_COMPLETIONS))
    return await embed(call, prompts, reply, body.ignored, body.dimensions)


async def embed(
    call: ApiCall,
    prompts: TextPrompts,
    reply: Callable[[list[Any], Usage], msgspec.Struct],
    ignored: Sequence[str],
    dimensions: int | None = None,
    *,
    truncate: bool = False,
) -> Generation:
    """Responds with what `reply` makes of the embeddings of texts: vectors of float32, of length 1.

    `ignored`: names of the body's fields that change nothing. `dimensions`: how many of an
    embedding's first numbers are wanted. With `truncate` the end of a text that is longer than the
    context is left out; without it such a text is refused. Raises ApiError and InvalidField.
    """
    capacity = call.state.engine.capacity
    width = call.state.engine.cfg.width
    if dimensions and dimensions > width:
        raise InvalidField("dimensions", f"An embedding of this model has {width} dimensions, not more.")
    texts = (await prompts.encode(call.state)).tokens
    if truncate:
        texts = [tokens[: capacity - 1] for tokens in texts]
    longest = max(map(len, texts))
    if longest >= capacity:
        raise context_overflow(longest, capacity, prompts.field)
    sampling = SamplingParams(max_tokens=1)
    requests = [make_request(call, prompts.field, tokens, sampling, embed=True) for tokens in texts]

    def reply_to(pieces: list[Piece], usage: Usage) -> msgspec.Struct:
        return reply([_unit_vector(piece.embedding[:dimensions]) for piece in pieces], usage)

    return Generation(call, choices_of(call, requests), reply_to, ignored=ignored)


def _unit_vector(vector: Any) -> Any:
    """Returns a vector (D,) at length 1, little-endian float32; zeros stay zeros."""
    length = max(np.linalg.norm(vector), np.finfo(np.float32).tiny)
    return (vector / length).astype("<f4")
