"""What a command cannot do is said in a sentence that names it, with exit code 2, before anything is written."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.stages.tiny_runs import tiny

CHAT = {"messages": [{"role": "user", "content": "Sea?"}, {"role": "assistant", "content": "Ships."}]}
CHATS = [
    json.dumps({"messages": [{"role": "user", "content": f"Sea {n}?"}, CHAT["messages"][1]]})
    for n in range(9)
]
FILES = {  # that the flags below name; one that ends in / is a folder
    "empty.txt": "",
    "short.txt": "To be.\nOr not.\n",
    "latin.txt": b"caf\xe9 " * 500,
    "text.pdf": b"%PDF \xe2",
    "ids.bin": bytes(2000),
    "photos/photo.jpg": b"\xff\xd8\xff\xe1",
    "nothing/": "",
    "broken.jinja": "{% if %}",
    "chats.jsonl": "\n".join(CHATS),
    "no-json.jsonl": f'{CHATS[0]}\n{{"messages": [{{"role": "user", "content": "a"}}',
    "mixed.jsonl": f'{CHATS[0]}\n{{"prompt": "a"}}',
    "role.jsonl": f'{CHATS[0]}\n{{"messages": [{{"role": "usr", "content": "a"}}]}}',
    "strange/mine.txt": "mine",
    "full/config.json": "{}",
    "theirs/config.json": '{"model_type": "mamba"}',
    "folder.gguf/": "",
    "peft/adapter_config.json": "{}",
    "bad.gguf": b"PK\x03\x04 is another kind of file",
}
NO_MODEL = [
    ("--model nowhere", "There is no model at nowhere; a model is a run folder"),
    ("--model nothing", "holds no model that is known here"),
    ("--model peft", "peft holds no model that is known here"),
    ("--model short.txt", "holds no model that is known here"),
    ("--model shakespeare", "is a text, not a model"),
    ("--model gone.gguf", r"There is no model at gone\.gguf"),
    ("--model theirs", "model_type 'mamba'"),
    ("--model bad.gguf", "does not begin with GGUF"),
    ("--model smollm2", "There is no model at smollm2.*Did you mean 'smollm2-135m-instruct'"),
]
BROKEN_ROWS = [
    ("--data no-json.jsonl", r"no-json\.jsonl:2 is not JSON"),
    (
        "--data mixed.jsonl",
        r"mixed\.jsonl:2 is of the kind prompt/completion, and mixed\.jsonl:1 was messages",
    ),
    ("--data role.jsonl", r"role\.jsonl:2: message 1 of `messages` has the role 'usr'"),
]
BAD: dict[str, list[tuple[str, str]]] = {  # flags, and a pattern of the sentence
    "train": [
        ("dmeo", r"Error parsing \[PRESET\]: There is no preset 'dmeo'\. Did you mean 'demo'"),
        ("--steps 0", "--steps: .*at least 1.*'0'"),
        ("--steps many", "--steps: .*integer.*'many'"),
        ("--max-time 3days", "--max-time: .*90s, 3m or 1h30m"),
        ("--max-time 0s", "--max-time: .*above 0"),
        ("--learning-rate -1", "--learning-rate: .*above 0"),
        ("--warmup 2", "--warmup: .*between 0 and 1"),
        ("--optimizer moun", "--optimizer: .*Did you mean 'muon'"),
        ("--device gpuu", "--device: .*Did you mean 'gpu'"),
        ("--dtype float16", "--dtype: .*bfloat16, float32"),
        ("--seed -1", "--seed: .*between 0"),
        ("--eval-every often", "--eval-every: .*30s"),
        ("--max-tiem 3m", "--max-tiem.*--max-time"),
        ("--batch 6 --accumulate 4", "batch of 6.*4 equal parts"),
        ("--schedule wsd --warmup 0.8 --decay 0.8", "longer than the run"),
        ("--tokenizer bpe:12", "bpe:N.*257"),
        ("--tokenizer nowhere", "--tokenizer.*tokenizer.json.*nowhere|nowhere.*tokenizer.json"),
        ("--data shakespear", "shakespear.*Did you mean 'shakespeare'"),
        ("--data smollm2-135m-instruct", "is a model, not a text"),
        ("--data gone.txt", "There is no text at"),
        ("--data empty.txt", "is empty"),
        ("--data nothing", "holds no text files"),
        ("--data photos", r"holds no text files, only others: 1 \.jpg\."),
        ("--data short.txt", "shorter context"),
        ("--data latin.txt", "not UTF-8.*0xE9 at position 3"),
        ("--data text.pdf", r"text.pdf is not UTF-8 text.*\.jsonl"),
        ("--data ids.bin --tokenizer bpe:300", "--tokenizer FOLDER"),
        ("--validation nowhere.txt", r"nowhere\.txt"),
        ("--context 100000", "shorter context"),
        ("--out-dir full", "not a run folder"),
        ("--out-dir full --overwrite", "not a run folder"),
        ("--out-dir short.txt", "is a file"),
        ("--out-dir /proc/thrice", "/proc/thrice"),  # may not be written
        ("--accelerator h100 --mesh fsdp=2", "error: --accelerator is what --dry-run --mesh AXES"),
        ("--processes 2", "error: Each of 2 processes wants --process I and --coordinator HOST:PORT"),
        ("--process 0", "are for several processes: give --processes N"),
        ("--processes 2 --process 2 --coordinator h:1", "is one of 0 to 1 when there are 2"),
        ("--mesh data=2", "XLA_FLAGS=--xla_force_host_platform_device_count=2"),
        ("--mesh data=3 --dry-run", "does not divide the 4 rows"),
    ],
    "finetune": [
        ("--train blocks/9/.*", r"'blocks/9/\.\*' matches no parameter\. Did you mean 'blocks/1/"),
        ("--train blocks/(", r"'blocks/\(' is not a pattern"),
        ("--freeze bottom:3", "the model has 2"),
        ("--train head --freeze head", "Nothing is left to train"),
        ("--weights q4 --lora rank=4", "leave --lora out, or them"),
        ("--lora rank=2,targets=w", "there is no target 'w'"),
        ("--lora rank=999", r"A LoRA rank for blocks/0/q must lie between 1 and \d+, not 999"),
        ("--lora rank=2,size=3", "wanted rank=8,alpha=16,targets=q,v"),
        ("--lora rank=0", "A LoRA rank must be at least 1, not 0"),
        ("--lora rank=two", "wanted rank=8,alpha=16,targets=q,v, each once .*, got 'rank=two'"),
        ("--lora rank=2,rank=3", "each once"),
        ("--lora rank=2 --freeze bottom:1", "error: --lora leaves the whole model frozen"),
        ("--base int8 --train head", "--base int8 leaves the whole model frozen"),
        ("--context 65", "--context 65 is more than the 64 tokens"),
        ("--batch 3 --accumulate 2", "error: A batch of 3 cannot be read in 2 equal parts"),
        ("--objective preference", "holds messages data, .*--objective answers fits it"),
        ("--loss orpo", "--loss and --beta are of --objective preference"),
        ("--objective preference --full-loss", "--full-loss is of --objective answers"),
        ("--general shakspeare", r"There is no text at shakspeare\. Did you mean 'shakespeare'"),
        ("--validation gone.jsonl", r"gone\.jsonl does not exist"),
        # before it looks for a model
        ("--model nowhere --data gone.jsonl", r"gone\.jsonl does not exist"),
        ("--data nothing", r"nothing is a folder, and one file is read: join its texts into a \.txt"),
        ("--template gone.jinja", r"gone\.jinja"),
        *BROKEN_ROWS,
        NO_MODEL[-1],
    ],
    "reinforce": [
        ("--task size:3", "There is no task 'size:3'"),
        ("--max-tokens 64", "a lower --max-tokens or shorter prompts"),
        ("--data gone.jsonl", r"There is no file gone\.jsonl"),
    ],
    "evaluate": [
        (
            "--model nowhere --data gone.txt",
            r"There is no text at gone\.txt, nor a file of conversations\. Give .* voice",
        ),  # before it looks for a model
        ("--stride 65", "is at most the window"),
        *BROKEN_ROWS,
        *NO_MODEL,
    ],
    "generate": [
        ("--temperature -1", "--temperature"),
        ("--top-p 1.5", "--top-p"),
        ("--max-tokens 0", "--max-tokens"),
        ("--weights q4 --mesh tensor=2", "is for one device"),
        ("--count 0", "--count"),
        (f"--prompt {'the-sea' * 60}", r"\d{3} tokens, and at most 64 fit"),
        *NO_MODEL,
    ],
    "chat": [
        ("--template gone.jinja", "There is no gone.jinja"),
        ("--template broken.jinja", "The chat template failed with TemplateSyntaxError"),
        ("--top-p 1.5", "--top-p"),
        ("--adapter short.txt", "There is no adapter at"),
        NO_MODEL[0],
    ],
    "export": [
        ("--out full", "full is there already.*--overwrite"),
        ("--out strange", r"strange holds mine\.txt, which no export wrote"),
        ("--out strange --overwrite", r"strange holds mine\.txt"),
        ("--out short.txt", r"short\.txt is a file"),
        ("--out folder.gguf", r"folder\.gguf is a folder"),
        ("--out new --dtype q8_0", "q8_0 is of GGUF"),
        ("--out new --dtype int8", "wanted one of float32"),
        ("--out new.gguf --adapter", "goes with neither"),
        ("--out new --adapter --dtype float16", "goes with neither"),
        ("--out new --adapter", "no LoRA adapters"),
        ("--out new --base-name Org/Sea", "it goes with --adapter"),
        ("", "--out"),
        *((f"--out new {flags}", sentence) for flags, sentence in NO_MODEL[-3:]),
    ],
    "serve": [
        ("--model gone", "There is no model at"),
        ("--host 127.0.0.1.1 --api-key a", "There is no address"),
        ("--template gone.jinja", "There is no gone.jinja"),
        ("--template broken.jinja", "TemplateSyntaxError"),
        ("--capacity 65", "between 2 and the model's context of 64"),
        ("--slots 0", "--slots"),
        ("--weights int4", "--weights"),
        ("--weights q4 --mesh tensor=2", "is for one device"),
        ("--port 65536", "--port"),
        ("--price -1", "--price"),
        ("--queue -1", "--queue"),
        ("--log loud", "--log"),
        (
            "--adapter ..=short.txt",
            r"--adapter: wanted a name of letters, .*not \. or \.\. alone, got '\.\.'",
        ),
        ("--name a,b/../c", r"--name: wanted a name of letters, .* got '\.\.'"),
        *(
            (f"--allow-origin {origin}", "--allow-origin")
            for origin in ("*", "null", "app.example", "https://app.example/x")
        ),
    ],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("stage", "flags", "sentence"), [(stage, *case) for stage, cases in BAD.items() for case in cases]
)
def test_what_cannot_be_is_said_before_anything_is_written(
    stage: str,
    flags: str,
    sentence: str,
    trained: Any,
    text: Any,
    tmp_path: Any,
    failing: Any,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in FILES.items():
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
    before, model = contents(tmp_path), ["--model", trained]
    words = {
        "train": tiny(text, tmp_path / "run", "--steps", 2),
        "finetune": [*model, "--data", "chats.jsonl", "--out-dir", "run", "--steps", 2],
        "reinforce": [*model, "--task", "length:3", "--out-dir", "run", "--rounds", 2],
        "serve": [*model, "--port", 0],
    }.get(stage, model)
    words = words[1:] if flags and not flags.startswith("--") else words  # another preset
    name = f"stages.{stage}" if stage in ("generate", "chat", "export") else f"stages.{stage}.__main__"
    error = re.sub(r"[│╭╮╰╯─\s]+", " ", failing(importlib.import_module(name).main, [*words, *flags.split()]))
    assert re.search(sentence, error), error
    assert contents(tmp_path) == before
