"""Text data: reads and tokenizes what `--data` and `--validation` name, and scores bits per byte."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine import manifest
from engine.errors import UserError, did_you_mean
from engine.files import cache_folder
from engine.mesh.layout import row_shards
from engine.model.config import ModelConfig
from engine.model.loss import score
from engine.model.transformer import Params
from engine.storage import assets
from engine.storage.assets import TEXTS
from engine.storage.huggingface import load_tokenizer
from engine.text.batch import count_windows, evaluation_windows, window_batch
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
from stages.cli.console import Console, ReportProgress

TOKENIZER_TEXT = 64_000_000  # characters that a tokenizer is trained on at most
HELD_OUT = 0.05
QUICK_WINDOWS = 32
GENERAL_WINDOW = 256  # tokens of a general text that are scored at once
GENERAL_TOKENS = 8192  # tokens of it in all
EVALUATION_ROWS = 2  # conversations, or windows of a general text, that are scored together
LOGITS = 64 * 2**20  # bytes of float32 logits an evaluation makes at once

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


def rows_in_memory(cfg: ModelConfig, seq: int) -> int:
    """Returns how many windows, 2 to 16, are scored together: as many as have logits of LOGITS
    bytes."""
    return max(2, min(16, LOGITS // (4 * seq * cfg.vocab)))


def bits_per_byte(nats: float, size: int) -> float:
    return nats / math.log(2) / size


def score_text(
    cfg: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    seq: int,
    stride: int,
    rows: int,
    report: ReportProgress | None = None,
) -> float:
    """Returns the summed nats of every token (N,) of a text but the first, each after seq - stride
    tokens or more."""
    total = 0.0
    waiting = jnp.zeros(())
    rows *= row_shards()
    count = count_windows(len(tokens), seq, stride)
    for number, batch in enumerate(evaluation_windows(tokens, seq, stride, rows)):
        if report:  # first, because the first batch may compile for a minute
            report(min(number * rows, count), count)
        # One batch ahead: the next is cut while the device works.
        nats = score(cfg, params, batch)
        total += float(waiting)
        waiting = nats
    return total + float(waiting)


def general_bits_per_byte(
    cfg: ModelConfig, params: Params, tokenizer: Tokenizer, text: str, context: int, console: Console
) -> float:
    tokens = encode_text(evaluation_source(text, console), tokenizer, console).tokens[: GENERAL_TOKENS + 1]
    seq = min(GENERAL_WINDOW, context, max(2, len(tokens) - 1))
    with console.task(f"evaluating on {text}", always=True) as report:
        nats = score_text(cfg, params, tokens, seq, seq, EVALUATION_ROWS, report)
    return bits_per_byte(nats, tokenizer.count_bytes(tokens[1:]))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates on held-out batches: the sum of `summed_loss(trainable, batch)` over `size`.

    The mean is called `unit` on screen and `key` in metrics.jsonl.
    """

    batches: Sequence[Any]
    summed_loss: Callable[[Any, Any], Any]
    size: float
    unit: str
    key: str

    def evaluate(
        self,
        trainable: Any,
        report: ReportProgress = lambda *_: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Returns the mean; None when it was `stopped` in between."""
        total = 0.0
        report(0, len(self.batches))  # the first batch may compile for a minute
        for number, batch in enumerate(self.batches, 1):
            if stopped():
                return None
            total += float(self.summed_loss(trainable, batch))
            report(number, len(self.batches))
        return total / self.size


def quick_evaluator(
    cfg: ModelConfig, text: TokenFile, tokenizer: Tokenizer, nats_of: Callable[..., Any]
) -> Evaluator:
    """Returns an evaluator on a fixed few windows of the model's context, spread over the text, the
    same on every mesh.

    `nats_of(cfg, params, batch)` sums a batch's nats. Rows behind the last are not counted.
    """
    seq = cfg.context
    rows = rows_in_memory(cfg, seq)
    last = len(text.tokens) - 1 - seq
    if last > 0:
        count = min(QUICK_WINDOWS, max(rows, last // seq))
        starts = np.linspace(0, last, -(-count // rows) * rows).astype(np.int64)
        shards = row_shards()
        rows = min(rows, -(-len(starts) // shards)) * shards
        first = np.pad(starts, (0, -len(starts) % rows), constant_values=-1).reshape(-1, rows, 1)
        mask = np.broadcast_to(first >= 0, (*first.shape[:2], seq))
        windows = np.maximum(first, 0) + np.arange(seq)
        batches = [
            window_batch(text.tokens, batch_windows, batch_mask)
            for batch_windows, batch_mask in zip(windows, mask)
        ]
    else:
        batches = [next(evaluation_windows(text.tokens, seq, seq, rows))]
    size = 0  # bytes
    for batch in batches:
        size += tokenizer.count_bytes(np.asarray(batch.targets)[np.asarray(batch.mask)])
    return Evaluator(
        batches=batches,
        summed_loss=functools.partial(nats_of, cfg),
        size=math.log(2) * max(size, 1),  # nats by this are bits per byte
        unit="bits/byte (quick)",
        key="quick_val_bits_per_byte",
    )
