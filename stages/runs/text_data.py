"""Text data: reads and tokenizes what `--data` and `--validation` name."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from engine import manifest
from engine.errors import UserError, did_you_mean
from engine.files import cache_folder
from engine.storage import assets
from engine.storage.assets import TEXTS
from engine.storage.huggingface import load_tokenizer
from engine.text.corpus import (
    Corpus,
    Document,
    TokenFile,
    characters,
    hold_out,
    open_bin,
    open_token_file,
    read_corpus,
    without_copies,
)
from engine.text.tokenizer import SPLIT, Tokenizer, byte_tokenizer, train_bpe
from stages.cli.console import Console

TOKENIZER_TEXT = 64_000_000  # characters that a tokenizer is trained on at most
HELD_OUT = 0.05

Source = Corpus[Document] | Path  # documents, or a .bin of token ids


@dataclasses.dataclass(frozen=True)
class TextData:
    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer
    digest: str  # of the training tokens
    validation_digest: str
    name: str
    validation_name: str


def find_sources(data: str, validation: Path | None, console: Console) -> tuple[Source, Source | None]:
    """Returns the training and the validation text; None for the latter when it is to be cut from a
    .bin."""
    check_text_name(data)
    if validation:
        held_out = _source(validation, console)
        if data in TEXTS:
            train = _named_text(_fetch(data, console)["train"], data)
        else:
            train = _source(Path(data), console)
        if isinstance(train, Corpus) and isinstance(held_out, Corpus):
            held_out = without_copies(held_out, train)
        return train, held_out
    if data in TEXTS:  # its validation text has no document of its training text
        files = _fetch(data, console)
        return _named_text(files["train"], data), _named_text(files["validation"], f"{data}, held out")
    whole = _source(Path(data), console)
    if isinstance(whole, Path):
        return whole, None
    beginning, end = hold_out(whole, HELD_OUT)
    return beginning, without_copies(end, beginning)


def _fetch(name: str, console: Console) -> dict[str, Path]:
    """Returns the files of one of TEXTS, by `train` and `validation`."""
    with console.task(f"fetching {name}") as report:
        return assets.fetch(name, report)


def _named_text(path: Path, name: str) -> Source:
    return dataclasses.replace(read_corpus(path), name=name)


def check_text_name(data: str, conversations: Collection[str] = ()) -> None:
    """Raises UserError when `data` names no text. `conversations`: names of those that could stand
    there too."""
    if data in assets.MODELS:
        raise UserError(
            f"{data} is a model, not a text; --data takes {', '.join(TEXTS)}, a file or a folder."
        )
    if data not in TEXTS and not Path(data).exists():
        names = (*TEXTS, *conversations)
        also = ""
        if conversations:
            also = ", nor a file of conversations"
        hint = did_you_mean(data, names) or f" Give a file, a folder, or one of {', '.join(names)}."
        raise UserError(f"There is no text at {data}{also}.{hint}")


def evaluation_source(data: str, console: Console) -> Source:
    if data in assets.ASSETS or not Path(data).exists():
        held_out = find_sources(data, None, console)[1]
        assert held_out is not None
        return held_out
    return _source(Path(data), console)


def _source(path: Path, console: Console) -> Source:
    if path.suffix.lower() == ".bin":
        return path
    corpus = read_corpus(path)
    console.print_notes(corpus.note)
    return corpus


def prepare_text(data: str, validation: Path | None, spec: str, console: Console) -> TextData:
    """Reads and tokenizes a run's texts. `spec`: see `make_tokenizer`."""
    train_source, validation_source = find_sources(data, validation, console)
    tokenizer = make_tokenizer(spec, train_source, console)
    train = encode_text(train_source, tokenizer, console)
    if validation_source is None:  # a .bin: its beginning, and its held-out end
        whole = train
        at = round(len(whole.tokens) * (1 - HELD_OUT))
        train = _part(whole, whole.tokens[:at], tokenizer)
        held_out = _part(whole, whole.tokens[at:], tokenizer)
        name = f"the last {HELD_OUT:.0%} of {data}"
    else:
        held_out = encode_text(validation_source, tokenizer, console)
        name = source_name(validation_source)
    return TextData(
        train=train,
        validation=held_out,
        tokenizer=tokenizer,
        digest=digest_tokens(train),
        validation_digest=digest_tokens(held_out),
        name=source_name(train_source),
        validation_name=name,
    )


