"""S3: serving never changes weights, and no route could. The last file of this folder, since it ends the server."""

import asyncio
import re

import pytest
from figures import at_most, exactly
from fuzz import fuzzed_request
from openai_like import fake_server, read_metrics

from bench.serving.client import Client

pytestmark = pytest.mark.anyio

UPDATE_ROUTES = (
    "/update_weights", "/v1/update_weights", "/update_weights_from_disk", "/load_weights", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/init_weight_update", "/collective_rpc", "/sleep", "/wake_up", "/reset_prefix_cache", "/pause",
    "/v1/models/load", "/v1/fine_tuning/jobs", "/v1/files", "/admin", "/debug", "/shutdown",
)  # fmt: skip


@pytest.mark.promises("S3", "serving never changes weights, and no route could")
async def test_the_digest_is_that_of_load(server, client, slots, quick, rng, expect):
    requests = iter([fuzzed_request(rng) for _ in range(100 if quick else 500)])

    async def stream() -> None:
        for method, path, body, headers in requests:
            await client.request(method, path, body, headers=headers)

    await asyncio.gather(*(stream() for _ in range(slots)))
    accepted = await accepted_updates(client)
    responses = (await read_metrics(client))["thrice_responses_total"]
    attestation = (await client.get("/v1/attestation")).json()
    server.process.terminate()
    code = await server.wait(20)
    expect(
        exactly("digests at load, on demand and at shutdown", distinct_digests(attestation, server.output()), 1),
        exactly("exit code", code, 0),
        at_most("routes that take PUT, PATCH or DELETE or load weights", accepted, 0),
        over=f"after {responses:,.0f} responses of all kinds",
    )


def distinct_digests(attestation: dict[str, str], output: str) -> int:
    """How many SHA-256 there are: of the weights at load, on demand, and in the server's last words.

    Those print the first 16 digits; that the rest is as at load is in the exit code.
    """
    printed = re.search(r"Weights \w+.*: SHA-256 ([0-9a-f]{16})", output)
    last = printed[1] if printed else "nothing"
    return len({attestation["digest_at_load"], attestation["digest"], last + attestation["digest"][len(last) :]})


async def accepted_updates(client: Client) -> int:
    """How many requests that might change weights are not refused."""
    routes = (await client.get("/openapi.json")).json()["paths"]
    paths = [path.replace("{model}", "default") for path in routes]
    attempts = [(method, path) for path in paths for method in ("PUT", "PATCH", "DELETE")]
    attempts += [(method, path) for path in UPDATE_ROUTES for method in ("GET", "POST", "PUT")]
    return sum([(await client.request(method, path, {})).status < 400 for method, path in attempts])


@pytest.mark.parametrize(
    ("on_demand", "output", "digests"),
    [
        ("a", "Stopped. Weights unchanged: SHA-256 " + "a" * 16 + "; 0 programs", 1),
        ("a", "Stopped. Weights CHANGED from aaaa: SHA-256 " + "b" * 16 + "; 0 programs", 2),
        ("b", "Stopped. Weights unchanged: SHA-256 " + "a" * 16 + "; 0 programs", 3),
        ("a", "Killed", 2),
    ],
)
def test_another_digest_is_noticed(on_demand, output, digests):
    assert distinct_digests({"digest_at_load": "a" * 64, "digest": on_demand * 64}, output) == digests


async def test_a_route_that_takes_weights_is_noticed():
    def respond(method, path, headers, body):
        if path == "/openapi.json":
            return 200, {"paths": {"/v1/models/{model}": {}}}
        return (200 if (method, path) in (("PUT", "/v1/models/default"), ("POST", "/sleep")) else 404), {}

    async with fake_server(respond) as port:
        assert await accepted_updates(Client(port)) == 2
