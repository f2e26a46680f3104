"""Shows what learning does to a small model: a text that it reads again and again, how far its weights move.

Letters (bytes) are its tokens. It is trained from random weights on Python's reference, which is on
every machine, and goes on with a few pages of this project's voice, which it reads READINGS times:
that is what fine-tuning all weights is. Both are steps of one program.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.machine import Json
from bench.models import new_state
from bench.timing import paired_ratio
from engine.model.config import PRESETS, ModelConfig
from engine.model.loss import target_losses
from engine.model.paths import array_paths
from engine.model.transformer import init_params
from engine.text.batch import TextBatches, window_batch
from engine.text.conversations import VOICE
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import train_step

READINGS = (1, 2, 4, 8, 16)
ROWS = 8
TOKENS = 128  # of a step
READING_STEPS = 11  # in which the text that is read again is read once
WINDOWS = READING_STEPS * ROWS  # of TOKENS letters, that this text has
LEAST = 4
MOST = READINGS[-1]  # readings that are compared
STEPS = 300  # of pre-training: a tiny model, or one of fewer steps, learns nothing by heart
OPTIMIZER = OptimizerConfig(learning_rate=2e-3)
# the progress at which the schedule has come down to half of the rate, with which the model goes on
HALF_RATE = 0.51
KINDS = {
    "embedding": ("embed",),
    "attention": ("q", "k", "v", "out"),
    "feed-forward": ("gate", "up", "down"),
    "norms": ("attn_norm", "mlp_norm", "q_norm", "k_norm", "norm"),
    "head": ("head",),
}


class Errors(NamedTuple):
    """Nats a letter of each passage: of the text that is read again, and of other pages."""

    text: np.ndarray
    other: np.ndarray


def measure_learning(preset_name: str = "demo", steps: int = STEPS) -> Json:
    """Trains the model and returns its errors, in nats a letter, after each of READINGS, and how
    far its weights moved.

    `text` and `other` are the errors on the text that is read, and on pages of the same voice that
    are not. `over`: the error on the latter after MOST readings over that after LEAST, passage by
    passage. `moved`: the length of the change of all weights of a kind, over their length
    afterwards, by pre-training and by each of READINGS.
    """
    cfg = dataclasses.replace(PRESETS[preset_name], vocab=256, context=TOKENS)
    reference = _letters("\n".join(topics.values()))
    other = _letters(_voice("held_out"))
    text = _letters(_voice("train"))[: WINDOWS * TOKENS + 1]
    tx = make_optimizer(OPTIMIZER)
    first = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    pretrained = _pretrain(cfg, tx, first, reference, steps)
    trained = _copy(pretrained)
    moved = {"pre-training": _moved(_copy(first), trained)}
    errors: dict[int, Errors] = {}  # by how often the text was read
    for reading, params in _read_again(cfg, tx, pretrained, text):
        if reading in READINGS:
            text_errors = _errors(cfg, params, text)
            other_errors = _errors(cfg, params, other)
            errors[reading] = Errors(text_errors, other_errors)
            moved[str(reading)] = _moved(trained, _copy(params))
    # The rule for rounds of times holds for pairs of any kind: here each passage is one.
    most_over_least = paired_ratio(errors[MOST].other.tolist(), errors[LEAST].other.tolist())
    return {
        "letters": len(text),
        "other_letters": len(other),
        "pretrained": steps * ROWS * TOKENS,
        "readings": [*READINGS],
        "text": [float(each.text.mean()) for each in errors.values()],
        "other": [float(each.other.mean()) for each in errors.values()],
        "over": most_over_least._asdict(),
        "moved": moved,
    }


def _pretrain(cfg: ModelConfig, tx: Any, params: Any, letters: np.ndarray, steps: int) -> Any:
    """Returns the weights after so many steps, which are the whole schedule, from a copy of `params`."""
    state = new_state(tx, params)
    batches = TextBatches(letters, TOKENS, ROWS, seed=0)
    for step in range(steps):
        state, _ = train_step(cfg, tx, state, {}, batches.at(step), np.float32(step / steps))
    return state.trainable


def _read_again(cfg: ModelConfig, tx: Any, params: Any, letters: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Trains a copy of `params` on a text of WINDOWS, MOST times; yields after each reading its number,
    from 1, and the weights, which the next reading's first step donates.
    """
    state = new_state(tx, params)
    batches = TextBatches(letters, TOKENS, ROWS, seed=0)
    for reading in range(1, MOST + 1):
        for step in range((reading - 1) * READING_STEPS, reading * READING_STEPS):
            state, _ = train_step(cfg, tx, state, {}, batches.at(step), np.float32(HALF_RATE))
        yield reading, state.trainable


def _voice(name: str) -> str:
    """Returns the turns of a file of the voice as one text."""
    rows = [json.loads(line) for line in (VOICE / f"{name}.jsonl").read_text("utf-8").splitlines()]
    texts = []
    for row in rows:
        texts += [turn["content"] for turn in row["messages"]]
    return "\n\n".join(texts)


def _letters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@jax.jit(static_argnames="cfg")
def _row_losses(cfg: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return target_losses(cfg, params, batch, head_trains=False).mean(1)


def _errors(cfg: ModelConfig, params: Any, letters: np.ndarray) -> np.ndarray:
    """Returns the mean nats a letter of each passage of TOKENS."""
    starts = np.arange(0, len(letters) - TOKENS, TOKENS)
    batch = window_batch(letters, np.add.outer(starts, np.arange(TOKENS)))
    return np.asarray(_row_losses(cfg, params, batch))


def _copy(params: Any) -> dict[str, np.ndarray]:
    """Returns the weights by path, as they are now: a step donates its own."""
    return {path: np.array(leaf) for path, leaf in array_paths(params).items()}


def _length(arrays: Iterable[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(array).sum() for array in arrays)))


def _moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, float]:
    moved = {}
    for kind, names in KINDS.items():
        paths = [path for path in after if path.rpartition("/")[2] in names]
        if paths:
            distance = _length(after[path] - before[path] for path in paths)
            moved[kind] = distance / _length(after[path] for path in paths)
    every = _length(after[path] - before[path] for path in after) / _length(after.values())
    return {"all weights": every, **moved}
