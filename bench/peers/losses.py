"""Trains one model by each objective, ours and TRL's, on the same tokens in order; compares the losses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import Json
from bench.models import PROGRESS, random_model
from bench.peers.process import Peer, PeerError
from bench.terminal import progress
from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.storage import huggingface
from engine.text.chat_tokenizer import Example
from engine.text.conversations import Conversation, read_conversations
from engine.text.examples import Pair, RatedPair, Rating, mismatch
from engine.text.packing import example_rows
from engine.text.tokenizer import ModelTokenizer, byte_tokenizer
from engine.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from engine.training.preference import (
    LOSSES,
    answer_logprobs,
    pair_logprobs,
    preference_batch,
    preference_objective,
)
from engine.training.step import NEXT_TOKEN, init_state, train_step

STEPS = 20
ROWS = 4  # of a step
TOKENS = 96  # of a row at most
MOST_APART = 1e-4  # nats, at any step
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup=0.0, beta2=0.99, weight_decay=0.0)
CONFIG = ModelConfig(
    vocab=260,
    width=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ff=96,
    context=TOKENS,
    tied=True,
    dtype="float32",
)


def compare_losses(peer: Peer, folder: Path) -> list[Json]:
    """Prints and returns a row an objective: its losses, TRL's, and the largest difference, which
    has a bar of MOST_APART.

    `last_inputs`, of which the last of TRL's losses is one, are what
    `tests/training/test_preference.py` has of TRL. `folder`: for files that the peer reads. Raises
    UserError when the peer cannot.
    """
    model = random_model("random", CONFIG)
    tokenizer = byte_tokenizer()
    huggingface.save_folder(
        folder, CONFIG, model.params, ModelTokenizer(tokenizer, (tokenizer.eos_id,), {}), dtype="float32"
    )
    rows = []
    for objective in ("answers", *LOSSES):
        progress(f"training by {objective}")
        steps = [_pairs(step, objective) for step in range(STEPS)]
        file = folder / f"{objective}.json"
        file.write_text(json.dumps([_peer_rows(objective, pairs) for pairs in steps]))
        spec = {
            "objective": objective,
            "model": str(folder),
            "file": str(file),
            "threads": 1,
            "clip": OPTIMIZER.clip,
            "beta": LOSSES[objective].beta if objective in LOSSES else None,
            "beta2": OPTIMIZER.beta2,
            "learning_rate": OPTIMIZER.learning_rate * float(make_schedule(OPTIMIZER)(jnp.float32(PROGRESS))),
        }
        try:
            peer.ask(make=objective, spec=spec)
            theirs = peer.ask(run=objective)["losses"]
        except PeerError as error:
            raise UserError(f"TRL, {objective}: {error}") from None
        ours, inputs = _train(objective, model.params, steps)
        apart = float(np.abs(np.subtract(ours, theirs)).max())
        is_same = apart <= MOST_APART
        rows.append(
            {
                "name": f"losses_{objective}",
                "apart": apart,
                "bar": MOST_APART,
                "same": is_same,
                "losses": ours,
                "peer_losses": theirs,
                "last_inputs": inputs,
            }
        )
        line = f"{objective:<8} {STEPS} steps, {ours[0]:.4f} -> {ours[-1]:.4f}; "
        line += f"TRL {theirs[-1]:.4f}, at most {apart:.1e} apart"
        if not is_same:
            line += "   ** not met **"
        print(line, flush=True)
    return rows


def _pairs(step: int, objective: str) -> list[Pair] | list[RatedPair]:
    """Returns the ROWS pairs of a step; for KTO of an answer, chosen and rejected in turns, and a
    mismatched one.

    TRL's ORPO has the prompt in the chosen answer's loss, and takes the mean over all tokens of the
    batch; the paper, and ours, the mean over answers. It gets prompts of one token and chosen
    answers of one length, by which both are the same.
    """
    tokenizer = byte_tokenizer()
    records = [
        record for record in read_conversations("voice-preferences") if isinstance(record, Conversation)
    ]
    pairs = []
    alike = objective == "orpo"
    for row in range(ROWS):
        record = records[(step * ROWS + row) % len(records)]
        question, chosen = (message["content"] for message in record.messages[-2:])
        prompt = tokenizer.encode(question)[: 1 if alike else 30]
        good = tokenizer.encode(chosen)[: 40 if alike else 40 + row]
        bad = tokenizer.encode(record.rejected or "")[: 60 - row]
        pairs.append(Pair(_example(prompt, good), _example(prompt, bad)))
    if objective != "kto":
        return pairs
    ratings = [Rating(pair[row % 2], row % 2 == 0) for row, pair in enumerate(pairs)]
    return mismatch(ratings, TOKENS)


def _example(prompt: np.ndarray, answer: np.ndarray) -> Example:
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), "")


def _peer_rows(objective: str, pairs: Sequence[Any]) -> list[Json]:
    """Returns the rows of a batch as the collator of TRL's trainer takes them."""

    def prompt(example: Example) -> list[int]:
        return example.tokens[~example.mask].tolist()

    def answer(example: Example) -> list[int]:
        return example.tokens[example.mask].tolist()

    def whole(example: Example) -> Json:
        labels = np.where(example.mask, example.tokens, -100)
        return {"input_ids": example.tokens.tolist(), "labels": labels.tolist()}

    if objective == "answers":
        return [whole(chosen) for chosen, _ in pairs]
    if objective == "kto":
        return [
            {
                "prompt_ids": prompt(own),
                "completion_ids": answer(own),
                "KL_completion_ids": answer(other),
                "label": is_good,
            }
            for own, other, is_good in pairs
        ]
    if objective == "dpo":
        return [
            {"prompt_ids": prompt(chosen), "chosen_ids": answer(chosen), "rejected_ids": answer(rejected)}
            for chosen, rejected in pairs
        ]
    rows = []
    for chosen, rejected in pairs:
        parts = {
            "chosen": whole(chosen),
            "rejected": whole(rejected),
            "prompt": {"input_ids": prompt(chosen)},
        }
        for part in parts.values():
            part["attention_mask"] = [1] * len(part["input_ids"])
        row: Json = {}
        for name, part in parts.items():
            row |= {f"{name}_{field}": value for field, value in part.items()}
        rows.append(row)
    return rows


def _train(objective: str, params: Json, steps: Sequence[Sequence[Any]]) -> tuple[list[float], Json]:
    """Returns our loss at each step, and the log-probabilities of which a loss of LOSSES makes the
    last.
    """
    tx = make_optimizer(OPTIMIZER)
    losses = list[float]()
    inputs = Json()
    state = init_state(tx, jax.tree.map(jnp.copy, params))
    if objective == "answers":
        loss = NEXT_TOKEN
    else:
        loss = preference_objective(objective)
    for pairs in steps:
        if objective == "answers":
            batch: Any = example_rows([pair.answer for pair in pairs], TOKENS)
        else:
            batch = preference_batch(pairs, range(ROWS), TOKENS, np.zeros((ROWS, 2)))
            batch = batch._replace(reference=pair_logprobs(CONFIG, params, batch))
            inputs = (
                batch._asdict() | answer_logprobs(CONFIG, state.trainable, batch, head_trains=False)._asdict()
            )
        state, metrics = train_step(CONFIG, tx, state, {}, batch, jnp.float32(PROGRESS), 1, loss)
        losses.append(float(metrics.loss))
    names = ("chosen", "rejected", "chosen_mean", "rejected_mean", "reference", "value")
    return losses, {name: np.asarray(inputs[name]).tolist() for name in names if inputs.get(name) is not None}
