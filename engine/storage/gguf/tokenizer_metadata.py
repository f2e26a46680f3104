"""The metadata of a GGUF file that says what a tokenizer does: what `gguf_tokenizer` builds one from."""

import json
import re
from typing import Any

import tokenizers
from tokenizers import models, normalizers

from engine.errors import UserError
from engine.storage.gguf.tokenizer import BYTE, CONTROL, NORMAL, SPLITS, UNUSED, USER_DEFINED

NEAREST = "llama-bpe"  # the split that llama.cpp is told of where it has no name for the true one

Words = dict[str, Any]


def words_to(
    tokenizer: dict[str, Any], config: dict[str, Any], ends: tuple[int, ...], start: tuple[int, ...], vocab: int
) -> Words:
    """The metadata that says what a tokenizer.json and its tokenizer_config.json do, for a model of `vocab` tokens.

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
    say: Words = {"tokens": tokens, "token_type": kinds, "eos_token_id": ends[0], "add_bos_token": bool(start)}
    ids = {token: place for place, token in enumerate(tokens)}
    for key, name in (("bos_token_id", "bos_token"), ("padding_token_id", "pad_token"), ("unknown_token_id", "unk_token")):
        say |= {key: ids[config[name]]} if config.get(name) in ids else {}
    say |= {"eot_token_id": ends[1]} if len(ends) > 1 else {}
    whole = {}
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        say |= {"model": "llama", "pre": "default", "scores": [float(-ranks.get(token, len(merges))) for token in tokens]}
    else:
        pre = next((name for name in SPLITS if _same_split(tokenizer, name)), None)
        whole = {} if pre else {"tokenizer.huggingface.json": json.dumps(tokenizer, ensure_ascii=False)}
        say |= {"model": "gpt2", "pre": pre or NEAREST, "merges": [" ".join(pair) for pair in merges]}
    template = {"tokenizer.chat_template": config["chat_template"]} if config.get("chat_template") else {}
    return {f"tokenizer.ggml.{key}": value for key, value in say.items()} | template | whole


def _same_split(tokenizer: dict[str, Any], pre: str) -> bool:
    """Whether a tokenizer.json splits texts as llama.cpp does under this name."""
    like = tokenizers.Tokenizer(models.BPE())
    like.pre_tokenizer = SPLITS[pre]()
    like.normalizer = normalizers.NFC() if pre == "qwen2" else None
    written = json.loads(like.to_str())
    return all(tokenizer[part] == written[part] for part in ("pre_tokenizer", "normalizer"))
