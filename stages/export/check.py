"""What is read back from an export, beside what was meant: logits, tokens, and what ends a completion."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.model.paths import leaf_paths, map_paths, merge, unflatten
from engine.model.transformer import forward
from engine.model.weights.lora import LoRA
from engine.model.weights.matmul import dense
from engine.storage.find import load_model
from engine.storage.huggingface.peft import load_peft
from engine.storage.loaded_model import LoadedModel
from engine.text.tokenizer import load_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.", "  two spaces\tand a tab\n\n\nand lines", "In 1969, 12345 people; 3.14159!",
    "naïve café, 日本語, Ελληνικά, 🙂", "def f(x):\n    return x ** 2  # <|endoftext|> <|im_end|> is text", "don't I'LL we've",
)  # fmt: skip
ROWS, LENGTH = 2, 64  # tokens whose logits are compared
CLOSE = 1e-3  # of the largest logit: what the order of float32 sums may change


def compare(model: LoadedModel, out: Path, dtype: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(what was found, in rows to print; what differs, a sentence each) of the export at `out` of `model`."""
    read = load_model(str(out), dtype="float32")
    faults = [f"{name} of the architecture" for name in model.cfg.same_architecture(read.cfg)]
    faults += [f"the tokens of {text!r}" for text in TEXTS if _tokens(model, text) != _tokens(read, text)]
    faults += ["what ends a completion"] if model.ends != read.ends else []
    faults += ["what is put before a text"] if model.tokenizer.start != read.tokenizer.start else []
    faults += ["the chat template"] if model.chat_template != read.chat_template else []
    rows = [
        ("tokens", f"{len(TEXTS)} texts, of every script and with control tokens in them"),
        ("ends", f"{', '.join(map(str, read.ends))} and template {'kept' if read.chat_template else 'absent'}"),
    ]
    if faults:
        return rows, faults
    cfg = dataclasses.replace(model.cfg, dtype="float32", context=read.cfg.context)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (ROWS, min(LENGTH, cfg.context)), np.int32)
    meant = _logits(cfg, map_paths(lambda path, leaf: _rounded(path, leaf, dtype, out), model.params), tokens)
    found = _logits(cfg, read.params, tokens)
    apart = float(np.abs(meant - found).max() / max(1e-30, np.abs(meant).max()))
    agree = float((meant.argmax(-1) == found.argmax(-1)).mean())
    rows.append(("logits", f"{apart:.1e} of the largest apart; the most probable token agrees in {agree:.1%} of places"))
    if apart > CLOSE:
        faults.append("the logits")
    return rows, faults


def compare_adapter(model: LoadedModel, out: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """As `compare`, of adapters in PEFT's layout: the pairs to the bit, and what they make of the base with its logits."""
    leaves = leaf_paths(model.params)
    meant = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRA)}
    read = leaf_paths(load_peft(out, model.cfg))
    tokenizer = load_tokenizer(out)
    faults = [f"the tokens of {text!r}" for text in TEXTS if _tokens(model, text) != tokenizer.encode(text).tolist()]
    faults += ["the chat template"] if model.chat_template != tokenizer.config.get("chat_template") else []
    for path in sorted(meant.keys() ^ read.keys()):
        faults.append(f"whether {path} is adapted")
    for path in sorted(meant.keys() & read.keys()):
        ours, theirs = meant[path], read[path]
        same = ours.columns == theirs.columns and math.isclose(ours.scale, theirs.scale)
        if not (same and np.array_equal(ours.a, theirs.a) and np.array_equal(ours.b, theirs.b)):
            faults.append(f"the adapter of {path}")
    rows = [("adapters", f"of {len(read)} matrices, to the bit"), ("tokens", f"{len(TEXTS)} texts, and the chat template")]
    if faults:
        return rows, faults
    cfg = dataclasses.replace(model.cfg, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (ROWS, min(LENGTH, cfg.context)), np.int32)
    base = unflatten({path: getattr(leaf, "base", leaf) for path, leaf in leaves.items()})
    apart = np.abs(_logits(cfg, model.params, tokens) - _logits(cfg, merge(unflatten(read), base), tokens)).max()
    rows.append(("logits", f"{apart:.1e} apart, on the base"))
    return rows, [] if apart == 0 else ["the logits"]


def _tokens(model: LoadedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text).tolist()


def _rounded(path: str, leaf: Any, dtype: str, out: Path) -> Any:
    """A weight as the export holds it, in float32."""
    plain = dense(leaf)
    if dtype == "q8_0":
        return _in_blocks(plain if path == "embed" else plain.T, path != "embed") if plain.ndim == 2 else plain
    return plain if out.suffix == ".gguf" and plain.ndim < 2 else plain.astype(dtype).astype(jnp.float32)


def _in_blocks(rows: Any, turned: bool) -> Any:
    """A matrix as (out, in) rounded to Q8_0, or to float16 where its rows are no whole blocks, and as our tree has it."""
    kind = GGMLQuantizationType.Q8_0
    if rows.shape[1] % GGML_QUANT_SIZES[kind][0]:
        rounded = np.asarray(rows, np.float16).astype(np.float32)
    else:
        rounded = quants.dequantize(quants.quantize(np.asarray(rows, np.float32), kind), kind)
    return jnp.asarray(rounded.T if turned else rounded)


def _logits(cfg: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(jax.jit(forward, static_argnums=0)(cfg, params, tokens, positions)[0])
