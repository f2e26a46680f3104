"""What whole numbers cost a model: bits per byte of a text with int8 weights, and with int8 keys and values.

    python -m bench.quantisation                        smollm2-135m-instruct on 48 kB of held-out plays
    python -m bench.quantisation --model runs/NAME --size 0       a run of your own, on all of them
    python -m bench.quantisation --leaves               each kind of matrix alone as well: which ones cost most

All ways read the same windows of the same text, so a difference between them is theirs and not the text's. The error of
the round trip is told for each kind of matrix, and for each path in the last line, which is JSON.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.cli import run
from engine.device import start_jax
from engine.errors import UserError

CHUNK = 128  # tokens read at once where keys and values are kept
ALLOWED = 0.01  # of the bits per byte


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured, and on which text."""

    model: str = "smollm2-135m-instruct"
    """A run folder, a Hugging Face folder, a .gguf file or smollm2-135m-instruct."""
    text: Path | None = None
    """A file of text; by default the two plays that no run trains on."""
    size: int = 48_000
    """Bytes of it to read, from its start; 0 reads all."""
    window: int = 512
    """Tokens a window, at most the model's context; each is read once."""
    rows: int = 4
    """Windows read together."""
    leaves: bool = False
    """Each kind of matrix alone, too."""


def measured(flags: Flags) -> dict[str, Any]:
    """Measures, prints the tables and returns the document."""
    if flags.window < CHUNK or flags.rows < 2 or flags.size < 0:
        raise UserError(f"--window must be at least {CHUNK}, --rows at least 2, and --size 0 or more.")
    start_jax()
    from bench.models import loaded
    from engine.inference.decode import for_inference
    from engine.inference.quantize import every_product, quantize, round_trips
    from engine.storage.assets import fetch

    model = loaded(flags.model)
    cfg, params = model.cfg, model.params
    file = flags.text or fetch("shakespeare")["validation"]
    text = file.read_bytes()[: flags.size or None].decode("utf-8", "ignore")
    tokens, size = model.tokenizer.encode(text), len(text.encode())
    seq = min(flags.window, cfg.context) // CHUNK * CHUNK
    if len(tokens) < 2 or seq == 0:
        raise UserError(f"{file} is too short to be read, or the model's context of {cfg.context} is.")
    print(f"{model.name}: {size:,} bytes of {file.name}, {len(tokens):,} tokens, windows of {seq}")
    batches = _windows(tokens, seq, flags.rows)
    small = quantize(params)
    only = quantize(params, every_product(params, "full"))
    ways = {cfg.dtype: params, "int8 weights, int8 activations": small, "int8 weights only": only}
    if flags.leaves:
        for kind in ("qkv", "out", "gate_up", "down", "head"):
            pattern = rf"blocks/\d+/{kind}" if kind != "head" else "embed" if cfg.tied else "head"
            ways[f"only {kind} in int8"] = quantize(params, [(pattern, "int8")])
    rows: list[dict[str, Any]] = []
    for name, weights in ways.items():
        _row(rows, name, _nats(cfg, for_inference(cfg, weights), batches), size)
    kept = _kept(cfg, for_inference(cfg, params), batches, seq)
    for name, (nats, error) in kept.items():
        _row(rows, f"keys and values in {name}", nats, size, error)
    both = _kept(cfg, for_inference(cfg, small), batches, seq)["int8"]
    _row(rows, "int8 weights, activations, keys and values", *both[:1], size)
    errors = round_trips(params, small)
    _show_round_trips(errors)
    return {
        "model": model.name, "text": file.name, "bytes": size, "tokens": len(tokens), "window": seq, "allowed": ALLOWED,
        "rows": rows, "round_trip": {path: error._asdict() for path, error in errors.items()},
    }  # fmt: skip


