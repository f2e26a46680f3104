"""Inference over several devices: the same tokens, bits that depend on a request alone, and weights that stay as they are.

A process has one device unless its environment says otherwise, so a child process with three does
the work.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = 3


def wide_config(**changes):
    """Three devices divide its 6 heads, 3 key heads, width and MLP."""
    from tests.tiny import tiny_config

    return tiny_config(**{"width": 24, "ff": 36, "qkv_bias": True, **changes})


def complete(engine, prompts):
    """Returns the sampled tokens of each prompt, and their log-probabilities as hex."""
    from engine.inference.request import Request, SamplingParams

    sampling = [
        SamplingParams(max_tokens=12, temperature=0.9, seed=row, logprobs=2) for row in range(len(prompts))
    ]
    texts = {engine.submit(Request(prompt, params)): ([], []) for prompt, params in zip(prompts, sampling)}
    while engine.busy:
        for event in engine.step():
            texts[event.id][0].extend(event.tokens)
            texts[event.id][1].extend(logprob.logprob.hex() for logprob in event.logprobs)
    return list(texts.values())


def facts_of(weights, tied):
    """Runs one model on one device and on three; returns what must be true, and the largest share
    of a device.
    """
    import jax
    import numpy as np

    from engine.counting.xla import CompileCounter
    from engine.device import host_memory
    from engine.inference.config import EngineConfig
    from engine.inference.decode import prepare_params
    from engine.inference.engine import Engine
    from engine.mesh import layout
    from engine.model.weights.int8 import quantize
    from engine.storage.digest import digest
    from tests.tiny import lively_params

    cfg = wide_config(tied=tied)
    params = lively_params(cfg)
    prepared = prepare_params(cfg, quantize(params) if weights == "int8" else params)
    prompts = [
        tuple(np.random.default_rng(row).integers(0, cfg.vocab, 5 + 9 * row).tolist()) for row in range(3)
    ]
    kv_dtype = "int8" if weights == "int8" else "float32"

    def make(params):
        config = EngineConfig(3, kv_dtype=kv_dtype, prefix_cache_bytes=10**6, chunk=16, tail=8)
        return Engine(cfg, params, config)

    # In int8 a last bit of attention, which sums in another order, can become a whole step of the
    # next rounding.
    one = complete(make(prepared), prompts) if weights == "float32" else None
    with jax.set_mesh(layout.make_inference_mesh(f"tensor={DEVICES}")):
        with host_memory(True):
            waiting = prepare_params(cfg, quantize(params) if weights == "int8" else params, whole=False)
        placed = layout.place(waiting)
        before, engine = digest(placed), make(placed)
    if weights == "int8":
        engine.warm()
    compiles = CompileCounter()
    compiles.reset()
    together, lone = complete(engine, prompts), complete(engine, prompts[:1])
    shares = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed)]
    keys = jax.tree.leaves(engine.runner.segments.k)[0]
    sampled = lambda completions: [tokens for tokens, _ in completions]
    return {
        "sampled tokens are those of one device": not one or sampled(one) == sampled(together),
        "one device makes the weights that are placed": {
            len(leaf.devices()) for leaf in jax.tree.leaves(waiting)
        }
        == {1},
        "neighbours change no bit": together[0] == lone[0],
        "nothing compiles after warm": weights != "int8" or compiles.count == 0,
        "weights are unchanged": digest(engine.params) == before and engine.params is placed,
        "each device holds its key heads": keys.addressable_shards[0].data.shape[1]
        == cfg.kv_heads // DEVICES,
    }, sum(shares) / sum(leaf.nbytes for leaf in jax.tree.leaves(placed))


def child(folder):
    """Prints the facts of each model, and before them the output of commands if a folder is given."""
    results = {"float32, tied": facts_of("float32", True)}
    if folder:
        results["int8"] = facts_of("int8", False)
        run_commands(folder)
    print(json.dumps(results))


def run_commands(folder):
    from stages.evaluate import __main__ as evaluate
    from stages.generate import main
    from tests.text.chat_models import save_chat_model

    save_chat_model(folder, width=24, ff=36)
    words = [
        "--model",
        str(folder),
        "--prompt",
        "Hello",
        "--max-tokens",
        "9",
        "--temperature",
        "0",
        "--verbose",
    ]
    for mesh in (
        [],
        ["--mesh", "tensor=3"],
        ["--mesh", "tensor=2"],
        ["--mesh", "fsdp=3"],
        ["--mesh", "tensor=4"],
    ):
        print("---", *mesh, flush=True)
        print("exit", main([*words, *mesh]), flush=True)
    (text := folder / "sea.txt").write_text("Ships with red sails lay at anchor. " * 20)
    for mesh in ([], ["--mesh", "tensor=3"], ["--mesh", "fsdp=3"]):
        print("---", flush=True)
        print(
            "exit",
            evaluate.main(["--model", str(folder), "--data", str(text), "--context", "16", *mesh]),
            flush=True,
        )


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory):
    arguments = []
    if any(item.get_closest_marker("whole") for item in request.session.items):
        arguments = [tmp_path_factory.mktemp("mesh")]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.law("sharding equivalence")
@pytest.mark.parametrize("name", ["float32, tied", pytest.param("int8", marks=pytest.mark.whole)])
def test_a_mesh_computes_what_one_device_does(outcome, name):
    facts, share = json.loads(outcome.splitlines()[-1])[name]
    assert [fact for fact, holds in facts.items() if not holds] == []
    assert share < 0.48  # a third, and scales, gains and biases, which every device has


@pytest.mark.whole
def test_the_command_takes_a_mesh_or_says_why_not(outcome):
    alone, three, two, fsdp, four = outcome.split("---")[1:6]
    # One device packs the weights for its kernels, a mesh does not: their digests differ.
    settings_of_each = "(model|device|weights|digest) .*|.* tokens, .*"
    text = lambda output: re.sub(settings_of_each, "", output.partition("exit 0")[0])
    assert "weights unchanged" in three
    assert text(alone).split() == text(three).removeprefix(" --mesh tensor=3").split()
    for refused, reason in (
        (two, "tensor may be 1 or 3"),
        (fsdp, "along tensor alone"),
        (four, "there are 3"),
    ):
        assert "exit 2" in refused
        assert reason in refused


@pytest.mark.whole
def test_an_evaluation_on_a_mesh_prints_the_same_numbers(outcome):
    alone, *meshes = (re.findall("(?m)^(?:tokens|nats|bits) .*", part) for part in outcome.split("---")[6:9])
    assert len(alone) == 3, outcome
    assert meshes == [alone, alone]


if __name__ == "__main__":
    child(Path(sys.argv[1]) if sys.argv[1:] else None)
