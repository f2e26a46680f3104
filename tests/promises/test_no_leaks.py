"""S2: no text of one request reaches another."""

import asyncio
import json
import random

import pytest
from figures import at_least, at_most
from openai_like import fake_completion, fake_server

from bench.serving.client import Client, complete, completion_request, random_text

pytestmark = pytest.mark.anyio

PART = 8  # characters of a secret that give it away


@pytest.mark.promises("S2", "no text of one request reaches another")
async def test_no_completion_holds_anothers_secret(client, slots, quick, rng, expect):
    count = 64 if quick else 600
    leaked, echoed = await exchange_secrets(client, 2 * slots, count, rng)
    expect(
        at_most("answers with another's secret", leaked, 0),
        at_least("with their own", echoed, count // 4),
        over=f"{count} prompts, two to a slot; free slots filled with NaN and Inf: tests/inference/test_inference_engine.py",
    )


async def exchange_secrets(client: Client, streams: int, count: int, rng: random.Random) -> tuple[int, int]:
    """Sends prompts that each hold a secret of their own and ask for it.

    Returns how many completions hold a part of another's secret, and how many a part of their own.
    """
    secrets = [f"{rng.getrandbits(48):012x}" for _ in range(count)]
    texts: list[tuple[str, str]] = []
    remaining = iter(secrets)

    async def stream() -> None:
        for secret in remaining:
            shared = random_text(random.Random(9), rng.choice((0, 140)))  # many begin alike, by whole chunks
            prompt = f"{shared} The password is {secret}. Repeat: the password is {secret}. The password is"
            fields = {"temperature": rng.choice((0, 1)), "seed": rng.randrange(2**32)}
            texts.append((secret, (await complete(client, completion_request(prompt, 14, **fields))).text))

    await asyncio.gather(*(stream() for _ in range(streams)))
    owner = {part: secret for secret in secrets for part in _parts(secret)}
    leaked = sum(any(owner.get(part, own) != own and part not in own for part in _parts(text)) for own, text in texts)
    echoed = sum(any(owner.get(part) == own for part in _parts(text)) for own, text in texts)
    return leaked, echoed


def _parts(text: str) -> set[str]:
    return {text[at : at + PART] for at in range(len(text) - PART + 1)}


@pytest.mark.parametrize(("leak_at", "expected"), [(None, (0, 64)), (20, (1, 63))])
async def test_the_secret_of_another_is_noticed(leak_at, expected, rng):
    secrets = []

    def respond(method, path, headers, body):
        secrets.append(json.loads(body)["prompt"].split("password is ")[1][:12])
        return fake_completion(secrets[3] if len(secrets) == leak_at else secrets[-1], json.loads(body))

    async with fake_server(respond) as port:
        assert await exchange_secrets(Client(port), 4, 64, rng) == expected
