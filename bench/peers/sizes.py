"""Times three rows of serving beside llama.cpp at three sizes and in four formats, of files that it makes.

At 135 M a ratio is of overheads, at 1 B of memory. Q4_0, Q4_1 and Q8_0 are written here, as
`stages.export` writes them, and Q4_K_M by llama.cpp's own quantizer, from float16. Weights are real
where they are at hand, and random in a published model's shape where not: no speed depends on them.
The files, 6 GB, are kept in the cache's folder `measured`.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import Json
from bench.models import BenchModel, load
from bench.peers.process import Peer, PeerError
from bench.peers.serving import MISTRAL, measure_streams
from bench.terminal import progress
from engine.errors import UserError
from engine.files import atomic_file, cache_folder
from engine.model.config import ModelConfig, preset
from engine.model.paths import unflatten
from engine.model.shapes import leaf_shapes
from engine.processor import cores
from engine.storage.assets import fetch
from engine.storage.gguf_writer import save_gguf, tokenizer_metadata
from engine.storage.model_loader import peek_model
from engine.text.tokenizer import Tokenizer

REAL = "smollm2-135m-instruct"
# by their number of weights
MODELS = (REAL, "qwen2.5-0.5b", "llama-3.2-1b")
BY_PEER = "q4_k_m"
FORMATS = ("q4_0", "q4_1", "q8_0", BY_PEER)
# On x86 mistral.rs packs Q8_0 and not Q4_0, and only matrices with a multiple of 256 inputs: of this model one in a block.
MISTRAL_FORMATS = ("q4_0", "q8_0")
MISTRAL_ROWS = ("prefill_512", "decode_1", "decode_1_after_512")  # of one stream
ROWS = ("prefill_512", "decode_1", "decode_8")
NEW = 33  # tokens of a row
SCALE = 0.02  # of random weights: activations stay finite
ROOM = 8 * 2**30  # bytes of disk for the largest model's float16 file beside all others


def measure_sizes(peer: Peer, rounds: int, names: Collection[str]) -> list[Json]:
    """Prints and returns the rows of `names`, by default ROWS, of each of MODELS in each of FORMATS.

    They have no bars. Raises UserError where llama.cpp cannot write or read a file.
    """
    rows = []
    for model in MODELS:
        for kind in FORMATS:
            progress(f"the file of {model} in {kind.upper()}")
            rows += measure_streams(
                str(model_file(model, kind, peer)),
                peer,
                new=NEW,
                rounds=rounds,
                names=names or ROWS,
                about={"model": model, "format": kind.upper(), "random": model != REAL},
                has_bars=False,
            )
    return rows


def measure_mistral(peer: Peer, new: int, rounds: int) -> list[Json]:
    """Prints and returns MISTRAL_ROWS of REAL in MISTRAL_FORMATS, beside mistral.rs; without bars."""
    rows = []
    for kind in MISTRAL_FORMATS:
        rows += measure_streams(
            str(model_file(REAL, kind)),
            peer,
            new=new,
            rounds=rounds,
            names=MISTRAL_ROWS,
            about={"model": REAL, "format": kind.upper()},
            peer_name=MISTRAL,
            has_bars=False,
        )
    return rows


def model_file(name: str, kind: str, llama: Peer | None = None) -> Path:
    """Returns the file of one of MODELS in one of FORMATS, which is made when it is not there.

    `llama`: llama.cpp, which writes BY_PEER. Raises UserError where it cannot.
    """
    if name == REAL and kind == "q4_1":
        return fetch(REAL)["model"]
    file_name = f"{name}-{kind}.gguf"
    path = cache_folder("measured") / file_name
    if path.exists():
        return path
    path = cache_folder("measured", room=ROOM) / file_name
    model = _load(name)
    with atomic_file(path) as file:
        if kind == BY_PEER:
            assert llama
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                source = Path(folder) / "float16.gguf"
                _save(source, model, "float16")
                _quantize(source, Path(file.name), llama)
        else:
            _save(Path(file.name), model, kind)
    return path


def _load(name: str) -> BenchModel:
    """Returns a model with a tokenizer: that of REAL where its weights are random."""
    if name == REAL:
        return load(REAL)
    cfg = preset(name)
    return BenchModel(name, cfg, _random_weights(cfg), peek_model(REAL).describe().tokenizer)


def _random_weights(cfg: ModelConfig) -> Any:
    """Returns weights in float16, made one by one: in float32 those of 1 B would take 5 GB."""
    generator = np.random.default_rng(0)
    leaves = {}
    for path, shape in leaf_shapes(cfg).items():
        if path.endswith("norm"):
            leaves[path] = np.ones(shape, np.float16)
        else:
            numbers = generator.standard_normal(shape, np.float32)
            leaves[path] = (SCALE * numbers).astype(np.float16)
    return unflatten(leaves)


def _save(path: Path, model: BenchModel, dtype: str) -> None:
    tokenizer: Tokenizer = model.tokenizer
    metadata = tokenizer_metadata(tokenizer, (tokenizer.eos_id,), model.cfg.vocab)
    save_gguf(path, model.cfg, model.params, metadata, name=model.name, dtype=dtype)


def _quantize(source: Path, path: Path, peer: Peer) -> None:
    """Writes a float16 file as Q4_K_M by llama.cpp."""
    try:
        peer.ask(make="quantize", spec={"file": str(source), "to": str(path), "threads": cores()})
        peer.ask(run="quantize")
    except PeerError as error:
        raise UserError(f"llama.cpp: {error}") from None
