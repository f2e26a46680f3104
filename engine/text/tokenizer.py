"""BPE tokenizers, byte-level or sentencepiece's: train and save them; text to tokens and back."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.errors import UserError
from engine.files import write_json, write_text
from engine.text.detokenizer import Detokenizer
from engine.untrusted import quote

END = "<|endoftext|>"
GENERATION = "generation_config.json"

# The words that merges stay inside, after GPT-4's pattern (tiktoken, cl100k_base): contractions; a
# word with the one sign before it; digits in pairs; signs; line ends; spaces. Marks belong to their
# letters. Every run ends after 64 characters, so that one long run of anything costs what ordinary
# text costs.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?+[\p{L}\p{M}]{1,64}"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}"
    r"|\s{0,63}[\r\n]"
    r"|\s{1,64}(?!\S)"
    r"|\s{1,64}"
)

# A letter or digit before a space or a Chinese stop, a letter before a digit, or a line end before
# a letter or digit: no token of this pattern, nor of those of GPT-2, Llama 3 and Qwen, contains
# such a pair, so a text cut there keeps its tokens.
TOKEN_END = re.compile(r"[^\W_](?=[\s。，、！？])|[A-Za-z](?=\d)|\n(?=[^\W_])")

PIECE = 16_384  # characters encoded at a time: stays in the CPU's cache
TOGETHER = 64  # pieces a call, spread over the cores

# The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).
# A printable byte stands for itself; the others, in their order, are characters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(0x100 + number): byte for number, byte in enumerate(UNPRINTABLE)}
SYMBOLS = sorted(BYTES, key=BYTES.__getitem__)


class Tokenizer:
    """A BPE tokenizer. `encode` and `decode` are inverse on every string UTF-8 can carry.

    Control tokens (`<|endoftext|>` and a chat template's) are never made from text and stand for no
    text: put their ids in.

    inner: the tokenizers library's own.
    config: the contents of tokenizer_config.json.
    vocab: the number of ids.
    controls: the control tokens, by id.
    eos_id: the id that ends a document.
    bos_ids: the ids before a text, (bos,) or (), which `encode` leaves out.
    special_names: the texts of bos_token, eos_token and the like.
    digest: the SHA-256 of the vocabulary, merges and split.

    Raises UserError, which begins with `where`, for a tokenizer that does not know every byte or
    has no token that ends a text.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, config: dict[str, Any], where: object = "The tokenizer"
    ) -> None:
        self.inner = _whole_texts(inner)
        self.config = config
        tokenizer_json = inner.to_str()
        fields = json.loads(tokenizer_json)
        byte_level = _is_byte_level(fields, where)
        self._table = _byte_table(inner, byte_level)
        # It encodes the rest of a text where that gets no space before its first word; else None.
        self._inner_of_rest: tokenizers.Tokenizer | None = None
        # Where a token reaches across a place to cut, a text is encoded in one piece.
        self._cuts = True
        if not byte_level:
            self._inner_of_rest = _without_first_space(fields)
            self._cuts = not any(map(_has_place_to_cut, self._table.values()))
        self.controls = {
            token: added for token, added in inner.get_added_tokens_decoder().items() if added.special
        }
        self.vocab = max(self._table) + 1
        self._lengths = np.array([len(self.bytes_of(token)) for token in range(self.vocab)])
        self.digest = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self.special_names = {"eos_token": END}
        for name, value in config.items():
            if name.endswith("_token") and isinstance(value, str):
                self.special_names[name] = value
        eos = self.special_names["eos_token"]
        end = inner.token_to_id(eos)
        if end is None:
            raise UserError(
                f"{where} has no token {quote(eos)}, which should end a text; name it as eos_token."
            )
        self.eos_id: int = end
        self.bos_ids = _starts_with(inner)

    def encode(self, text: str, continued: bool = False) -> np.ndarray:
        """Encodes text as tokens (T,) int32, in time linear in its length. Raises UserError for a
        lone surrogate.

        `continued` text goes on from another: sentencepiece's tokenizers put no space before its
        first word.
        """
        return np.concatenate([np.empty(0, np.int32), *self.encode_parts([text], continued)])

    def encode_parts(self, parts: Iterable[str], continued: bool = False) -> Iterator[np.ndarray]:
        """Yields the tokens of a text that comes in parts, a megabyte at a time, so that memory
        stays bounded.
        """
        rest = self.inner
        together = TOGETHER
        if self._inner_of_rest:
            rest = self._inner_of_rest
            together = 1  # for the first piece is encoded by another tokenizer
        for number, pieces in enumerate(itertools.batched(self._pieces(parts), together)):
            inner = rest
            if number == 0 and not continued:
                inner = self.inner
            encoded = inner.encode_batch_fast(list(pieces), add_special_tokens=False)
            yield np.fromiter(itertools.chain.from_iterable(piece.ids for piece in encoded), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids to text. Bytes that are not UTF-8 become U+FFFD; control tokens and unknown
        ids are left out.
        """
        text = b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")
        if self._inner_of_rest:
            return text.removeprefix(" ")
        return text

    def bytes_of(self, token: int) -> bytes:
        return self._table.get(int(token), b"")

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Counts the bytes of tokens; 0 for control tokens."""
        known = np.asarray(ids, np.int64)
        return int(self._lengths[known[(known >= 0) & (known < self.vocab)]].sum())

    def stream(self) -> Detokenizer:
        return Detokenizer(self._table)

    def id_of(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def to_json(self) -> dict[str, Any]:
        return json.loads(self.inner.to_str())

    def save(self, folder: Path) -> None:
        write_text(folder / "tokenizer.json", self.inner.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", self.config)

    def _pieces(self, parts: Iterable[str]) -> Iterator[str]:
        """Cuts a text between tokens into pieces of PIECE characters and what follows up to the
        next place to cut.
        """
        rest: list[str] = []  # since the last cut
        for part in parts:
            _check_unicode(part)
            start = 0
            cut = self._find_cut(part, PIECE)
            while cut is not None:
                yield "".join([*rest, part[start:cut]])
                start = cut
                rest = []
                cut = self._find_cut(part, start + PIECE)
            rest.append(part[start:])
        text = "".join(rest)
        if text:
            yield text

    def _find_cut(self, text: str, start: int) -> int | None:
        """Returns the first place after `start` where a text may be cut; None if there is none."""
        if not self._cuts:
            return None
        token_end = TOKEN_END.search(text, start)
        if token_end is None:
            return None
        return token_end.end()


class ModelTokenizer(NamedTuple):
    """A model's tokenizer, the ids of which any ends a completion, the tokenizer's own first, and
    the recommended sampling.
    """

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    sampling: dict[str, Any]  # by the names of SamplingParams


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Trains a tokenizer of `vocab` tokens on the texts: 256 bytes, merges, and the end of text
    last.

    Short texts may give fewer. The same texts give the same vocabulary. Raises UserError for a text
    with a lone surrogate.
    """
    return _byte_level(models.BPE(), texts, vocab)


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, its id the byte; the end of text is 256."""
    return _byte_level(models.BPE(vocab=BYTES, merges=[]))


def save_tokenizer(
    folder: Path, tokenizer: Tokenizer, eos_ids: Sequence[int], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a tokenizer, its chat template, the EOS ids and the recommended sampling, for
    `huggingface.load_tokenizer`.

    Returns the fields that config.json has of it: eos_token_id, and bos_token_id and pad_token_id
    if there are such tokens.
    """
    tokens: dict[str, Any] = {"eos_token_id": list(eos_ids)}
    if len(eos_ids) == 1:
        tokens["eos_token_id"] = eos_ids[0]
    for name in ("bos_token", "pad_token"):
        token = tokenizer.id_of(tokenizer.special_names.get(name, ""))
        if token is not None:
            tokens[f"{name}_id"] = token
    tokenizer.save(folder)
    fields = dict(tokens)
    if sampling:
        fields["do_sample"] = sampling.get("temperature") != 0  # for transformers
    fields |= sampling
    write_json(folder / GENERATION, fields)
    return tokens


def _byte_level(model: models.BPE, texts: Iterable[str] = (), vocab: int = 0) -> Tokenizer:
    inner = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    if vocab:
        trainer = trainers.BpeTrainer(vocab_size=vocab - 1, initial_alphabet=SYMBOLS, show_progress=False)
        inner.train_from_iterator(_training_parts(texts), trainer)
    inner.add_special_tokens([END])
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    return Tokenizer(inner, {**names, "clean_up_tokenization_spaces": False})


def _training_parts(texts: Iterable[str]) -> Iterator[str]:
    """Yields parts short enough to be counted on every core; a few words cut in two do not matter."""
    for text in texts:
        _check_unicode(text)
        for start in range(0, len(text), 4 * PIECE):
            yield text[start : start + 4 * PIECE]


def _is_byte_level(fields: dict[str, Any], where: object) -> bool:
    """Whether the tokenizer in a tokenizer.json is byte-level, and not sentencepiece's. Raises UserError
    for one that does not know every byte.
    """
    decoder = [step["type"] for step in _steps(fields["decoder"])]
    if "ByteLevel" not in decoder and "ByteFallback" not in decoder:
        kinds = ", ".join(decoder) or "nothing"
        raise UserError(
            f"{where} decodes with {kinds}; only tokenizers that know every byte are understood here."
        )
    return "ByteLevel" in decoder


def _has_place_to_cut(token: bytes) -> bool:
    return TOKEN_END.search(token.decode("utf-8", "ignore")) is not None


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = next(value for name, value in part.items() if name != "type")
    return list(itertools.chain.from_iterable(map(_steps, inner)))


def _whole_texts(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    return inner


def _without_first_space(fields: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """Returns the same tokenizer for the rest of a text, if it puts a space before the first word;
    else None.
    """
    steps = _steps(fields["normalizer"])
    rest = [step for step in steps if step["type"] != "Prepend"]
    spaces = [
        step for step in _steps(fields["pre_tokenizer"]) if step.get("prepend_scheme", "never") != "never"
    ]
    if len(rest) == len(steps) and not spaces:
        return None
    fields["normalizer"] = {"type": "Sequence", "normalizers": rest}
    for step in spaces:
        step["prepend_scheme"] = "never"
    return _whole_texts(tokenizers.Tokenizer.from_str(json.dumps(fields)))


def _starts_with(inner: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the ids that a tokenizer puts before a text."""
    plain = inner.encode("a", add_special_tokens=False).ids
    whole = inner.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _byte_table(inner: tokenizers.Tokenizer, byte_level: bool) -> dict[int, bytes]:
    table = {}
    for name, token in inner.get_vocab(with_added_tokens=False).items():
        if not byte_level:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
            if byte:
                table[token] = bytes.fromhex(byte[1])
            else:
                table[token] = name.replace("▁", " ").encode()
        elif BYTES.keys() >= {*name}:
            table[token] = bytes(BYTES[symbol] for symbol in name)
        else:  # a token added by its plain name
            table[token] = name.encode()
    for token, added in inner.get_added_tokens_decoder().items():
        table[token] = b"" if added.special else added.content.encode()
    return table


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text has half a character (the lone surrogate U+{ord(text[error.start]):04X}) "
            f"at character {error.start}, which no UTF-8 file can hold; remove it, or replace it with U+FFFD."
        ) from None
