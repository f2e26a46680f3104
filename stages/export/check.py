"""Compares an export, read back, with the model it was written from: logits, tokens, and what ends a completion."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths, map_paths, merge, unflatten
from engine.model.transformer import forward
from engine.model.weights.lora import LoRA
from engine.model.weights.matmul import dense
from engine.storage.adapter import load_adapter, without_adapters
from engine.storage.find import load_model
from engine.storage.loaded_model import LoadedModel
from engine.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.", "  two spaces\tand a tab\n\n\nand lines", "In 1969, 12345 people; 3.14159!",
    "naïve café, 日本語, Ελληνικά, 🙂", "def f(x):\n    return x ** 2  # <|endoftext|> <|im_end|> is text", "don't I'LL we've",
)  # fmt: skip
CLOSE = 1e-3  # of the largest logit: what the order of float32 sums may change
Report = tuple[list[tuple[str, str]], list[str]]  # rows to print, and what differs


def compare(model: LoadedModel, out: Path, dtype: str) -> Report:
    """Compares the export at `out` with `model`, its weights rounded as in the export."""
    export = load_model(str(out), dtype="float32")
    faults = [f"{name} of the architecture" for name in model.cfg.same_architecture(export.cfg)]
    faults += _tokenizer_faults(model.tokenizer, export.tokenizer)
    faults += ["what ends a completion"] if model.ends != export.ends else []
    faults += ["what is put before a text"] if model.tokenizer.start != export.tokenizer.start else []
    rows = [
        ("tokens", f"{len(TEXTS)} texts, of every script and with control tokens in them"),
        ("ends", f"{', '.join(map(str, export.ends))} and template {'kept' if export.chat_template else 'absent'}"),
    ]
    if faults:
        return rows, faults
    cfg = dataclasses.replace(model.cfg, context=export.cfg.context)
    wanted = _logits(cfg, map_paths(lambda path, leaf: _rounded(path, leaf, dtype, out), model.params))
    logits = _logits(cfg, export.params)
    apart = float(np.abs(wanted - logits).max() / max(1e-30, np.abs(wanted).max()))
    agree = float((wanted.argmax(-1) == logits.argmax(-1)).mean())
    rows.append(("logits", f"{apart:.1e} of the largest apart; the most probable token agrees in {agree:.1%} of places"))
    return rows, ["the logits"] if apart > CLOSE else []


def compare_adapter(model: LoadedModel, out: Path) -> Report:
    """As `compare`, of adapters in PEFT's layout: the pairs to the bit, and the logits of the base with them on it."""
    ours = {path: leaf for path, leaf in leaf_paths(model.params).items() if isinstance(leaf, LoRA)}
    theirs = leaf_paths(load_adapter(out, model.cfg).params)
    faults = _tokenizer_faults(model.tokenizer, load_tokenizer(out))
    faults += [f"whether {path} is adapted" for path in sorted(ours.keys() ^ theirs.keys())]
    faults += [
        f"the adapter of {path}" for path in sorted(ours.keys() & theirs.keys()) if not _is_same(ours[path], theirs[path])
    ]
    rows = [("adapters", f"of {len(theirs)} matrices, to the bit"), ("tokens", f"{len(TEXTS)} texts, and the chat template")]
    if faults:
        return rows, faults
    on_base = merge(unflatten(theirs), without_adapters(model.params))
    apart = np.abs(_logits(model.cfg, model.params) - _logits(model.cfg, on_base)).max()
    rows.append(("logits", f"{apart:.1e} apart, on the base"))
    return rows, [] if apart == 0 else ["the logits"]


def _is_same(a: LoRA, b: LoRA) -> bool:
    same = a.columns == b.columns and math.isclose(a.scale, b.scale)
    return same and np.array_equal(a.a, b.a) and np.array_equal(a.b, b.b)


def _tokenizer_faults(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    faults = [f"the tokens of {text!r}" for text in TEXTS if not np.array_equal(ours.encode(text), theirs.encode(text))]
    same = ours.config.get("chat_template") == theirs.config.get("chat_template")
    return faults if same else [*faults, "the chat template"]


def _rounded(path: str, leaf: Any, dtype: str, out: Path) -> Any:
    """Returns a weight as the export holds it, in float32."""
    plain = dense(leaf)
    if plain.ndim < 2 and out.suffix == ".gguf":
        return plain
    if dtype != "q8_0":
        return plain.astype(dtype).astype(jnp.float32)
    kind = GGMLQuantizationType.Q8_0
    rows = np.asarray(plain if path == "embed" else plain.T, np.float32)  # (out, in)
    if rows.shape[1] % GGML_QUANT_SIZES[kind][0]:  # no whole blocks
        rounded = rows.astype(np.float16).astype(np.float32)
    else:
        rounded = quants.dequantize(quants.quantize(rows, kind), kind)
    return jnp.asarray(rounded if path == "embed" else rounded.T)


def _logits(cfg: ModelConfig, params: Any) -> np.ndarray:
    """Logits (B, T, V) in float32 of the same random tokens each time."""
    cfg = dataclasses.replace(cfg, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, min(64, cfg.context)), np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(jax.jit(forward, static_argnums=0)(cfg, params, tokens, positions)[0])
