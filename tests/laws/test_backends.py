"""Engines of different backends in one process: each runs, counts and lowers its own programs, as in a process of its own."""

import functools
import json
import os
import subprocess
import sys

import pytest

from bench.cli import ROOT
from engine.counting.jaxpr import jaxpr_cost
from engine.inference.backend import ByXla, InC
from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.runner import idle_programs
from engine.model.native.library import native_problem
from tests.tiny import lively_params, request_of, tiny_config, tokens_of

BACKENDS = {"InC": InC(), "ByXla": ByXla()}


def run_backend(name: str) -> dict[str, object]:
    """Returns an engine's completions with the bits of their log-probabilities, the text of each
    program, and the FLOPs of those that read prompts.
    """
    cfg = tiny_config()
    params = prepare_params(cfg, lively_params(cfg))
    config = EngineConfig(3, 48, kv_dtype="float32", chunk=16, tail=4, backend=BACKENDS[name])
    engine = Engine(cfg, params, config)
    state = engine.runner.segments, engine.runner.counts, engine.runner.stacks
    programs = idle_programs(cfg, config, params, *state)
    flops = {}
    for size in ("prefill_chunk", "prefill_tail"):
        _, *arguments = programs[size].arguments
        flops[size] = jaxpr_cost(functools.partial(programs[size].function, cfg), *arguments).matmul
    texts = {each: program.function.lower(*program.arguments).as_text() for each, program in programs.items()}
    for seed in range(3):
        engine.submit(request_of(tokens_of(seed, 9 + 5 * seed), 12, temperature=1.0, seed=seed, logprobs=1))
    completions = []
    while engine.busy:
        for event in engine.step():
            logprobs = [logprob.hex() for _, logprob, _ in event.logprobs]
            completions.append([event.id, [int(token) for token in event.tokens], logprobs])
    return {"texts": texts, "flops": flops, "completions": completions}


def run_process(*names: str) -> list[dict[str, object]]:
    """Returns what `run_backend` does for each name in turn, in a process of its own."""
    program = (
        "import json, sys; from tests.laws.test_backends import run_backend; "
        "print(json.dumps([run_backend(name) for name in sys.argv[1:]]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *names]
    ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(ended.stdout)


@pytest.mark.law("determinism")
def test_backends_in_one_process_are_those_of_processes_of_their_own():
    if problem := native_problem():
        pytest.skip(f"There is one backend here, for {problem}")
    [in_c] = run_process("InC")
    [by_xla] = run_process("ByXla")
    assert in_c["texts"]["decode"] != by_xla["texts"]["decode"]
    assert all([*in_c["flops"].values(), *by_xla["flops"].values()])
    assert run_process("InC", "ByXla", "InC") == [in_c, by_xla, in_c]
