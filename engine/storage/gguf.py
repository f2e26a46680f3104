"""Opens the model and the tokenizer in a GGUF file (llama.cpp), or in one's parts, of any READABLE quantisation.

The gguf library reads what is not multiplied as it is; its reader of files is not used (see
`gguf_header.py`).
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import UserError
from engine.model.weights.block_layout import pack_blocks
from engine.storage.architectures import config_from_gguf, note_unknown_gguf
from engine.storage.gguf_header import (
    STRING,
    ArrayLocation,
    Header,
    read_model_header,
    read_numbers,
    read_strings,
)
from engine.storage.gguf_parts import without_part
from engine.storage.rope_scaling import FREQUENCIES
from engine.storage.tensor_layout import (
    GGUF_NAMES,
    Leaf,
    StoredModel,
    check_tensors,
    infinite_weights,
    layout_of,
)
from engine.text.tokenizer import ModelTokenizer, Tokenizer
from engine.untrusted import build_tokenizer, known_name, quote, read_at

READABLE = {
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
}

LINES = 256  # of the numbers read at a time
MAX_NAME = 96  # characters


def open_model(path: Path) -> StoredModel:
    """Opens a file, or all parts by the first: checks its architecture and tensors against one another;
    reads no weights.
    """
    header = read_model_header(path)
    for name, tensor in header.tensors.items():
        if tensor.kind.name not in READABLE:
            raise UserError(
                f"{tensor.path}: the tensor {quote(name)} is {tensor.kind.name}, which cannot be read here."
            )
    cfg = config_from_gguf(header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if name != FREQUENCIES}
    leaves = check_tensors(layout_of(cfg, GGUF_NAMES), shapes, path)
    architecture = header.metadata["general.architecture"]
    weights = _Weights(header, interleaved_names(leaves, architecture), cfg.head_dim)
    kinds = {name: tensor.kind.name for name, tensor in header.tensors.items() if len(tensor.shape) == 2}
    return StoredModel(
        name=_model_name(header),
        cfg=cfg,
        leaves=leaves,
        read_rows=weights.read_rows,
        read_tokenizer=functools.partial(read_tokenizer, header, cfg.vocab),
        context=header.metadata[f"{architecture}.context_length"],
        hub_id="",
        notes=note_unknown_gguf(header),
        kinds=kinds,
        read_packed=weights.read_packed,
    )


def interleaved_names(leaves: Iterable[Leaf], architecture: str) -> set[str]:
    """Returns the names of the tensors in which a file has RoPE's pairs side by side."""
    if architecture != "llama":
        return set()
    return {leaf.name for leaf in leaves if leaf.head_rows}