def _row(rows: list[dict[str, Any]], name: str, nats: float, size: int, error: float | None = None) -> None:
    """Adds a row and prints it; the first one is what the others are over."""
    bits = nats / np.log(2) / size
    over = bits / rows[0]["bits_per_byte"] - 1 if rows else 0.0
    rows.append({"name": name, "bits_per_byte": float(bits), "over": float(over), "within": bool(over <= ALLOWED)})
    if error is not None:
        rows[-1]["logits_error"] = error
    tail = "" if error is None else f"   logits {error:.4f} off, of their spread"
    print(f"{name:>46} {bits:8.4f} bits/byte {over:+8.2%}{tail}", flush=True)


def _windows(tokens: np.ndarray, seq: int, rows: int) -> list[Any]:
    from engine.text.batches import evaluation_windows

    return list(evaluation_windows(tokens, seq, seq, rows))


def _nats(cfg: Any, params: Any, batches: Sequence[Any]) -> float:
    """Summed nats of all targets, read without a cache."""
    from engine.inference.score import score

    return sum(float(score(cfg, params, batch)) for batch in batches)


def _kept(cfg: Any, params: Any, batches: Sequence[Any], seq: int) -> dict[str, tuple[float, float]]:
    """{kind: (summed nats, error of the logits)} read CHUNK by CHUNK, keys and values kept as bfloat16 and as int8.

    The error is against keys and values kept in float32: root mean square, over that of the logits around their mean.
    """
    import jax
    import jax.numpy as jnp

    from engine.model.cache.segmented import Kind, Rows, make_spans, span_cache
    from engine.model.transformer import forward

    kinds: tuple[Kind, ...] = ("float32", "bfloat16", "int8")
    empty = [make_spans(cfg, len(batches[0].tokens), seq, CHUNK, kind) for kind in kinds]

    @jax.jit
    def read(params: Any, held: Any, batch: Any, start: Any) -> Any:
        cut = lambda field: jax.lax.dynamic_slice_in_dim(field, start, CHUNK, 1)
        tokens, targets, mask = cut(batch.tokens), cut(batch.targets), cut(batch.mask)
        own = jnp.arange(len(tokens))
        rows = Rows(jnp.full(len(tokens), start), own, own)
        done: list[Any] = []
        sums: list[Any] = []
        exact = jnp.zeros(())
        for spans in held:
            positions = start + jnp.broadcast_to(jnp.arange(CHUNK), tokens.shape)
            logits, cache = forward(cfg, params, tokens, positions, span_cache(spans, rows))
            exact = exact if sums else logits
            told = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
            off = jnp.where(mask, ((logits - exact) ** 2).sum(-1), 0).sum()
            done.append(cache.spans)
            sums.append(jnp.stack([-jnp.where(mask, told, 0).sum(), off]))
        spread = ((exact - exact.mean(-1, keepdims=True)) ** 2).sum(-1)
        return done, jnp.stack(sums), jnp.where(mask, spread, 0).sum()

    total, spread = np.zeros((len(kinds), 2)), 0.0
    for batch in batches:
        held: Any = empty
        for start in range(0, seq, CHUNK):
            held, sums, more = read(params, held, batch, jnp.int32(start))
            total, spread = total + np.asarray(sums, np.float64), spread + float(more)
    return {kind: (float(nats), float(np.sqrt(off / spread))) for kind, (nats, off) in zip(kinds, total)}


def _show_round_trips(errors: dict[str, Any]) -> None:
    """The worst of each kind of matrix."""
    print(f"{'round trip of':>46} {'error, rms of rms':>18} {'worst leaf':>30}")
    kinds: dict[str, dict[str, Any]] = {}
    for path, error in errors.items():
        kinds.setdefault(path.rpartition("/")[2], {})[path] = error
    for kind, leaves in kinds.items():
        worst = max(leaves, key=lambda path: leaves[path].relative)
        mean = np.mean([error.relative for error in leaves.values()])
        print(f"{kind:>46} {mean:18.4f} {worst:>20} {leaves[worst].relative:.4f}")


def main(args: Sequence[str] | None = None) -> int:
    return run("bench.quantisation", __doc__, Flags, measured, args)


if __name__ == "__main__":
    sys.exit(main())
