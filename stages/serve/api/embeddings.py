"""POST /v1/embeddings, OpenAI's: the mean of the last hidden states of each text, of length 1."""

import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from engine.inference.request import SamplingParams
from stages.serve.api.generation import MAX_COMPLETIONS, Answer, Generation, Piece, Usage, make_request, text_prompts
from stages.serve.api.requests import AnswerRequest, Call, Texts
from stages.serve.errors import ApiError
from stages.serve.tokenizer_pool import context_overflow


class EmbeddingsRequest(AnswerRequest, kw_only=True):
    """POST /v1/embeddings. `input`: a text, several, a list of token ids, or several such lists.

    `dimensions`: how many of an embedding's first numbers are wanted; they are scaled to length 1 again.
    """

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None

    @property
    def choices(self) -> int:
        return len(self.texts(MAX_COMPLETIONS))


class Embedding(msgspec.Struct):
    """`embedding`: numbers, or in base64 the bytes of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsReply(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: dict[str, int]


async def create_embedding(call: Call[EmbeddingsRequest]) -> Answer[EmbeddingsReply]:
    """Texts as vectors."""
    body, capacity, width = call.body, call.state.engine.capacity, call.state.engine.cfg.width
    if body.dimensions and body.dimensions > width:
        raise ApiError(400, f"An embedding of this model has {width} dimensions, not more.", param="dimensions")
    prompts = await text_prompts(call, MAX_COMPLETIONS)
    if (longest := max(map(len, prompts.tokens))) >= capacity:
        raise context_overflow(longest, capacity, "input")
    requests = [make_request(call, tokens, SamplingParams(max_tokens=1), embed=True) for tokens in prompts.tokens]

    def encode(embedding: Any) -> list[float] | str:
        unit = (embedding / max(np.linalg.norm(embedding), np.finfo(np.float32).tiny)).astype("<f4")
        return base64.b64encode(unit.tobytes()).decode() if body.encoding_format == "base64" else unit.tolist()

    def reply(pieces: list[Piece], usage: Usage) -> EmbeddingsReply:
        data = [Embedding(piece.choice, encode(piece.embedding[: body.dimensions])) for piece in pieces]
        counts = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}
        return EmbeddingsReply(model=call.model.name, data=data, usage=counts)

    return Generation(call, prompts, requests, reply)
