"""Builds a tokenizer from a GGUF file's metadata, and metadata from a tokenizer."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import UserError
from engine.storage.gguf_header import STRING, ArrayLocation, Header, read_numbers, read_strings
from engine.text.tokenizer import ModelTokenizer, Tokenizer, build_tokenizer
from engine.untrusted import known_name, quote

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ggml's kinds of tokens
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}  # ggml's names -> tokenizer_config.json's
# SamplingParams' name -> llama.cpp's key of the recommended value.
SAMPLING_KEYS = {name: f"general.sampling.{name}" for name in ("top_k", "top_p", "min_p")}
SAMPLING_KEYS |= {"temperature": "general.sampling.temp", "repetition_penalty": "general.sampling.penalty_repeat"}
SPACE = "▁"  # stands for a space in a sentencepiece vocabulary
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("gpt-2", "smollm", *LLAMA3, "qwen2")  # llama.cpp's names
FALLBACK_PRE_TOKENIZER = "llama-bpe"  # where llama.cpp has no name for it


def set_pre_tokenizer(tokenizer: tokenizers.Tokenizer, name: str) -> None:
    """Sets the normalizer and pre-tokenizer of one of PRE_TOKENIZERS."""
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.pre_tokenizer = gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif name != "gpt-2":  # Llama 3 and Qwen 2 differ in groups of digits
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
            rf"|\p{{N}}{'' if name == 'qwen2' else '{1,3}'}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])


def read_tokenizer(header: Header, vocab: int) -> ModelTokenizer:
    """Reads a file's tokenizer of `vocab` tokens, its EOS ids, and its recommended sampling."""
    path, metadata = header.path, header.metadata
    field = lambda name: metadata.get(f"tokenizer.ggml.{name}")
    tokens, kinds = _read_list(header, "tokens", vocab), _read_list(header, "token_type", vocab)
    places = {token: place for place, token in enumerate(tokens)}
    if len(places) < len(tokens):
        raise UserError(f"{path} is damaged: a token is twice in its vocabulary.")
    model, pre = field("model"), field("pre")
    if "tokenizer.huggingface.json" in metadata:
        tokenizer = _from_json(header, places)
    else:
        known_name(model, ("gpt2", "llama"), "the tokenizer model", path)
        make = lambda: _byte_level(header, places, pre) if model == "gpt2" else _sentencepiece(header, places, kinds)
        tokenizer = build_tokenizer(make, path)
        for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
            named = [tokens[place] for place in np.flatnonzero(kinds == kind)]
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in named])
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "padding", "eot", "eom"):
        if (value := field(f"{name}_token_id")) is not None:
            if type(value) is not int or not 0 <= value < vocab:
                raise UserError(f"{path}: tokenizer.ggml.{name}_token_id is {quote(value)}, and there are {vocab:,} tokens.")
            ids[name] = value
    if "eos" not in ids:
        raise UserError(f"{path} does not say tokenizer.ggml.eos_token_id, which token ends a text.")
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"{path}: tokenizer.chat_template should be text.")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {key: tokens[ids[name]] for name, key in SPECIAL_TOKENS.items() if name in ids}
    config |= {} if template is None else {"chat_template": template}
    add_bos = field("add_bos_token")
    add_bos = (model == "llama" or pre in LLAMA3) if add_bos is None else add_bos
    if add_bos is True and "bos" in ids:
        token, first = (tokens[ids["bos"]], ids["bos"]), f"{tokens[ids['bos']]}:0"
        begin = lambda: processors.TemplateProcessing(
            single=[first, "$A:0"], pair=[first, "$A:0", "$B:1"], special_tokens=[token]
        )
        tokenizer.post_processor = build_tokenizer(begin, path)
    eos_ids = tuple(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    whole = build_tokenizer(lambda: Tokenizer(tokenizer, config, path), path)
    return ModelTokenizer(whole, eos_ids, read_sampling(metadata))


def _read_list(header: Header, name: str, count: int | None = None) -> Any:
    """Returns list[str] for tokens and merges, else an array of numbers."""
    location = header.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(location, ArrayLocation):
        raise UserError(f"{header.path} has no list tokenizer.ggml.{name}, so its tokenizer cannot be built.")
    texts = name in ("tokens", "merges")
    if texts != (location.kind == STRING) or count not in (None, location.length):
        kind = "texts" if texts else "numbers"
        wanted = kind if count is None else f"{count:,} {kind}, a row of the embedding each"
        raise UserError(f"{header.path}: tokenizer.ggml.{name} should be {wanted}, and has {location.length:,} entries.")
    return read_strings(header.path, location) if texts else read_numbers(header.path, location)


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
    pairs = [
        (-scores[place], -cut, token[:cut], token[cut:])
        for token, place in places.items()
        if kinds[place] in (NORMAL, USER_DEFINED)
        for cut in range(1, len(token))
        if token[:cut] in places and token[cut:] in places
    ]
    merges = [pair[2:] for pair in sorted(pairs, key=lambda pair: pair[:2])]
    unknown = next((token for token, kind in zip(places, kinds) if kind == UNKNOWN), None)
    prefixed = header.metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    model = models.BPE(vocab=places, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def tokenizer_metadata(tokenizer: Tokenizer, eos_ids: tuple[int, ...], vocab: int) -> dict[str, Any]:
    """Returns the GGUF metadata of a tokenizer, for a model of `vocab` tokens.

    Where llama.cpp has no name for its pre-tokenizer, the nearest is named, and the tokenizer.json added. Raises UserError for
    a tokenizer that is no BPE or has no merges.
    """
    written, config = tokenizer.to_json(), tokenizer.config
    model = written["model"]
    if model["type"] != "BPE" or not model["merges"]:
        kind = "without merges" if model["type"] == "BPE" else f"of the kind {model['type']}"
        raise UserError(f"A tokenizer {kind} has no place in a GGUF file; write a Hugging Face folder instead.")
    tokens, kinds = [f"[PAD{place}]" for place in range(vocab)], [UNUSED] * vocab
    for token, place in model["vocab"].items():
        tokens[place] = token
        kinds[place] = BYTE if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
    for added in written["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    fields: dict[str, Any] = {"tokens": tokens, "token_type": kinds, "add_bos_token": bool(tokenizer.bos_ids)}
    texts = tokenizer.special_names
    named = {name: tokenizer.id_of(texts.get(key, "")) for name, key in (SPECIAL_TOKENS | {"unknown": "unk_token"}).items()}
    named |= dict(zip(("eos", "eot"), eos_ids))
    fields |= {f"{name}_token_id": place for name, place in named.items() if place is not None}
    extra = {"tokenizer.chat_template": config["chat_template"]} if config.get("chat_template") else {}
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(model["merges"]):
            ranks.setdefault("".join(pair), rank)
        scores = [float(-ranks.get(token, len(model["merges"]))) for token in tokens]
        fields |= {"model": "llama", "pre": "default", "scores": scores}
    else:
        pre = next((name for name in PRE_TOKENIZERS if _is_pre_tokenizer(written, name)), None)
        extra |= {} if pre else {"tokenizer.huggingface.json": json.dumps(written, ensure_ascii=False)}
        fields |= {
            "model": "gpt2",
            "pre": pre or FALLBACK_PRE_TOKENIZER,
            "merges": [" ".join(pair) for pair in model["merges"]],
        }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | extra


def _is_pre_tokenizer(tokenizer: dict[str, Any], name: str) -> bool:
    like = tokenizers.Tokenizer(models.BPE())
    set_pre_tokenizer(like, name)
    written = json.loads(like.to_str())
    return all(tokenizer[part] == written[part] for part in ("pre_tokenizer", "normalizer"))


def read_sampling(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: metadata[key] for name, key in SAMPLING_KEYS.items() if key in metadata}


def sampling_metadata(sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {SAMPLING_KEYS[name]: value if name == "top_k" else float(value) for name, value in sampling.items()}
