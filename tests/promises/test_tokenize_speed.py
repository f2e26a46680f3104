"""S7: tokenizing is linear and bounded."""

import base64
import json

import pytest
from figures import at_most

pytestmark = pytest.mark.anyio

MEGABYTE = 1 << 20
EMOJI = "🙂👩‍🚀🏳️‍🌈".encode()


@pytest.mark.promises("S7", "tokenizing is linear and bounded")
async def test_a_megabyte_is_tokenized_in_a_second(client, rng, expect):
    texts = {
        "a": b"a" * MEGABYTE,
        "^": b"^" * MEGABYTE,
        "emoji": EMOJI * (MEGABYTE // len(EMOJI)),
        "base64": base64.b64encode(rng.randbytes(MEGABYTE * 3 // 4)),
    }
    figures = []
    for name, text in texts.items():
        body = json.dumps({"model": "default", "prompt": text.decode()}, ensure_ascii=False).encode()
        response = await client.post("/tokenize", body, timeout=60)
        ok = response.status == 200 and response.json()["count"]
        seconds = response.seconds * MEGABYTE / len(text) if ok else float("nan")
        figures.append(at_most(f"1 MB of {name}", seconds, 1, " s"))
    expect(*figures, over="through /tokenize, the way there and back included")
