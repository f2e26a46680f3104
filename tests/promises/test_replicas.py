"""S18: any replica answers with the same bits, so that who asks again when one dies loses nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import pytest

from bench.serving.client import Client, Json, Response, completion_request
from engine.counting.hardware import clock
from tests.openai_like import chat_request
from tests.promises.figures import at_least, at_most, exactly
from tests.serve.router import vllm_router
from tests.serve.started import Started
from tests.serve.tiny_server import CAPACITY, SLOTS
from tests.text.chat_models import save_chat_model

pytestmark = pytest.mark.anyio

TOKENS = 60  # of an answer, so that there are streams to cut
PROMPTS = ("Once upon a time there was a", "one two three one two", "Hello there", "The sea is")


def bodies() -> list[Json]:
    """Returns requests of every kind: greedy and sampled, texts and chats, seven in eight streamed."""
    requests = []
    for number in range(16):
        prompt = PROMPTS[number % len(PROMPTS)]
        fields: Json = {"temperature": number % 2, "seed": number, "ignore_eos": True}
        fields["stream"] = number % 8 != 7
        if number % 4 < 2:
            requests.append(completion_request(prompt, TOKENS, logprobs=1, **fields))
        else:
            requests.append(chat_request(prompt, TOKENS, logprobs=True, **fields))
    return requests


class Attempt(NamedTuple):
    """One answer to a request, or the beginning of one that broke off."""

    # Each token with its log-probability, as hexadecimal digits.
    tokens: list[tuple[str, str]]
    fingerprints: set[str]
    is_whole: bool
    # Of the reply, of which a stream may break off later; 0 for none.
    status: int


async def attempt(client: Client, body: Json, under_way: list[Response]) -> Attempt:
    """Sends a request, whose response is in `under_way` until it has ended."""
    response = Response(clock())
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    under_way.append(response)
    await client.exchange(response, client.encode("POST", path, body, {}), timeout=300)
    under_way.remove(response)
    answer = Attempt([], set(), False, response.status)
    is_finished = False
    for part in parts(response):
        answer.fingerprints.add(part["system_fingerprint"])
        for choice in part["choices"]:
            answer.tokens.extend(tokens(choice["logprobs"]))
            is_finished = is_finished or choice["finish_reason"] == "length"
    return answer._replace(is_whole=is_finished and response.error is None)


def parts(response: Response) -> list[Any]:
    """Returns the objects that came of an answer; none of a refusal."""
    if response.status != 200:
        return []
    if response.headers["content-type"].startswith("text/event-stream"):
        return [event for _, event in response.events() if "choices" in event]
    return [] if response.error else [response.json()]


def tokens(logprobs: Any) -> list[tuple[str, str]]:
    if not logprobs:
        return []
    if "content" in logprobs:
        return [(entry["token"], entry["logprob"].hex()) for entry in logprobs["content"]]
    values = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    return [(token, value.hex()) for token, value in values]


def is_in_first_half(response: Response) -> bool:
    """Whether a stream under way has begun, with tokens left for half of its time."""
    return 1 < len(response.arrivals) < TOKENS / 2


async def ask_until_whole(
    clients: Sequence[Client], turn: int, body: Json, under_way: list[Response]
) -> list[Attempt]:
    """Asks one client after the other, from the one whose turn it is; each twice at most. Returns all attempts."""
    attempts = []
    for place in range(turn, turn + 2 * len(clients)):
        attempts.append(await attempt(clients[place % len(clients)], body, under_way))
        if attempts[-1].is_whole:
            break
    return attempts


class Replicas(NamedTuple):
    """Servers of one model in processes of their own, and the clients that requests are sent by."""

    surviving: Client
    # SIGKILL for the other one.
    kill: Callable[[], None]
    clients: Sequence[Client]
    # Of each of the two.
    slots: int


@contextlib.asynccontextmanager
async def tiny_replicas(folder: Any) -> AsyncIterator[Replicas]:
    """Two commands; a client asks the other one where it has no whole answer."""
    save_chat_model(folder, context=CAPACITY)
    with Started(folder, "--slots", SLOTS) as first, Started(folder, "--slots", SLOTS) as second:
        clients = [Client(int(server.url.rpartition(":")[2])) for server in (first, second)]
        yield Replicas(clients[0], second.process.kill, clients, SLOTS)


@contextlib.asynccontextmanager
async def routed_replicas(make_server: Any, slots: int) -> AsyncIterator[Replicas]:
    """Two real servers behind the router, which asks the other one itself."""
    async with make_server() as first, make_server() as second:
        with vllm_router([f"http://127.0.0.1:{server.port}" for server in (first, second)]) as url:
            client = Client(int(url.rpartition(":")[2]))
            yield Replicas(first.client, second.process.kill, [client], slots)


@pytest.mark.whole
@pytest.mark.parametrize("front", ["client", pytest.param("router", marks=pytest.mark.promises(name="S18"))])
async def test_one_of_two_replicas_is_killed_in_the_middle_of_streams(
    front, make_server, slots, quick, tmp_path, expect
):
    """The router asks again itself for what was not begun; a stream that broke off is asked for again, whole."""
    count = 64 if quick else 200
    is_routed = front == "router"
    started = routed_replicas(make_server, slots) if is_routed else tiny_replicas(tmp_path / "tiny")
    requests = bodies()
    async with started as replicas:
        under_way: list[Response] = []
        expected = [await attempt(replicas.surviving, body, under_way) for body in requests]
        answers: dict[int, list[Attempt]] = {}
        waiting = iter(range(count))

        async def ask_in_turn() -> None:
            for number in waiting:
                body = requests[number % len(requests)]
                answers[number] = await ask_until_whole(replicas.clients, number, body, under_way)

        async def kill() -> None:
            # More streams than one server has slots are in their first half: some are of the other one.
            while len(answers) < count // 4 or sum(map(is_in_first_half, under_way)) <= replicas.slots:
                await asyncio.sleep(0.001)
            replicas.kill()

        await asyncio.gather(kill(), *(ask_in_turn() for _ in range(2 * replicas.slots)))
    cut = 0
    not_retried = 0
    different = 0
    for number, attempts in answers.items():
        wanted = expected[number % len(requests)].tokens
        is_stream = requests[number % len(requests)]["stream"]
        for each in attempts:
            is_cut = is_stream and each.status == 200 and not each.is_whole
            cut += is_cut
            not_retried += not each.is_whole and not is_cut
            different += each.tokens != wanted[: len(each.tokens)]
    fingerprints = set.union(*(each.fingerprints for attempts in answers.values() for each in attempts))
    figures = [
        exactly("asked alone, whole", sum(len(each.tokens) == TOKENS for each in expected), len(requests)),
        at_most("lost", sum(not attempts[-1].is_whole for attempts in answers.values()), 0),
        at_most("answers with other tokens or log-probabilities", different, 0),
        exactly("fingerprints", len(fingerprints), 1),
        at_least("streams that were cut and begun anew", cut, 1),
    ]
    if is_routed:
        figures.append(at_most("that the router did not ask for again itself", not_retried, 0))
    expect(*figures, over=f"{count} requests, one of two servers killed after {count // 4}")