def encode_text(source: Source, tokenizer: Tokenizer, console: Console) -> TokenFile:
    if isinstance(source, Path):
        with console.task(f"checking {source}"):
            return open_bin(source, tokenizer)
    with console.task(f"encoding {source.name}") as report:
        return open_token_file(source, tokenizer, report)


def make_tokenizer(spec: str, source: Source, console: Console) -> Tokenizer:
    """Returns the tokenizer that `bytes`, `bpe:N` (trained on the text, and cached by its digest),
    or a folder names."""
    if spec == "bytes":
        return byte_tokenizer()
    kind, _, vocab = spec.partition(":")
    if kind != "bpe":
        path = Path(spec).expanduser()
        if not path.exists():
            raise UserError(
                f"--tokenizer is `bytes`, `bpe:2048` or a folder with a tokenizer.json, not {spec!r}."
            )
        if path.is_file():
            path = path.parent
        return load_tokenizer(path).tokenizer
    if not vocab.isdigit() or not 257 <= int(vocab) <= 1_000_000:
        raise UserError(f"--tokenizer bpe:N wants a vocabulary of 257 to 1,000,000 tokens, not {vocab!r}.")
    if isinstance(source, Path):
        raise UserError(f"{source} holds token ids: give the tokenizer that made them, --tokenizer FOLDER.")
    digest = _digest_beginning(spec, source)
    folder = cache_folder("tokenizers") / digest[:32]

    def train(building: Path) -> None:
        with console.task(f"learning a vocabulary of {int(vocab):,} from {source.name}", always=True):
            parts = itertools.chain.from_iterable(document() for document in _beginning(source))
            train_bpe(parts, int(vocab)).save(building)
        if _digest_beginning(spec, source) != digest:
            raise UserError(
                f"{source.name} was changed while it was read, so its tokenizer was not kept. "
                "Run the command again."
            )
        manifest.write_manifest(building)

    manifest.build_once(folder, train)
    return load_tokenizer(folder).tokenizer


def _digest_beginning(spec: str, corpus: Corpus[Document]) -> str:
    digest = hashlib.sha256(f"{SPLIT} {spec}".encode())
    for document in _beginning(corpus):
        hashed = hashlib.sha256()
        for part in document():
            hashed.update(part.encode("utf-8", "surrogatepass"))
        digest.update(hashed.digest())
    return digest.hexdigest()


def _beginning(corpus: Corpus[Document]) -> Iterator[Document]:
    left = TOKENIZER_TEXT
    for document in corpus:
        yield functools.partial(characters, document, 0, left)
        left -= sum(map(len, document()))
        if left <= 0:
            return


def _part(whole: TokenFile, tokens: np.ndarray, tokenizer: Tokenizer) -> TokenFile:
    size = sum(tokenizer.count_bytes(tokens[start : start + 2**20]) for start in range(0, len(tokens), 2**20))
    return dataclasses.replace(whole, tokens=tokens, bytes=size)


def digest_tokens(text: TokenFile) -> str:
    """Returns the digest of a file of tokens, and of how many of them are used."""
    if text.path.is_relative_to(cache_folder("tokens")):
        digest = text.path.parent.name  # that of text and tokenizer, which the cache has checked
    else:
        digest = _digest_file(text.path)
    return hashlib.sha256(f"{digest} {len(text.tokens)}".encode()).hexdigest()


_digest_file = functools.cache(manifest.sha256_of)


def source_name(source: Source) -> str:
    if isinstance(source, Path):
        return str(source)
    return source.name
