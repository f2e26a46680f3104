"""Encodes a text once into a token file in the user's cache, and memory-maps it from then on."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.files import cache_folder
from engine.manifest import build_once, write_manifest
from engine.text import OnProgress
from engine.text.tokenizer import Tokenizer

BLOCK = 1 << 20  # ids looked at in one go


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """The tokens of a text, memory-mapped from a file."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32, read-only
    bytes: int  # of the text in UTF-8, without the ends of documents: what bits per byte divides by
    path: Path


def open_token_file(documents: Iterable[str], tokenizer: Tokenizer, report: OnProgress = None) -> TokenFile:
    """Encodes documents, an EOS between each two; or opens them from the cache when text and tokenizer are unchanged.

    `documents` is read twice, first to know whether it changed, so an iterator is held in memory and a Corpus is not.
    `report` is called with bytes of UTF-8 done and in all, only while encoding. A damaged cached file is made anew.
    Raises UserError for a text that UTF-8 cannot carry.
    """
    if iter(documents) is documents:
        documents = list(documents)
    digest, size = _digest(documents)
    key = hashlib.sha256(f"{digest} {tokenizer.digest}".encode()).hexdigest()[:32]
    folder = cache_folder("tokens", room=2 * size + 2**20) / key
    dtype = np.dtype("<u2" if tokenizer.vocab <= 1 << 16 else "<u4")
    build_once(folder, lambda building: _write(building, documents, tokenizer, dtype, size, report))
    return TokenFile(np.memmap(folder / "tokens.bin", dtype, "r"), size, folder / "tokens.bin")


def open_bin(path: Path, tokenizer: Tokenizer) -> TokenFile:
    """Opens a file of little-endian uint16 token ids, as nanoGPT's data scripts write, made with `tokenizer`.

    Raises UserError when it is missing, empty, of an odd length, or holds an id the tokenizer does not have.
    """
    if not path.is_file():
        raise UserError(f"There is no token file at {path}.")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes; a file of uint16 token ids has an even number, and more than none.")
    tokens = np.memmap(path, "<u2", "r")
    count = 0
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        wrong = np.flatnonzero(block >= tokenizer.vocab)
        if len(wrong):
            raise UserError(
                f"{path} holds the id {block[wrong[0]]} at token {start + wrong[0]}, and the tokenizer has "
                f"{tokenizer.vocab} ids: give the tokenizer that the file was made with."
            )
        count += tokenizer.count_bytes(block)
    return TokenFile(tokens, count, path)


def _digest(documents: Iterable[str]) -> tuple[str, int]:
    """Returns (SHA-256 of the text and where its documents end, bytes of UTF-8)."""
    digest, size = hashlib.sha256(), 0
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")  # the tokenizer's error says where half a character is
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        size += len(data)
    return digest.hexdigest(), size


def _write(
    folder: Path, documents: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype, size: int, report: OnProgress
) -> None:
    done = 0
    with (folder / "tokens.bin").open("wb") as file:
        for index, document in enumerate(documents):
            between = [np.array([tokenizer.eos_id])] if index else []
            for part in itertools.chain(between, tokenizer.encode_parts(document)):
                file.write(part.astype(dtype).tobytes())
                done += tokenizer.count_bytes(part)
                if report:
                    report(min(done, size), size)
    write_manifest(folder)
