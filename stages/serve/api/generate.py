"""From what a client asked to what the engine is given, and back: the way both kinds of completion go."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import starlette.requests

from engine.errors import InvalidField
from engine.inference.request import Request, check
from engine.inference.sampling_params import SEEDS, SamplingParams
from stages.serve.api.event_stream import EventStream, whole
from stages.serve.api.generation import Answer
from stages.serve.api.request_schema import Sampling
from stages.serve.errors import Refused, json_reply
from stages.serve.state import Served
from stages.serve.tokenize import overflow


class Writer(Protocol):
    """Puts an answer in OpenAI's words: as one reply, or as chunks of which None says that there is nothing new."""

    def reply(self, answer: Answer) -> Awaitable[Any]: ...

    def chunks(self, answer: Answer) -> AsyncIterator[Any]: ...


async def answered(
    request: starlette.requests.Request, body: Sampling, writer: Writer, prompts: Callable[[], Awaitable[list[list[int]]]],
    count: int, *, most: int | None, ends: frozenset[int], logprobs: int | None, param: str, arrived: float,
) -> Any:  # fmt: skip
    """The response to a request for `count` completions: places are taken, prompts are made, the engine is asked.

    Whatever happens, the places are given back and nothing is left in the engine. Raises Refused, and Gone when the
    client leaves.
    """
    served: Served = request.app.state.served
    if body.stream_options is not None and not body.stream:
        raise Refused(400, "stream_options is given without stream being true.", param="stream_options")
    seats = served.door.enter(count)
    try:
        requests = requests_of(
            served, body, await prompts(), most=most, ends=ends, logprobs=logprobs, param=param,
            namespace=request.scope["state"].get("namespace", ""),
        )  # fmt: skip
        answer = Answer(
            served.engine, served.metrics, served.door, served.prompts.tokenizer, requests, body.stops, body.n or 1, arrived
        )
    except BaseException:
        seats.leave()
        raise

    def close() -> None:
        answer.close()
        seats.leave()

    if body.stream:
        return EventStream(answer, writer.chunks(answer), close)
    try:
        return json_reply(await whole(answer, request.receive, writer.reply(answer)))
    finally:
        close()


def requests_of(
    served: Served, body: Sampling, prompts: Sequence[list[int]], *, most: int | None, ends: frozenset[int],
    logprobs: int | None, namespace: str, param: str,
) -> list[Request]:  # fmt: skip
    """`n` requests for each prompt, of at most `most` tokens (all that fit when None). Raises Refused.

    Each draws by a seed of its own, counted up from the one that was given, else from a random one.
    """
    seed = int.from_bytes(os.urandom(4)) if body.seed is None else body.seed
    n = body.n or 1
    made = []
    for place, prompt in enumerate(prompts):
        room = served.engine.capacity - len(prompt)
        if room < (most or 1):
            raise overflow(len(prompt), most, served.engine.capacity, param)
        for choice in range(n):
            made.append(
                _request(served, body, prompt, most or room, (seed + place * n + choice) % SEEDS, ends, logprobs, namespace)
            )
    return made


def _request(
    served: Served, body: Sampling, prompt: list[int], most: int, seed: int, ends: frozenset[int], logprobs: int | None,
    namespace: str,
) -> Request:  # fmt: skip
    or_else = lambda value, default: default if value is None else value
    try:
        sampling = SamplingParams(
            max_tokens=most,
            temperature=or_else(body.temperature, 1.0),
            top_k=max(0, body.top_k or 0),  # -1 is another way to say all
            top_p=or_else(body.top_p, 1.0),
            min_p=body.min_p or 0.0,
            seed=seed,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=or_else(body.repetition_penalty, 1.0),
            logit_bias={int(token): value for token, value in (body.logit_bias or {}).items() if value},
            logprobs=logprobs,
            stop_token_ids=frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else ends),
        )
        request = Request(tuple(prompt), sampling, namespace)
        check(request, served.engine.cfg.vocab, served.engine.capacity)
    except InvalidField as error:
        raise Refused(400, str(error), param=error.field) from None
    return request
