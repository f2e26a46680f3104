"""Reads the tokenizer of a Hugging Face folder, its chat template, and the ends of completions."""

from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import UserError
from engine.storage.untrusted import build_tokenizer, quote, read_json_object, read_text

LARGEST = 64 * 2**20  # bytes of a tokenizer.json; the largest of these families has 17 million


def read_tokenizer(
    path: Path, fields: dict[str, Any], vocab: int
) -> tuple[tokenizers.Tokenizer, dict[str, Any], tuple[int, ...]]:
    """Returns a folder's tokenizer, its config, and the ids of which any ends a completion, the tokenizer's own first.

    `fields`: of config.json. Raises UserError when a file is missing or damaged, or a token is not among the `vocab`.
    """
    source = path / "tokenizer.json"
    if not source.is_file():
        other = next((name for name in ("tokenizer.model", "vocab.json") if (path / name).exists()), None)
        instead = f", only {other}: save the model's fast tokenizer, which writes one" if other else ""
        raise UserError(f"{path} has no tokenizer.json{instead}.")
    text = read_text(source, LARGEST)
    tokenizer = build_tokenizer(lambda: tokenizers.Tokenizer.from_str(text), source)
    config, generation = (
        read_json_object(path / name) if (path / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    config |= {"chat_template": _template(path, config)}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if isinstance(config.get(name), dict):
            config[name] = config[name].get("content")
    end = generation.get("eos_token_id", fields.get("eos_token_id"))
    ends = end[:64] if isinstance(end, list) else [] if end is None else [end]
    for token in ends:
        if type(token) is not int or not 0 <= token < vocab:
            raise UserError(f"{path}: eos_token_id should be ids below {vocab:,}, not {quote(token)}.")
    if config.get("eos_token") is None and ends:
        config["eos_token"] = tokenizer.id_to_token(ends[0])
    eos = config.get("eos_token")
    if eos is None:
        raise UserError(f"{path} does not say which token ends a text: neither eos_token nor eos_token_id is given.")
    own = tokenizer.token_to_id(eos) if isinstance(eos, str) else None
    if own is None:
        raise UserError(f"{path}: the tokenizer has no token {quote(eos)}, its own eos_token.")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab:
        raise UserError(f"{source} has a token {largest:,} and the model only {vocab:,}: they do not belong together.")
    known = {name: value for name, value in config.items() if value is not None}
    return tokenizer, known, tuple(dict.fromkeys((own, *ends)))


def _template(path: Path, config: dict[str, Any]) -> str | None:
    """Returns the chat template: from its own file, or the only or default one of tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"{path / 'tokenizer_config.json'}: chat_template should be text.")
    return template
