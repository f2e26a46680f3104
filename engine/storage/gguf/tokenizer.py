"""The tokenizer in a GGUF file's metadata: built with the tokenizers library, and described for a file to be written."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import UserError, nearest
from engine.storage.gguf.header import SCALARS, STRING, Header, Span, read_numbers, read_strings
from engine.storage.untrusted import build_tokenizer, parse_tokenizer, quote

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ggml's kinds of tokens
LONGEST = 1024  # bytes of a token
NEAREST_SPLIT = "llama-bpe"  # the split that llama.cpp is told of where it has no name for the true one
SPACE = "▁"  # what stands for a space in a sentencepiece vocabulary

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """Returns the split of Llama 3 and Qwen 2, which differ only in how many digits may stand together."""
    pattern = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split(r"\p{N}{1,3}")


# How a text is split before merging, by the names that llama.cpp gives to it.
SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3, "llama3": _llama3, "llama-v3": _llama3,
    "qwen2": lambda: _split(r"\p{N}"),
}  # fmt: skip
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def tokenizer_from(header: Header, vocab: int) -> tuple[tokenizers.Tokenizer, dict[str, Any], tuple[int, ...]]:
    """Returns the tokenizer of a file, its tokenizer_config.json, and the ids of which any ends a completion.

    Raises UserError for a vocabulary that is not `vocab` tokens long, or that is split in a way not known here.
    """
    path, metadata = header.path, header.metadata
    field = lambda name: metadata.get(f"tokenizer.ggml.{name}")
    tokens = _texts(header, "tokens", vocab)
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{path} is damaged: a token is twice in its vocabulary.")
    kinds = _numbers(header, "token_type", vocab)
    model, pre = field("model"), field("pre")
    if "tokenizer.huggingface.json" in metadata:
        tokenizer = _whole(header, tokens)
    elif model == "gpt2":
        tokenizer = _byte_level(header, tokens, pre)
    elif model == "llama":
        tokenizer = _sentencepiece(header, tokens, kinds)
    else:
        raise UserError(f"{path}: the tokenizer model {quote(model)} is not known here; gpt2 and llama are.")
    if "tokenizer.huggingface.json" not in metadata:
        for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
            named = [AddedToken(tokens[i], special=special, normalized=False) for i in np.flatnonzero(kinds == kind)]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(named)
    ids = {name: _id(header, f"{name}_token_id", vocab) for name in ("bos", "eos", "padding", "eot", "eom")}
    if ids["eos"] is None:
        raise UserError(f"{path} does not say tokenizer.ggml.eos_token_id, which token ends a text.")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: tokenizer.chat_template should be text.")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        config |= {} if (place := ids[name]) is None else {key: tokens[place]}
    config |= {} if template is None else {"chat_template": template}
    add_bos = field("add_bos_token")
    add_bos = (model == "llama" or pre in LLAMA3) if add_bos is None else add_bos
    if add_bos is True and (place := ids["bos"]) is not None:
        first = tokens[place]
        build_tokenizer(lambda: _begin_with(tokenizer, first, place), path)
    ends = tuple(dict.fromkeys(place for name in ("eos", "eot", "eom") if (place := ids[name]) is not None))
    return tokenizer, config, ends


def _begin_with(tokenizer: tokenizers.Tokenizer, token: str, place: int) -> tokenizers.Tokenizer:
    first, whole = f"{token}:0", ["$A:0"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, *whole], pair=[first, *whole, "$B:1"], special_tokens=[(token, place)]
    )
    return tokenizer


def _span(header: Header, name: str) -> Span:
    span = header.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(span, Span):
        raise UserError(f"{header.path} has no list tokenizer.ggml.{name}, so its tokenizer cannot be built.")
    return span


def _texts(header: Header, name: str, count: int | None = None) -> list[str]:
    span = _span(header, name)
    if span.kind != STRING or (count is not None and span.length != count):
        wanted = "texts" if count is None else f"{count:,} texts, a row of the embedding each"
        raise UserError(f"{header.path}: tokenizer.ggml.{name} should be {wanted}, and has {span.length:,} entries.")
    return read_strings(header.path, span, 2 * LONGEST + 1)


def _numbers(header: Header, name: str, count: int) -> np.ndarray:
    span = _span(header, name)
    if span.kind not in SCALARS or span.length != count:
        raise UserError(f"{header.path}: tokenizer.ggml.{name} should be {count:,} numbers, and has {span.length:,} entries.")
    return read_numbers(header.path, span)


def _id(header: Header, name: str, vocab: int) -> int | None:
    value = header.metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not (type(value) is int and 0 <= value < vocab):
        raise UserError(f"{header.path}: tokenizer.ggml.{name} is {quote(value)}, and the vocabulary has {vocab:,} tokens.")
    return value


def _whole(header: Header, tokens: list[str]) -> tokenizers.Tokenizer:
    """Returns the tokenizer.json that some files carry beside the lists, if it says the same as they do."""
    text = header.metadata["tokenizer.huggingface.json"]
    if not isinstance(text, str):
        raise UserError(f"{header.path}: tokenizer.huggingface.json should be text.")
    tokenizer = parse_tokenizer(text.encode(), header.path)
    known = tokenizer.get_vocab(with_added_tokens=True)
    if any(known.get(token, place) != place for place, token in enumerate(tokens)) or len(known) > len(tokens):
        raise UserError(f"{header.path}: its tokenizer.json and its list of tokens do not say the same.")
    return tokenizer


def _byte_level(header: Header, tokens: list[str], pre: Any) -> tokenizers.Tokenizer:
    if not isinstance(pre, str) or pre not in SPLITS:
        close = nearest(str(pre), list(SPLITS))
        raise UserError(f"{header.path}: the pre-tokenizer {quote(pre)} is not known here; {', '.join(SPLITS)} are.{close}")
    parts = [merge.partition(" ") for merge in _texts(header, "merges")]
    if not all(left and right for left, _, right in parts):
        raise UserError(f"{header.path} is damaged: one of tokenizer.ggml.merges is not two tokens.")
    merges = [(left, right) for left, _, right in parts]
    vocab = {token: place for place, token in enumerate(tokens)}

    def make() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3))
        tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
        tokenizer.pre_tokenizer = SPLITS[pre]()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    return build_tokenizer(make, header.path)


def _sentencepiece(header: Header, tokens: list[str], kinds: np.ndarray) -> tokenizers.Tokenizer:
    """Builds BPE over characters, unknown ones as bytes; pairs merge in the order of their product's score."""
    scores = _numbers(header, "scores", len(tokens)).tolist()
    vocab = {token: place for place, token in enumerate(tokens)}
    pairs = [
        (-scores[place], -cut, token[:cut], token[cut:])
        for place, token in enumerate(tokens)
        if kinds[place] in (NORMAL, USER_DEFINED)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs.sort(key=lambda pair: pair[:2])
    unknown = next((tokens[i] for i in np.flatnonzero(kinds == UNKNOWN)), None)
    prefixed = header.metadata.get("tokenizer.ggml.add_space_prefix", True) is True

    def make() -> tokenizers.Tokenizer:
        model = models.BPE(
            vocab=vocab, merges=[pair[2:] for pair in pairs], unk_token=unknown, fuse_unk=True, byte_fallback=True
        )  # fmt: skip
        tokenizer = tokenizers.Tokenizer(model)
        spaces = normalizers.Replace(" ", SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
        parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
        return tokenizer

    return build_tokenizer(make, header.path)


def tokenizer_metadata(
    tokenizer: dict[str, Any], config: dict[str, Any], ends: tuple[int, ...], start: tuple[int, ...], vocab: int
) -> dict[str, Any]:
    """Returns the metadata that say what a tokenizer.json and its tokenizer_config.json do, for a model of `vocab` tokens.

    Where llama.cpp has no name for how a text is split, it is told the nearest, and the tokenizer.json goes along whole.
    Raises UserError for a tokenizer that is no BPE, or one without merges, which llama.cpp cannot read.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE" or not model["merges"]:
        kind = "without merges" if model["type"] == "BPE" else f"of the kind {model['type']}"
        raise UserError(f"A tokenizer {kind} has no place in a GGUF file; write a Hugging Face folder instead.")
    tokens = [f"[PAD{place}]" for place in range(vocab)]
    kinds = [UNUSED] * vocab
    for token, place in model["vocab"].items():
        tokens[place] = token
        kinds[place] = BYTE if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    fields: dict[str, Any] = {"tokens": tokens, "token_type": kinds, "eos_token_id": ends[0], "add_bos_token": bool(start)}
    ids = {token: place for place, token in enumerate(tokens)}
    for key, name in (("bos_token_id", "bos_token"), ("padding_token_id", "pad_token"), ("unknown_token_id", "unk_token")):
        fields |= {key: ids[config[name]]} if config.get(name) in ids else {}
    fields |= {"eot_token_id": ends[1]} if len(ends) > 1 else {}
    whole = {}
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        fields |= {"model": "llama", "pre": "default", "scores": [float(-ranks.get(token, len(merges))) for token in tokens]}
    else:
        pre = next((name for name in SPLITS if _same_split(tokenizer, name)), None)
        whole = {} if pre else {"tokenizer.huggingface.json": json.dumps(tokenizer, ensure_ascii=False)}
        fields |= {"model": "gpt2", "pre": pre or NEAREST_SPLIT, "merges": [" ".join(pair) for pair in merges]}
    template = {"tokenizer.chat_template": config["chat_template"]} if config.get("chat_template") else {}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | template | whole


def _same_split(tokenizer: dict[str, Any], pre: str) -> bool:
    """Whether a tokenizer.json splits texts as llama.cpp does under this name."""
    like = tokenizers.Tokenizer(models.BPE())
    like.pre_tokenizer = SPLITS[pre]()
    like.normalizer = normalizers.NFC() if pre == "qwen2" else None
    written = json.loads(like.to_str())
    return all(tokenizer[part] == written[part] for part in ("pre_tokenizer", "normalizer"))
