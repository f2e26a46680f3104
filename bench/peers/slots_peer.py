"""Runs the server's engine without the server, the peer of `bench.serving`, with the same weights, slots and capacity.

Imports of the repository follow its entry in sys.path and the start of JAX.
"""

import sys
from pathlib import Path
from typing import Any


def make(spec: dict[str, Any]) -> Any:
    """Returns a run that continues all prompts at once and returns their tokens.

    `spec`: model, weights, slots, capacity, prompts, new (tokens).
    """
    from engine.device import start_jax

    start_jax(one_arena=False)
    from bench.models import load
    from engine.inference.config import EngineConfig
    from engine.inference.decode import prepare_params
    from engine.inference.engine import Engine
    from engine.inference.request import Request, SamplingParams
    from engine.model.weights.int8 import quantize

    model = load(spec["model"])
    params = quantize(model.params) if spec["weights"] == "int8" else model.params
    config = EngineConfig(spec["slots"], spec["capacity"])
    engine = Engine(model.cfg, prepare_params(model.cfg, params), config)
    engine.warm()
    requests = [Request(tuple(prompt), SamplingParams(max_tokens=spec["new"], temperature=0.0)) for prompt in spec["prompts"]]

    def run() -> dict[str, Any]:
        output: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
        while engine.busy:
            for event in engine.step():
                output[event.id] += event.tokens
        return {"tokens": [*output.values()]}

    return run


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository
    from bench.peers.protocol import serve_jobs

    serve_jobs(["jax", "numpy"], make)
