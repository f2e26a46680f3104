"""Asks a trained model through the engine: 100 requests, then three that show that none knows of another."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bench.cli import Json
from engine.counting.hardware import clock
from engine.inference.config import SMALL_CHUNK, EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from engine.model.paths import leaf_paths
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel

ASKED, SLOTS, TOKENS = 100, 8, 48
NAMES = ("JULIET", "HAMLET", "MACBETH", "KING", "QUEEN", "FIRST LORD", "CLOWN", "NURSE", "MESSENGER", "DUKE", "ANTONY")
INDEPENDENT = ("The king is dead.\n\nROMEO:\n", "I love thee, Juliet.\n\nROMEO:\n", "The king is well.\n\nROMEO:\n")


def answer_requests(model: LoadedModel, prompt: str) -> Json:
    """Asks ASKED requests, `prompt` the first of them, and compares all weights before and after: by digest and by element.

    The engine computes in float32, so that it holds the weights of the checkpoint, bit for bit. Two of the three requests of
    `independent` are asked side by side; the third is the first with another context.
    """
    cfg, tokenizer = dataclasses.replace(model.cfg, dtype="float32"), model.tokenizer
    most = min(TOKENS, cfg.context // 2)
    config = EngineConfig(SLOTS, cfg.context, kv_dtype="float32", chunk=SMALL_CHUNK, tail=SMALL_CHUNK, short=None)
    engine = Engine(cfg, prepare_params(cfg, model.params, whole=False), config)
    before = {path: np.array(leaf) for path, leaf in leaf_paths(engine.params).items()}
    sha = digest(engine.params)
    engine.warm()

    def request(text: str, seed: int) -> Request:
        tokens = tokenizer.encode(text)[most - cfg.context :]
        return Request(tuple(tokens.tolist()), SamplingParams(max_tokens=most, temperature=0.8, seed=seed))

    prompts = [prompt, *(f"{name}:\n" for name in NAMES)]
    requests = [request(prompts[number % len(prompts)], number) for number in range(ASKED)]
    first, second, edited = (request(text, 0) for text in INDEPENDENT)
    begin = clock()
    answers = complete(engine, requests)
    seconds = clock() - begin
    (alone,) = complete(engine, [first])
    independent = complete(engine, [first, second]) + complete(engine, [edited])
    changed = sum(
        int((np.asarray(leaf).view(np.uint32) != before[path].view(np.uint32)).sum())
        for path, leaf in leaf_paths(engine.params).items()
    )
    position_bytes = config.slot_bytes(cfg, cfg.context) // config.edges[-1]
    positions = [*range(len(first.prompt), len(first.prompt) + len(alone)), engine.used_positions]  # at last it is dropped
    return {
        "asked": ASKED,
        "before": sha,
        "after": digest(engine.params),
        "changed": changed,
        "of": sum(leaf.size for leaf in before.values()),
        "seconds": seconds,
        "tokens": sum(map(len, answers)),
        "answers": [{"prompt": text, "text": tokenizer.decode(tokens)} for text, tokens in zip(prompts, answers)],
        "independent": [
            {"prompt": text, "text": tokenizer.decode(tokens), "edited": text == INDEPENDENT[2]}
            for text, tokens in zip(INDEPENDENT, independent)
        ],
        "same_alone": alone == independent[0],
        "cache_bytes": [position_bytes * position for position in positions],
    }


def complete(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Returns the tokens that answer each request."""
    answers: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            answers[event.id] += event.tokens
    return list(answers.values())
