"""Times our `generate` beside transformers', greedy, on the same weights and prompts, one and eight at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.cli import Json, progress
from bench.models import random_model
from bench.peers.process import Peer, PeerError, note_absent
from bench.peers.rows import OURS, SHORT, add_row, comparison
from bench.timing import Timing, measure, noise
from engine.counting.hardware import memory_limit_bytes
from engine.counting.params import count_params
from engine.device import cores
from engine.errors import UserError
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.model.config import ModelConfig, preset
from engine.storage.huggingface.folder import save_folder


def check_preset(preset_name: str, prompt: int, new: int, *, runs: bool) -> None:
    """Raises UserError when the tokens do not fit the preset's context or, if it `runs`, the weights do not fit memory."""
    cfg = preset(preset_name)
    longest = max(prompt + 1, SHORT + new)
    if longest > cfg.context:
        raise UserError(f"{longest} tokens do not fit {preset_name}'s context of {cfg.context}; give fewer --prompt or --new.")
    # Ours and the peer's, each as loaded and as computed.
    needed, limit = 16 * count_params(cfg).total, memory_limit_bytes()
    if needed > limit and runs:
        raise UserError(
            f"--preset {preset_name} twice in memory needs about {needed / 1e9:.0f} GB, and there are {limit / 1e9:.0f}; "
            "give a smaller one, such as smollm2-135m."
        )


def measure_inference(
    preset_name: str, prompt: int, new: int, dtype: Literal["bfloat16", "float32"], rounds: int, peer: Peer, folder: Path,
    rows: list[Json], absent: list[dict[str, str]],
) -> None:  # fmt: skip
    """Adds the rows of a number type to `rows`, or notes in `absent` why there are none.

    A prefill row reads `prompt` tokens and makes one; a decode row reads SHORT tokens and makes `new`. Seconds are the whole
    call's; tokens a second count those read, or those made. `folder`: for files that the peer reads.
    """
    cfg = dataclasses.replace(preset(preset_name), dtype=dtype)
    params = random_model(preset_name, cfg).params
    prompts = np.random.default_rng(1).integers(0, cfg.vocab, (8, max(prompt, SHORT)), np.int32)
    save_folder(folder / "model", cfg, params, {}, dtype="float32")
    weights = for_inference(cfg, params)
    every: dict[str, Timing] = {}
    for name, batch, length, tokens in (
        ("prefill_1", 1, prompt, 1), ("prefill_8", 8, prompt, 1), ("decode_1", 1, SHORT, new), ("decode_8", 8, SHORT, new),
    ):  # fmt: skip
        progress(f"preparing {name}, {dtype}")
        texts = prompts[:batch, :length].tolist()
        spec = {"folder": str(folder / "model"), "dtype": dtype, "threads": cores(), "prompts": texts, "new": tokens}
        output: dict[str, Any] = {}
        ours = greedy(cfg, weights, texts, tokens, output)
        try:
            theirs = peer.prepare("generate", spec, output.update)
        except PeerError as error:
            if peer.gone:
                raise UserError(f"transformers, {dtype}: {error}") from None
            note_absent(absent, f"transformers, {dtype}", str(error), "see the reason")
            break
        report = lambda done, total, name=name: progress(f"{name}, {dtype}: round {done} of {total}")
        timings = measure({OURS: ours, "transformers": theirs}, rounds=rounds, report=report)
        every |= {f"{name} {way}": timing for way, timing in timings.items()}
        row = comparison(f"{name}_{dtype}", "transformers", timings, batch * (length if tokens == 1 else tokens))
        same = float(np.mean(np.array(output[OURS]) == np.array(output["tokens"])))
        add_row(rows, row | {"preset": preset_name, "same_tokens": same}, f"{same:.0%} of the tokens are the same")
        peer.ask(drop="generate")
    if every:
        print(noise(every), flush=True)


def greedy(cfg: ModelConfig, weights: Any, prompts: list[list[int]], new: int, output: dict[str, Any]) -> Callable[[], None]:
    """Returns a call that continues each prompt by `new` tokens and leaves them in `output`."""
    sampling = SamplingParams(max_tokens=new, temperature=0.0).per_row(len(prompts))

    def run() -> None:
        texts: list[list[int]] = [[] for _ in prompts]
        for piece in generate(cfg, weights, prompts, sampling, capacity=len(prompts[0]) + new):
            texts[piece.prompt] += piece.tokens
        output[OURS] = texts

    return run
