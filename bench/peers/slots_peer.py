"""The peer of the server: the same engine's slots without a server around them, in a process of their own.

`bench.serving` starts this file and asks for one round at a time. It computes with what the server computes with: the same
weights laid out the same way, the same slots, capacity and settings.
"""

import sys
from pathlib import Path
from typing import Any


def make(spec: dict[str, Any]) -> Any:
    """Prepares a run of many prompts at once to their last token.

    `spec`: model, weights, slots, capacity, prompts, new (tokens). The run returns the output tokens, in the order of the
    prompts.
    """
    from engine.device import start_jax

    start_jax(decodes=True)
    from bench.models import load
    from engine.inference.decode import for_inference
    from engine.inference.request import Request
    from engine.inference.sampling_params import SamplingParams
    from engine.inference.slots import Slots
    from engine.model.weights.int8 import quantize

    model = load(spec["model"])
    params = quantize(model.params) if spec["weights"] == "int8" else model.params
    slots = Slots(
        model.cfg, for_inference(model.cfg, params), slots=spec["slots"], capacity=spec["capacity"], prefix_cache_bytes=0
    )
    slots.warm()
    requests = [Request(tuple(prompt), SamplingParams(max_tokens=spec["new"], temperature=0.0)) for prompt in spec["prompts"]]

    def run() -> dict[str, Any]:
        ids = [slots.submit(request) for request in requests]
        output_tokens: dict[int, list[int]] = {id: [] for id in ids}
        while slots.busy:
            for event in slots.step():
                output_tokens[event.id] += event.tokens
        return {"tokens": [output_tokens[id] for id in ids]}

    return run


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # started by path, it would otherwise find bench's files alone
    from bench.peers.protocol import serve

    serve(["jax", "numpy"], make)