class _Weights:
    """Reads the tensors of a model. `interleaved`: those in which RoPE's pairs lie side by side."""

    def __init__(self, header: Header, interleaved: set[str], head_dim: int) -> None:
        self._tensors = header.tensors
        self._interleaved = interleaved
        self._head_dim = head_dim

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows of a tensor as numbers: see StoredModel."""
        tensor = self._tensors[name]
        if len(tensor.shape) == 1:  # a row of its own
            return dequantize(read_at(tensor.path, tensor.offset, tensor.size), tensor.kind)[start:stop]
        row = tensor.size // tensor.shape[0]
        data = read_at(tensor.path, tensor.offset + start * row, (stop - start) * row)
        # The library goes by 16 rows: for short ones the calls take as long as the computing, so
        # they are joined to at most LINES, of as many blocks each.
        blocks = data.size // GGML_QUANT_SIZES[tensor.kind][1]
        lines = _largest_divisor(blocks, LINES)
        values = dequantize(data.reshape(lines, -1), tensor.kind).reshape(stop - start, -1)
        return self._in_our_order(name, values)

    def read_packed(self, name: str) -> np.ndarray:
        """Returns a matrix's blocks, as Blocks hold them."""
        tensor = self._tensors[name]
        data = read_at(tensor.path, tensor.offset, tensor.size).reshape(tensor.shape[0], -1)
        rows = self._in_our_order(name, data)
        try:
            return pack_blocks(rows, tensor.kind.name)
        except ValueError:
            raise infinite_weights(name) from None

    def _in_our_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        if name in self._interleaved:
            return regroup_rows(rows, self._head_dim // 2, 2)
        return rows


def _largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number that is at most `most`."""
    for divisor in range(min(most, number), 1, -1):
        if number % divisor == 0:
            return divisor
    return 1


def _model_name(header: Header) -> str:
    """Returns the name that a file gives its model; the file's own where it gives none fit to print."""
    title = header.metadata.get("general.name")
    if isinstance(title, str) and title.isprintable() and 0 < len(title) <= MAX_NAME:
        return title
    return without_part(header.path.name)


def regroup_rows(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Reorders the rows of each head for RoPE: `outer` groups of `inner` become `inner` groups of
    `outer`.

    (2, H / 2) lays RoPE's pairs (i, i + H / 2) side by side, as in `llama` files' q and k; (H / 2,
    2) undoes it.
    """
    heads = rows.reshape(-1, outer, inner, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


# The tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ggml's kinds of tokens
# ggml's names -> tokenizer_config.json's
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}
# SamplingParams' name -> llama.cpp's key of the recommended value.
SAMPLING_KEYS = {name: f"general.sampling.{name}" for name in ("top_k", "top_p", "min_p")}
SAMPLING_KEYS |= {
    "temperature": "general.sampling.temp",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
SPACE = "▁"  # stands for a space in a sentencepiece vocabulary
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("gpt-2", "smollm", *LLAMA3, "qwen2")  # llama.cpp's names


def set_pre_tokenizer(tokenizer: tokenizers.Tokenizer, name: str) -> None:
    """Sets the normalizer and pre-tokenizer of one of PRE_TOKENIZERS."""
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        tokenizer.pre_tokenizer = gpt2
    elif name == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), gpt2]
        )
    else:  # Llama 3 and Qwen 2 differ in groups of digits
        digits = r"\p{N}" if name == "qwen2" else r"\p{N}{1,3}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
            rf"|{digits}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])


def read_tokenizer(header: Header, vocab: int) -> ModelTokenizer:
    """Reads a file's tokenizer of `vocab` tokens, its EOS ids, and its recommended sampling."""
    path = header.path
    metadata = header.metadata
    tokens = _read_list(header, "tokens", vocab)
    kinds = _read_list(header, "token_type", vocab)
    places = {token: place for place, token in enumerate(tokens)}
    if len(places) < len(tokens):
        raise UserError(f"{path} is damaged: a token is twice in its vocabulary.")
    if "tokenizer.huggingface.json" in metadata:
        tokenizer = _from_json(header, places)
    else:
        tokenizer = _from_lists(header, places, kinds)
    ids = _read_special_ids(header, vocab)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"{path}: tokenizer.chat_template should be text.")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= {key: tokens[ids[name]] for name, key in SPECIAL_TOKENS.items() if name in ids}
    if template is not None:
        config["chat_template"] = template
    if _adds_bos(header) and "bos" in ids:
        _begin_with(tokenizer, tokens[ids["bos"]], ids["bos"], path)
    eos_ids = tuple(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    whole = build_tokenizer(functools.partial(Tokenizer, tokenizer, config, path), path)
    sampling = {name: metadata[key] for name, key in SAMPLING_KEYS.items() if key in metadata}
    return ModelTokenizer(whole, eos_ids, sampling)


def _field(header: Header, name: str) -> Any:
    """Returns the value of a key of the tokenizer; None where there is none."""
    return header.metadata.get(f"tokenizer.ggml.{name}")


def _from_lists(header: Header, places: dict[str, int], kinds: np.ndarray) -> tokenizers.Tokenizer:
    """Builds a tokenizer from a file's lists: of tokens, each with its place, and of their kinds."""
    model = known_name(_field(header, "model"), ("gpt2", "llama"), "the tokenizer model", header.path)
    if model == "gpt2":
        make = functools.partial(_byte_level, header, places, _field(header, "pre"))
    else:
        make = functools.partial(_sentencepiece, header, places, kinds)
    tokenizer = build_tokenizer(make, header.path)
    tokens = [*places]
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        names = [tokens[place] for place in np.flatnonzero(kinds == kind)]
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return tokenizer


def _read_special_ids(header: Header, vocab: int) -> dict[str, int]:
    """Returns the ids of the tokens that begin, end or fill a text, by ggml's names; eos is among them."""
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "padding", "eot", "eom"):
        value = _field(header, f"{name}_token_id")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab:
            raise UserError(
                f"{header.path}: tokenizer.ggml.{name}_token_id is {quote(value)}, "
                f"and there are {vocab:,} tokens."
            )
        ids[name] = value
    if "eos" not in ids:
        raise UserError(f"{header.path} does not say tokenizer.ggml.eos_token_id, which token ends a text.")
    return ids


def _adds_bos(header: Header) -> bool:
    """Whether a text begins with BOS: where the file does not say, as llama.cpp decides."""
    adds_bos = _field(header, "add_bos_token")
    if adds_bos is None:
        adds_bos = _field(header, "model") == "llama" or _field(header, "pre") in LLAMA3
    return adds_bos is True


def _begin_with(tokenizer: tokenizers.Tokenizer, token: str, id: int, path: Path) -> None:
    """Has a tokenizer put a token before each text."""
    first = f"{token}:0"
    begin = functools.partial(
        processors.TemplateProcessing,
        single=[first, "$A:0"],
        pair=[first, "$A:0", "$B:1"],
        special_tokens=[(token, id)],
    )
    tokenizer.post_processor = build_tokenizer(begin, path)


def _read_list(header: Header, name: str, count: int | None = None) -> Any:
    """Returns list[str] for tokens and merges, else an array of numbers."""
    location = header.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(location, ArrayLocation):
        raise UserError(f"{header.path} has no list tokenizer.ggml.{name}, so its tokenizer cannot be built.")
    has_texts = name in ("tokens", "merges")
    is_other_kind = has_texts != (location.kind == STRING)
    if is_other_kind or count not in (None, location.length):
        wanted = "texts" if has_texts else "numbers"
        if count is not None:
            wanted = f"{count:,} {wanted}, a row of the embedding each"
        raise UserError(
            f"{header.path}: tokenizer.ggml.{name} should be {wanted}, and has {location.length:,} entries."
        )
    if has_texts:
        return read_strings(header.path, location)
    return read_numbers(header.path, location)


def _from_json(header: Header, places: dict[str, int]) -> tokenizers.Tokenizer:
    """Builds the tokenizer.json that some files carry beside their lists, if they agree."""
    text = header.metadata["tokenizer.huggingface.json"]
    if not isinstance(text, str):
        raise UserError(f"{header.path}: tokenizer.huggingface.json should be text.")
    tokenizer = build_tokenizer(lambda: tokenizers.Tokenizer.from_str(text), header.path)
    known = tokenizer.get_vocab(with_added_tokens=True)
    if len(known) > len(places) or any(known.get(token, place) != place for token, place in places.items()):
        raise UserError(f"{header.path}: its tokenizer.json and its list of tokens do not say the same.")
    return tokenizer


def _byte_level(header: Header, places: dict[str, int], pre: Any) -> tokenizers.Tokenizer:
    name = known_name(pre, PRE_TOKENIZERS, "the pre-tokenizer", header.path)
    merges = [merge.partition(" ")[::2] for merge in _read_list(header, "merges")]
    if not all(left and right for left, right in merges):
        raise UserError(f"{header.path} is damaged: one of tokenizer.ggml.merges is not two tokens.")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=places, merges=merges, ignore_merges=name in LLAMA3))
    set_pre_tokenizer(tokenizer, name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: Header, places: dict[str, int], kinds: np.ndarray) -> tokenizers.Tokenizer:
    """Builds BPE over characters, unknown ones as bytes; pairs merge in the order of their token's score."""
    scores = _read_list(header, "scores", len(places)).tolist()
    order: list[tuple[float, int]] = []
    pairs: list[tuple[str, str]] = []
    for token, place in places.items():
        if kinds[place] not in (NORMAL, USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            if token[:cut] in places and token[cut:] in places:
                order.append((-scores[place], -cut))
                pairs.append((token[:cut], token[cut:]))
    merges = [pairs[index] for index in sorted(range(len(pairs)), key=order.__getitem__)]
    unknown = next((token for token, kind in zip(places, kinds) if kind == UNKNOWN), None)
    prefixed = header.metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    model = models.BPE(vocab=places, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    if prefixed:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        tokenizer.normalizer = spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
