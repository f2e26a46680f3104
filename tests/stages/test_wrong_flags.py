"""What a command cannot do is said in a sentence that names it, with exit code 2, before anything is written."""

import importlib
import json
import re
from typing import Any

import pytest
from tiny_runs import tiny

BAD: dict[str, list[tuple[str, str]]] = {  # flags, and a pattern of the sentence
    "train": [
        ("dmeo", r"Error parsing \[PRESET\]: There is no preset 'dmeo'\. Did you mean 'demo'"),
        ("--steps 0", "--steps: .*at least 1.*'0'"),
        ("--steps many", "--steps: .*integer.*'many'"),
        ("--max-time 3days", "--max-time: .*90s, 3m or 1h30m"),
        ("--max-time 0s", "--max-time: .*above 0"),
        ("--learning-rate -1", "--learning-rate: .*above 0"),
        ("--warmup 2", "--warmup: .*from 0 to 1"),
        ("--optimizer moun", "--optimizer: .*Did you mean 'muon'"),
        ("--device gpuu", "--device: .*Did you mean 'gpu'"),
        ("--dtype float16", "--dtype: .*bfloat16, float32"),
        ("--seed -1", "--seed: .*from 0"),
        ("--eval-every often", "--eval-every: .*30s"),
        ("--max-tiem 3m", "--max-tiem.*--max-time"),
        ("--batch 6 --accumulate 4", "batch of 6.*4 equal parts"),
        ("--schedule wsd --warmup 0.8 --decay 0.8", "longer than the run"),
        ("--tokenizer bpe:12", "bpe:N.*257"),
        ("--tokenizer nowhere", "--tokenizer.*tokenizer.json.*nowhere|nowhere.*tokenizer.json"),
        ("--data shakespear", "shakespear.*Did you mean 'shakespeare'"),
        ("--data smollm2-135m-instruct", "is a model, not a text"),
        ("--validation nowhere.txt", r"nowhere\.txt"),
        ("--context 100000", "shorter context"),
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
        ("--lora rank=2,targets=w", "there is no target 'w'"),
        ("--lora rank=999", r"A LoRA rank for blocks/0/qkv must lie between 1 and \d+, not 999"),
        ("--lora rank=2,size=3", "wanted rank=8,alpha=16,targets=q,v"),
        ("--lora rank=0", "wanted an integer from 1 to 4096"),
        ("--lora rank=2 --freeze bottom:1", "error: --lora leaves the whole model frozen"),
        ("--base int8 --train head", "--base int8 is for what stays frozen"),
        ("--context 65", "--context 65 is more than the 64 tokens"),
        ("--batch 3 --accumulate 2", "error: A batch of 3 cannot be read in 2 equal parts"),
        ("--objective preference", "holds messages data, .*--objective answers fits it"),
        ("--general shakspeare", r"There is no text at shakspeare\. Did you mean 'shakespeare'"),
        ("--validation gone.jsonl", r"gone\.jsonl does not exist"),
        ("--template gone.jinja", r"gone\.jinja"),
        ("--model smolm2", "There is no model at smolm2"),
    ],
    "reinforce": [
        ("--task size:3", "There is no task 'size:3'"),
        ("--max-tokens 64", "a lower --max-tokens or shorter prompts"),
        ("--data gone.jsonl", r"There is no file gone\.jsonl"),
    ],
    "evaluate": [
        ("--model nowhere --data gone.txt", r"There is no text at gone\.txt"),  # before it looks for a model
        ("--stride 65", "is at most the window"),
    ],
    "generate": [
        ("--temperature -1", "--temperature"),
        ("--top-p 0", "--top-p"),
        ("--max-tokens 0", "--max-tokens"),
        ("--count 0", "--count"),
    ],
    "chat": [
        ("--template gone.jinja", "cannot be read"),
        ("--template broken.jinja", "The chat template failed with TemplateSyntaxError"),
        ("--top-p 0", "--top-p"),
        ("--model gone", "There is no model"),
    ],
    "serve": [
        ("--model gone", "There is no model at"),
        ("--host 127.0.0.1.1 --api-key a", "There is no address"),
        ("--template gone.jinja", "cannot be read"),
        ("--template broken.jinja", "TemplateSyntaxError"),
        ("--capacity 65", "between 2 and the model's context of 64"),
        ("--slots 0", "--slots"),
        ("--weights int4", "--weights"),
        ("--port 65536", "--port"),
        ("--price -1", "--price"),
        ("--queue -1", "--queue"),
        ("--log loud", "--log"),
        *((f"--allow-origin {origin}", "--allow-origin") for origin in ("*", "null", "app.example", "https://app.example/x")),
    ],
}


@pytest.mark.parametrize(("stage", "flags", "sentence"), [(stage, *case) for stage, cases in BAD.items() for case in cases])
def test_what_cannot_be_is_said_before_anything_is_written(
    stage: str, flags: str, sentence: str, trained: Any, text: Any, tmp_path: Any, failing: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{% if %}")
    rows = [[{"role": "user", "content": f"Sea {n}?"}, {"role": "assistant", "content": "Ships."}] for n in range(9)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    model = ["--model", trained]
    words = {
        "train": tiny(text, tmp_path / "run", "--steps", 2),
        "finetune": [*model, "--data", "chats.jsonl", "--out-dir", "run", "--steps", 2],
        "reinforce": [*model, "--task", "length:3", "--out-dir", "run", "--rounds", 2],
        "serve": [*model, "--port", 0],
    }.get(stage, model)
    words = words[1:] if not flags.startswith("--") else words  # another preset
    name = f"stages.{stage}" if stage in ("evaluate", "generate", "chat") else f"stages.{stage}.__main__"
    error = re.sub(r"[│╭╮╰╯─\s]+", " ", failing(importlib.import_module(name).main, [*words, *flags.split()]))
    assert re.search(sentence, error), error
    assert {path.name for path in tmp_path.iterdir()} == {"broken.jinja", "chats.jsonl"}
