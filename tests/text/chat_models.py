"""Tokenizers with control tokens, and templates as models bring them, for the tests of chat."""

import functools
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from engine.text.tokenizer import ModelTokenizer, Tokenizer, train_bpe
from tests.tiny import lively_params, tiny_config

PROSE = (
    "Hello there, how are you? I am well. The assistant answers what the user asks; the system "
    "says how. 1234 " * 5
)
START, END = "<|im_start|>", "<|im_end|>"

# Takes the role's name into a control token, and strips what was thought from all turns but the
# last, as Qwen 3 does.
THINKING = """{%- for message in messages %}
{%- if message.role == 'assistant' and not loop.last %}
{{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Answers begin without a mark of their own, content is trimmed, and a second control token ends the
# whole.
BRACKETS = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant, please') }}{% endif %}{% endfor %}"""


@functools.cache
def chat_tokenizer(template: str | None = None) -> Tokenizer:
    """BPE with ChatML's control tokens, and one that stands for another's end."""
    plain = train_bpe([PROSE], 330)
    inner = tokenizers.Tokenizer.from_str(plain.inner.to_str())
    inner.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (START, END, "<s>", "</s>")]
    )
    config: dict[str, Any] = {"eos_token": END, "bos_token": "<s>"} | (
        {"chat_template": template} if template else {}
    )
    return Tokenizer(inner, config)


def save_chat_model(folder: Path, **sizes: Any) -> None:
    """Saves the tiny model with ChatML's control tokens, as `--model` takes it."""
    from engine.storage.huggingface import save_folder

    folder.mkdir(exist_ok=True)
    tokenizer = chat_tokenizer()
    cfg = tiny_config(vocab=tokenizer.vocab, **sizes)
    save_folder(
        folder, cfg, lively_params(cfg), ModelTokenizer(tokenizer, (tokenizer.eos_id,), {}), dtype="float32"
    )


def talk(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant in order."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]


def plainly(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens as a tokenizer makes them that takes control tokens wherever it reads them."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    inner.encode_special_tokens = False
    return inner.encode(text, add_special_tokens=False).ids
