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
ROWS, LENGTH = 2, 64  # tokens whose logits are compared
CLOSE = 1e-3  # of the largest logit: what the order of float32 sums may change
Report = tuple[list[tuple[str, str]], list[str]]


def compare(model: LoadedModel, out: Path, dtype: str) -> Report:
    """Returns (rows to print, differences with a sentence each) of the export at `out` of `model`."""
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
    cfg = dataclasses.replace(model.cfg, dtype="float32", context=export.cfg.context)
    wanted = _logits(cfg, map_paths(lambda path, leaf: _rounded(path, leaf, dtype, out), model.params))
    logits = _logits(cfg, export.params)
    apart = float(np.abs(wanted - logits).max() / max(1e-30, np.abs(wanted).max()))
    agree = float((wanted.argmax(-1) == logits.argmax(-1)).mean())
    rows.append(("logits", f"{apart:.1e} of the largest apart; the most probable token agrees in {agree:.1%} of places"))
    return rows, ["the logits"] if apart > CLOSE else []


def compare_adapter(model: LoadedModel, out: Path) -> Report:
    """As `compare`, of adapters in PEFT's layout: the pairs to the bit, and the logits of the base with them on it."""
    leaves = leaf_paths(model.params)
    wanted = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRA)}
    adapters = leaf_paths(load_adapter(out, model.cfg).params)
    faults = _tokenizer_faults(model.tokenizer, load_tokenizer(out))
    faults += [f"whether {path} is adapted" for path in sorted(wanted.keys() ^ adapters.keys())]
    for path in sorted(wanted.keys() & adapters.keys()):
        ours, theirs = wanted[path], adapters[path]
        same = ours.columns == theirs.columns and math.isclose(ours.scale, theirs.scale)
        if not (same and np.array_equal(ours.a, theirs.a) and np.array_equal(ours.b, theirs.b)):
            faults.append(f"the adapter of {path}")
    rows = [("adapters", f"of {len(adapters)} matrices, to the bit"), ("tokens", f"{len(TEXTS)} texts, and the chat template")]
    if faults:
        return rows, faults
    cfg = dataclasses.replace(model.cfg, dtype="float32")
    base = without_adapters(model.params)
    apart = np.abs(_logits(cfg, model.params) - _logits(cfg, merge(unflatten(adapters), base))).max()
    rows.append(("logits", f"{apart:.1e} apart, on the base"))
    return rows, [] if apart == 0 else ["the logits"]


def _tokenizer_faults(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    faults = [f"the tokens of {text!r}" for text in TEXTS if not np.array_equal(ours.encode(text), theirs.encode(text))]
    same = ours.config.get("chat_template") == theirs.config.get("chat_template")
    return faults if same else [*faults, "the chat template"]


def _rounded(path: str, leaf: Any, dtype: str, out: Path) -> Any:
    """Returns a weight as the export holds it, in float32."""
    plain = dense(leaf)
    if dtype == "q8_0":
        return _round_to_blocks(plain if path == "embed" else plain.T, path != "embed") if plain.ndim == 2 else plain
    return plain if out.suffix == ".gguf" and plain.ndim < 2 else plain.astype(dtype).astype(jnp.float32)


def _round_to_blocks(rows: Any, transposed: bool) -> Any:
    """Returns a matrix (out, in) rounded to Q8_0, or to float16 where its rows are no whole blocks; `transposed`: (in, out)."""
    kind = GGMLQuantizationType.Q8_0
    if rows.shape[1] % GGML_QUANT_SIZES[kind][0]:
        rounded = np.asarray(rows, np.float16).astype(np.float32)
    else:
        rounded = quants.dequantize(quants.quantize(np.asarray(rows, np.float32), kind), kind)
    return jnp.asarray(rounded.T if transposed else rounded)


def _logits(cfg: ModelConfig, params: Any) -> np.ndarray:
    """Logits (B, T, V) of the same random tokens each time."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (ROWS, min(LENGTH, cfg.context)), np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(jax.jit(forward, static_argnums=0)(cfg, params, tokens, positions)[0])
