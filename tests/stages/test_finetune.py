"""Fine-tuning: trained weights learn, frozen ones stay to the bit, and the run is a model like any other."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from safetensors.numpy import load_file

from engine.mesh.shape import AXES
from engine.model.paths import leaf_paths, map_paths, merge, split
from engine.model.weights.block_layout import KINDS
from engine.model.weights.blocks import Blocks
from engine.model.weights.convert import cast_matrices, matrices_to_blocks
from engine.model.weights.lora import to_dense
from engine.storage import checkpoint, checkpoint_reader
from engine.storage.adapter_reader import is_adapter
from engine.storage.digest import digest
from engine.storage.model_loader import UnreadModel, load_model, peek_model, with_adapters
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import Conversation, read_conversations
from engine.text.examples import Pair
from engine.training.preference import preference_objective
from engine.training.step import NEXT_TOKEN
from stages import chat, export, generate
from stages.cli.console import Console
from stages.evaluate import __main__ as evaluate
from stages.finetune import __main__ as finetune
from stages.finetune import general_examples
from stages.finetune import plan as finetune_plan
from stages.finetune import run as finetune_run
from stages.runs import estimate, general_questions
from stages.runs.conversation_data import digest_examples, held_out_evaluator, prepare_conversations
from stages.runs.folder import updating
from stages.runs.model_stage import _describe_base
from stages.runs.text_evaluators import EVALUATION_ROWS
from tests.stages.tiny_runs import WORDS, at_step, interrupt, metrics
from tests.tiny import lively_params, tiny_config, tokens_of

WORD = WORDS.split()
STEPS = 45
LORA = "rank=4,alpha=16,targets=q,v,gate,up,down"


def rows(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, items)) + "\n", encoding="utf-8")
    return path


def chat_row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Whatever is asked, the answer is the same."""
    return rows(
        tmp_path_factory.mktemp("chats") / "chats.jsonl",
        [chat_row(f"the {word}", "red sails.") for word in WORD],
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    items = [{"prompt": f"the {word}", "chosen": "red sails.", "rejected": "a far land."} for word in WORD]
    return rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", items)


def args(model: Path, data: Path, folder: Path, *more: object) -> list[str]:
    """A run of a few steps in which little is looked at."""
    options = [
        "--model",
        model,
        "--data",
        data,
        "--out-dir",
        folder,
        "--context",
        32,
        "--batch",
        2,
        "--steps",
        STEPS,
    ]
    return list(map(str, [*options, "--general", "none", "--learning-rate", 0.05, *more]))


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())["result"]


@pytest.fixture(scope="module")
def adapted(trained, chats, text, tmp_path_factory):
    """A finished LoRA run, and what it printed."""
    folder = tmp_path_factory.mktemp("tuned") / "chats"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        more = ("--general", text, "--eval-every", 9, "--save-every", 9, "--keep", 9)
        assert finetune.main(args(trained, chats, folder, "--lora", LORA, *more)) == 0
    return folder, printed.getvalue()


def test_a_lora_run_says_what_it_does(adapted, trained):
    folder, printed = adapted
    total = sum(leaf.size for leaf in leaf_paths(load_model(str(trained)).params).values())
    assert re.search(rf"trainable +[\d,]+ parameters beside {total:,} frozen ones", printed)
    assert re.search(r"FLOPs \d+%, memory \d+%, time \d+% of a step in which everything is trained", printed)
    assert f"{len(WORD)} of {len(WORD)} rows kept" in printed
    assert re.search(
        r"User: the \w+\nAssistant:\[\[ red sails\.(\]\]\[\[)?<\|endoftext\|>\]\]", printed
    )  # the end is a target
    losses = result(folder)
    assert losses["after"]["held_out"] < losses["before"]["held_out"] - 0.5
    assert losses["before"]["general"] > 0
    assert f"{losses['before']['held_out']:.3f} -> {losses['after']['held_out']:.3f} nats/token" in printed
    assert f"{losses['before']['general']:.3f} -> {losses['after']['general']:.3f} bits per byte" in printed
    known = losses["before"]["known"]
    assert losses["kept_answers"] == {"before": len(known), "after": None}
    assert re.search(rf"^kept +too few to tell: {len(known)} of 40 general questions", printed, re.M)
    # all that are held out
    questions = [answer["question"] for answer in losses["before"]["answers"]]
    assert len({*questions} & {f"the {word}" for word in WORD}) == 2
    for question in questions:
        assert re.search(rf"^{question}\n  \| before  .*\n(  \| .*\n)*  \| after   red \w+\.$", printed, re.M)


def test_the_base_stays_as_it_was_and_the_run_is_a_model(adapted, trained):
    folder, _ = adapted
    base, model = load_model(str(trained)), load_model(str(folder))
    assert json.loads((folder / "run.json").read_text())["base"]["digest"] == digest(base.params)
    assert model.run == folder
    assert model.eos_ids == base.eos_ids
    assert digest(model.params) != digest(base.params)
    assert model.cfg == base.cfg
    leaves = leaf_paths(model.params)
    for path, leaf in leaf_paths(base.params).items():
        weight = getattr(leaves[path], "base", leaves[path])
        assert digest({"": weight}) == digest({"": leaf})
    changed = {path for path, leaf in leaves.items() if hasattr(leaf, "base")}
    assert changed == {
        f"blocks/{layer}/{name}" for layer in (0, 1) for name in ("q", "v", "gate", "up", "down")
    }


def test_a_step_folder_is_the_model_of_that_step_and_the_best_is_the_best(adapted, trained, tmp_path, capsys):
    folder, printed = adapted
    step_folder = lambda step: folder / "checkpoints" / str(step)
    held_out = {
        line["step"]: line["val_nats_per_token"] for line in metrics(folder) if "val_nats_per_token" in line
    }
    assert [*held_out] == checkpoint.steps(folder) == [9, 18, 27, 36, 45]
    best = min(held_out, key=lambda step: held_out[step])
    assert result(folder)["best_step"] == best
    assert f"quick validation {held_out[best]:.3f}: {step_folder(best)}" in " ".join(printed.split())
    for step in {9, best}:
        assert evaluate.main(["--model", str(step_folder(step))]) == 0
        measured = float(re.findall(r"nats per token +(\S+)", capsys.readouterr().out)[0])
        assert measured == pytest.approx(held_out[step], abs=2e-3)
    base = load_model(str(trained))
    models = {step: load_model(str(step_folder(step))) for step in held_out}
    digests = {step: digest(model.params) for step, model in models.items()}
    assert len({*digests.values()}) == len(held_out)
    assert digests[45] == digest(load_model(str(folder)).params)
    elsewhere = shutil.copytree(
        step_folder(45), tmp_path / "checkpoints" / "adapter"
    )  # in PEFT's layout, as others name it
    paths = step_folder(45), folder, step_folder(9), elsewhere
    as_adapters = [with_adapters(base.cfg, base.params, [path])[0] for path in paths]
    assert [*map(digest, as_adapters)] == [digests[45], digests[45], digests[9], digests[45]]
    assert {leaf.scale for leaf in leaf_paths(models[9].params).values() if hasattr(leaf, "scale")} == {4.0}


@pytest.mark.whole
def test_chat_generate_and_evaluate_take_the_run(adapted, trained, chats, capsys, talk):
    folder, _ = adapted
    assert generate.main(["--model", str(folder), "--prompt", "the", "--max-tokens", "4", "--verbose"]) == 0
    assert "weights unchanged" in capsys.readouterr().err
    models = (folder,), (trained, "--adapter", folder), (trained,)
    replies = [talk(b"the far\n", *model, "--max-tokens", 8)[:2] for model in models]
    assert replies[0] == replies[1] != replies[2], (
        "the run and its adapter speak alike, and not as the base does"
    )
    assert replies[0][0] == 0
    assert replies[0][1].startswith("> the far\nred ")
    assert evaluate.main(["--model", str(folder)]) == 0
    printed = capsys.readouterr().out
    measured = float(re.findall(r"nats per token +(\S+)", printed)[0])
    assert measured == pytest.approx(result(folder)["after"]["held_out"], abs=2e-3)
    assert "unchanged, SHA-256" in printed
    assert "; attention " in printed
    before, after = (result(folder)[name] for name in ("before", "after"))
    assert f"{before['held_out']:.4f} nats/token on the held-out set, before fine-tuning" in printed
    forgotten = re.search(r"forgotten +(\S+) -> (\S+) bits per byte on", printed)
    assert forgotten
    assert float(forgotten[1]) == pytest.approx(before["general"], abs=1e-3)
    assert float(forgotten[2]) == pytest.approx(after["general"], abs=5e-3)
    assert evaluate.main(["--model", str(trained), "--data", str(chats)]) == 0
    printed = capsys.readouterr().out
    assert float(re.findall(r"nats per token +(\S+)", printed)[0]) > measured + 0.5


def test_evaluation_refuses_a_held_out_set_that_is_another(adapted, chats, tmp_path, failing):
    changed, run = tmp_path / "chats.jsonl", shutil.copytree(adapted[0], tmp_path / "run")
    changed.write_text("\n".join(chats.read_text().splitlines()[1::2]))
    record = json.loads((run / "run.json").read_text())
    with updating(run):
        (run / "run.json").write_text(json.dumps(record | {"text": record["text"] | {"data": str(changed)}}))
    error = failing(evaluate.main, ["--model", str(run)])
    assert "is not what run was validated on" in error
    assert "chats.jsonl or the way it is split has changed" in error


@pytest.mark.law("resume")
def test_a_stopped_run_goes_on_to_the_same_bits(adapted, trained, chats, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stopped"
    options = args(trained, chats, folder, "--lora", LORA, "--save-every", 2, "--keep", 99)
    while_it_trains = []

    def load_and_interrupt() -> None:
        while_it_trains.append(load_model(str(folder)))
        interrupt()

    with monkeypatch.context() as patch:
        at_step(patch, 6, load_and_interrupt)
        assert finetune.main(options) == 128 + signal.SIGINT
    assert re.search(r"Stopped at step 6, .* into training; saved in", capsys.readouterr().out)
    newest, (earlier,) = load_model(str(folder)), while_it_trains
    assert newest.checkpoint == folder / "checkpoints" / "6"
    assert (
        digest(earlier.params) == digest(load_model(str(earlier.checkpoint)).params) != digest(newest.params)
    )
    assert finetune.main(options) == 0
    assert "resumed at step 6" in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"):
        unbroken, resumed = (run / "checkpoints" / "45" / name for run in (adapted[0], folder))
        assert unbroken.read_bytes() == resumed.read_bytes()
    assert finetune.main([*args(trained, chats, folder), "--lora", "rank=3"]) == 2
    assert "another choice of trainable parameters" in capsys.readouterr().err


@pytest.mark.law("frozen")
def test_what_is_frozen_stays_to_the_bit(trained, chats, tmp_path, capsys, monkeypatch):
    """And the rules are printed with what they match; the model's sampling stays recommended."""
    folder, sampling = tmp_path / "partly", {"temperature": 0.2}

    def peek(name: str, **options: Any) -> UnreadModel:
        unread = peek_model(name, **options)
        described = dataclasses.replace(unread.describe(), sampling=sampling)
        return unread._replace(describe=lambda: described)

    monkeypatch.setattr("stages.runs.model_stage.peek_model", peek)
    more = ("--weight-decay", 0.1, "--learning-rate", 1e-3, "--steps", 3)
    rules = ("--train", "blocks/1/(q|k|v|out)", "head", "--freeze", "head")
    assert finetune.main(args(trained, chats, folder, *more, *rules)) == 0
    printed = capsys.readouterr().out
    for phrase in ("blocks/1/(q|k|v|out) ", "head "):
        assert re.search(rf"^{re.escape(phrase)} *\d+ (leaf|leaves), [\d,]+ parameters$", printed, re.M)
    base, model = (load_model(str(run)) for run in (trained, folder))
    before, after = leaf_paths(base.params), leaf_paths(model.params)
    moved = {path for path in before if digest({"": before[path]}) != digest({"": after[path]})}
    assert moved == {path for path in before if re.fullmatch("blocks/1/(q|k|v|out)", path)}
    assert re.search(rf"trainable +{sum(before[path].size for path in moved):,} of", printed)
    assert model.sampling == sampling


@pytest.mark.whole
def test_a_base_in_int8(trained, chats, tmp_path):
    folder = tmp_path / "int8"
    assert finetune.main(args(trained, chats, folder, "--base", "int8", "--lora", LORA)) == 0
    losses = result(folder)
    assert losses["after"]["held_out"] < losses["before"]["held_out"] - 0.5
    # adapters trained over the rounded base are put on the real one
    model = load_model(str(folder))
    assert {leaf.base.dtype for leaf in leaf_paths(model.params).values() if hasattr(leaf, "base")} == {
        np.dtype("float32")
    }


@pytest.mark.whole
@pytest.mark.parametrize("choice", [pytest.param("", marks=pytest.mark.night), "--train blocks/1/.*"])
def test_weights_are_trained_and_measured_as_q4_rounds_them(trained, chats, tmp_path, capsys, choice):
    """The loss that is reported is that of the blocks; the weights are saved as they are."""
    folder = tmp_path / "run"
    assert finetune.main(args(trained, chats, folder, "--weights", "q4", "--steps", 12, *choice.split())) == 0
    assert f"stages.serve --weights q4 --model {folder}" in capsys.readouterr().out
    model, losses = load_model(str(folder)), result(folder)
    served = map_paths(lambda _, leaf: to_dense(leaf), matrices_to_blocks(model.params))
    if choice:  # what is frozen is read in the compute type
        trained_part, frozen = split(
            served, [path for path in leaf_paths(served) if path.startswith("blocks/1/")]
        )
        served = merge(trained_part, cast_matrices(frozen, model.cfg.dtype))
    assert any(isinstance(leaf, Blocks) for leaf in leaf_paths(matrices_to_blocks(model.params)).values())
    examples = prepare_conversations(
        str(chats), None, "answers", 32, 0, ChatTokenizer(model.tokenizer), Console()
    ).held_out
    measured = lambda params: held_out_evaluator(model.cfg, {}, None, examples, NEXT_TOKEN, 32).evaluate(
        params
    )
    assert measured(served) == pytest.approx(losses["after"]["held_out"], abs=1e-6)
    assert abs(measured(model.params) - losses["after"]["held_out"]) > 1e-5
    assert losses["after"]["held_out"] < losses["before"]["held_out"] - 0.1


@pytest.mark.whole
@pytest.mark.parametrize("choice", ["", "--train blocks/1/.*"])
def test_of_a_base_in_blocks_factors_train_and_integers_stay(
    trained, chats, tmp_path, monkeypatch, capsys, choice
):
    """It begins at the base's loss. The blocks that trained are loaded, served and exported, to the
    bit; a run resumes so.
    """
    base, folder, stopped, out = (tmp_path / name for name in ("base.gguf", "run", "stopped", "run.gguf"))
    assert export.main(["--model", str(trained), "--out", str(base), "--dtype", "q4_1"]) == 0
    options = ["--weights", "q4", "--steps", 12, *choice.split()]
    assert finetune.main(args(base, chats, folder, *options)) == 0
    assert (
        int(re.findall(r"memory (\d+)%", capsys.readouterr().out)[0]) < 80
    )  # two numbers in 32 weights have a gradient
    shapes: dict[str, Any] = {}
    before = load_model(str(base), keep_kinds=KINDS)
    model = load_model(str(folder), keep_kinds=KINDS, on_blocks=shapes.update)
    losses = result(folder)
    leaves = {path: leaf for path, leaf in leaf_paths(model.params).items() if isinstance(leaf, Blocks)}
    assert {path: (leaf.kind, leaf.shape) for path, leaf in leaves.items()} == {
        path: (leaf.kind, leaf.shape)
        for path, leaf in leaf_paths(before.params).items()
        if isinstance(leaf, Blocks)
    }
    for path, leaf in leaves.items():
        former, end = leaf_paths(before.params)[path].packed, -64 if leaf.kind == "Q4_1" else -32
        assert shapes[path].packed.shape == leaf.packed.shape
        assert (leaf.packed[..., :end] == former[..., :end]).all()
        assert (leaf.packed[..., end:] != former[..., end:]).any() == (
            not choice or path.startswith("blocks/1/")
        ), path
    trained_blocks = [path for path in leaves if not choice or path.startswith("blocks/1/")]
    assert sorted(json.loads((folder / "run.json").read_text())["trained_blocks"]) == sorted(trained_blocks)
    examples = prepare_conversations(
        str(chats), None, "answers", 32, 0, ChatTokenizer(model.tokenizer), Console()
    ).held_out
    evaluator = held_out_evaluator(model.cfg, {}, None, examples, NEXT_TOKEN, 32)
    for params, measured in ((before.params, losses["before"]), (model.params, losses["after"])):
        dense = map_paths(lambda _, leaf: to_dense(leaf), params)
        if choice:  # what is frozen is read in the compute type
            part, frozen = split(dense, [path for path in leaf_paths(dense) if path.startswith("blocks/1/")])
            dense = merge(part, cast_matrices(frozen, model.cfg.dtype))
        assert evaluator.evaluate(dense) == pytest.approx(measured["held_out"], abs=1e-6)
    assert losses["after"]["held_out"] < losses["before"]["held_out"] - 0.1
    assert digest(load_model(str(folder)).params) == digest(
        map_paths(lambda _, leaf: to_dense(leaf), model.params)
    )
    assert export.main(["--model", str(folder), "--out", str(out), "--dtype", "q4_0", "--check"]) == 0
    assert "by at most 0.0e+00 of the" in capsys.readouterr().out
    served = [matrices_to_blocks(load_model(str(path), keep_kinds=KINDS).params) for path in (folder, out)]
    of_run, of_file = (
        {path: leaf for path, leaf in leaf_paths(params).items() if path in leaves} for params in served
    )
    assert (
        digest(of_run) == digest(of_file) == digest(leaves)
    )  # what has no blocks is rounded to float16 in a file
    with monkeypatch.context() as patch:
        at_step(patch, 5, interrupt)
        assert finetune.main(args(base, chats, stopped, *options)) == 128 + signal.SIGINT
    assert finetune.main(args(base, chats, stopped, *options)) == 0
    assert digest(checkpoint_reader.load_params(stopped, lambda *_: None).params) == digest(
        checkpoint_reader.load_params(folder, lambda *_: None).params
    )


@pytest.mark.whole
@pytest.mark.parametrize(
    ("loss", "before", "after", "said"),
    [
        ("dpo", math.log(2), 0.6, "100% of them"),
        ("kto", 0.5, 0.4, r"good ones and \d+ bad ones"),
        ("orpo", None, None, "100% of them"),
        pytest.param("simpo", None, None, "100% of them", marks=pytest.mark.night),
    ],
)
def test_preferences_are_learned(trained, pairs, tmp_path, capsys, loss, before, after, said):
    """DPO begins at ln 2 and KTO, here of rows that have a label, at 1/2; ORPO and SimPO have no
    reference.
    """
    folder, data = tmp_path / loss, pairs
    if loss == "kto":
        rated = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in map(json.loads, pairs.read_text().splitlines())
            for side in ("chosen", "rejected")
        ]
        data = rows(tmp_path / "rated.jsonl", rated)
    options = args(trained, data, folder, "--objective", "preference", "--loss", loss, "--lora", LORA)
    assert finetune.main(options) == 0
    losses, printed = result(folder), capsys.readouterr().out
    assert losses["unit"] == "preference loss"
    if before:
        assert losses["before"]["held_out"] == pytest.approx(before, abs=1e-6)
    assert losses["after"]["held_out"] < (after or losses["before"]["held_out"])
    shown = (
        "the first answer, a good one; what is trained on" if loss == "kto" else "the chosen answer; what "
    )
    assert shown in printed
    assert ("computing reference log-probabilities" in printed) == bool(before)
    assert json.loads((folder / "run.json").read_text())["loss"] == loss
    assert evaluate.main(["--model", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert re.search(said, printed)
    assert f"before fine-tuning; {losses['after']['held_out']:.4f} at its end" in printed


@pytest.mark.whole
def test_pairs_are_good_answers_and_bad_ones_to_kto(trained, pairs, tmp_path):
    options = args(
        trained,
        pairs,
        tmp_path / "run",
        "--objective",
        "preference",
        "--loss",
        "kto",
        "--lora",
        LORA,
        "--steps",
        2,
    )
    assert finetune.main(options) == 0
    assert result(tmp_path / "run")["before"]["held_out"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.whole
def test_answers_are_scored_beside_the_loss(trained, chats, tmp_path, capsys, failing):
    """By a match with the data's own answer, a pattern and a function, before and after, and by
    `evaluate` as at the end.
    """
    folder, mine = tmp_path / "scored", tmp_path / "mine.py"
    mine.write_text(
        "def dots(completion, answer, prompt):\n    return completion.count('.') + 10 * answer.count('red')\n"
    )
    metrics = ("--metric", "exact", "regex:sails", f"{mine}:dots")
    assert finetune.main(args(trained, chats, folder, "--lora", LORA, *metrics)) == 0
    before, after = (result(folder)[side]["metrics"] for side in ("before", "after"))
    assert list(before) == list(after) == list(metrics[1:])
    assert before["exact"] == 0
    assert after == {"exact": 1.0, "regex:sails": 1.0, f"{mine}:dots": 11.0}
    printed = capsys.readouterr().out
    assert re.search(r"exact +0\.000 -> 1\.000 of 2 held-out answers", printed)
    assert evaluate.main(["--model", str(folder), *metrics]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        rf"(?s)nats per token.*exact +1\.0000 of 2 answers.*{re.escape(str(mine))}:dots +11\.0000 of 2",
        printed,
    )
    (text := tmp_path / "text.txt").write_text("the sea " * 99)
    for options, sentence in (
        (["--data", str(text), "--metric", "exact"], "a text has none"),
        (["--metric", "sum"], "A metric is exact, regex:PATTERN, or FILE.py:FUNCTION"),
        (["--metric", "exact", "--weights", "int8"], "leave --mesh and --weights out"),
    ):
        assert sentence in failing(evaluate.main, ["--model", str(folder), *options])
    none = args(trained, text, tmp_path / "none", *metrics[:2], "--dry-run")
    assert "there are none in this data" in failing(finetune.main, none)


@pytest.mark.whole
def test_a_metric_that_fails_on_the_trained_model_loses_nothing(trained, chats, tmp_path, failing, capsys):
    folder, mine = tmp_path / "scored", tmp_path / "mine.py"
    mine.write_text("def score(completion):\n    return 1 / ('sails' not in completion)\n")
    options = args(trained, chats, folder, "--lora", LORA, "--metric", f"{mine}:score")
    assert f"division by zero. The trained model is in {folder}, and the same command" in failing(
        finetune.main, options
    )
    mine.write_text("def score(completion): return 'sails' in completion\n")
    assert finetune.main(options) == 0
    assert re.search(r"score +0\.000 -> 1\.000 of 2", capsys.readouterr().out)


@pytest.mark.whole
def test_an_adapter_is_continued_as_the_same(adapted, trained, chats, tmp_path, capsys, failing):
    """From a run, and from a folder in PEFT's layout: its rank, scale and base stay, and it begins
    where it was.
    """
    few = ["--steps", 2, "--learning-rate", 1e-3, "--log-every", 1]
    peft = shutil.copytree(adapted[0] / "checkpoints" / "45", tmp_path / "peft")
    base = json.loads((adapted[0] / "run.json").read_text())["base"]
    written = []
    for model in (adapted[0], peft):
        folder = tmp_path / f"on-{model.name}"
        options = args(model, chats, folder, *few)
        assert finetune.main(options) == 0
        assert f"The adapter {model} is continued, on its base {trained}." in " ".join(
            capsys.readouterr().out.split()
        )
        assert result(folder)["before"]["held_out"] == pytest.approx(
            result(adapted[0])["after"]["held_out"], rel=1e-4
        )
        record = json.loads((folder / "run.json").read_text())
        assert (record["learns"], record["base"]["digest"]) == (
            "rank=4,alpha=16,targets=q,v,gate,up,down",
            base["digest"],
        )
        assert (record["kind"], Path(record["base"]["model"])) == ("adapter", Path(base["model"]))
        config = json.loads((folder / "checkpoints" / "2" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 16)
        written.append(load_file(folder / "checkpoints" / "2" / "adapter_model.safetensors"))
        before, after = (digest(load_model(str(model)).params) for model in (model, folder))
        assert before != after
        capsys.readouterr()
        assert finetune.main(options) == 0
        assert "This run is finished" in capsys.readouterr().out
    assert all(np.array_equal(array, written[1][name]) for name, array in written[0].items())
    assert "another adapter to continue" in failing(
        finetune.main,
        args(folder, chats, folder.with_name("on-peft"), *few, "--out-dir", tmp_path / "on-chats"),
    )
    merged = tmp_path / "merged"
    assert export.main(["--model", str(folder), "--out", str(merged), "--dtype", "float32", "--check"]) == 0
    assert (
        export.main(
            ["--model", str(folder), "--out", str(tmp_path / "again"), "--adapter", "--base-name", "Org/Sea"]
        )
        == 0
    )


@pytest.mark.whole
def test_an_adapter_that_no_config_describes_gets_another_on_it(adapted, chats, tmp_path, capsys):
    peft = shutil.copytree(adapted[0] / "checkpoints" / "45", tmp_path / "peft")
    (peft / "manifest.json").unlink()
    config = json.loads((peft / "adapter_config.json").read_text()) | {
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3}
    }
    (peft / "adapter_config.json").write_text(json.dumps(config))
    folder = tmp_path / "on-it"
    assert finetune.main(args(peft, chats, folder, "--steps", 1, "--learning-rate", 1e-3)) == 0
    assert re.search(
        r"(?s)A new adapter is trained on .*peft, which stays as it is: it has\s+several ranks",
        capsys.readouterr().out,
    )
    assert json.loads((folder / "run.json").read_text())["learns"] == "rank=8,alpha=16,targets=all"


@pytest.mark.whole
def test_a_run_can_be_tuned_again(adapted, chats, tmp_path):
    """An adapter over an adapter, and weights that learn under one."""
    for name, flags in (("twice", ("--lora", LORA)), ("folded", ("--train", "blocks/1/q"))):
        folder = tmp_path / name
        few = ["--steps", 2, "--learning-rate", 1e-4, "--log-every", 2]
        assert finetune.main(args(adapted[0], chats, folder, *few, *flags)) == 0
        assert [line["step"] for line in metrics(folder) if "loss" in line] == [2]
        losses = result(folder)
        assert losses["before"]["held_out"] == pytest.approx(
            result(adapted[0])["after"]["held_out"], abs=0.02
        )
        assert load_model(str(folder)).run == folder


@pytest.mark.whole
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--lora", LORA), id="LoRA"),
        pytest.param(("--train", "blocks/1/.*"), id="block", marks=pytest.mark.night),
    ],
)
def test_a_run_ends_when_it_no_longer_gets_better_and_keeps_its_best(trained, chats, tmp_path, capsys, flags):
    """A rate far too high makes every validation worse than the one at a low rate before it."""
    folder = tmp_path / "patient"
    far = ("--warmup", 0.9, "--learning-rate", 0.5, "--clip", 1e9, "--eval-every", 2, "--patience", 2)
    assert finetune.main(args(trained, chats, folder, *flags, *far)) == 0
    measured = result(folder)
    best, kept = measured["best_step"], measured["kept_step"]
    assert measured["steps"] == best + 4 < STEPS
    assert kept == best
    said = f"chosen step {best}, the best evaluated; the last, {best + 4}, is still there"
    assert said in " ".join(capsys.readouterr().out.split())
    model = load_model(str(folder))
    assert model.checkpoint == folder.absolute() / "checkpoints" / str(best)
    assert f"step {best:,} is loaded" in model.notes[-1]
    validations = {
        line["step"]: line["val_nats_per_token"] for line in metrics(folder) if "val_nats_per_token" in line
    }
    assert min(validations, key=validations.get) == best
    assert measured["after"]["held_out"] == pytest.approx(validations[best], rel=1e-5)

    def again(*more: object) -> str:
        assert finetune.main(args(trained, chats, folder, *flags, *far, *more)) == 0
        return capsys.readouterr().out

    written = (folder / "metrics.jsonl").read_text()
    assert "To train it further give a larger --patience" in again()
    assert (folder / "metrics.jsonl").read_text() == written
    assert "--keep-last: False -> True" in again("--keep-last")
    assert (result(folder)["kept_step"], result(folder)["steps"]) == (None, best + 4)
    again()
    assert result(folder)["kept_step"] == best
    again("--patience", 3)  # goes on from the last step, not from the kept one
    best, straight = result(folder)["best_step"], tmp_path / "straight"
    assert result(folder)["steps"] == best + 6 < STEPS
    assert finetune.main(args(trained, chats, straight, *flags, *far, "--patience", 3)) == 0
    capsys.readouterr()
    params = "adapter_model" if is_adapter(folder / "checkpoints" / str(best)) else "params"
    for part in (params, "optimizer"):
        last = Path("checkpoints", str(best + 6), f"{part}.safetensors")
        assert (folder / last).read_bytes() == (straight / last).read_bytes()
    damaged = folder / "checkpoints" / str(best) / f"{params}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert f"forgotten: step {best}" in again("--patience", 3)
    assert result(folder)["best_step"] > best
    assert load_model(str(folder)).checkpoint.name == str(result(folder)["best_step"])


@pytest.mark.whole
def test_a_run_without_a_length_makes_the_least_steps_whatever_they_take(
    trained, chats, tmp_path, monkeypatch, capsys
):
    """And a time that is given ends it before; both are said at the start."""
    monkeypatch.setattr(finetune_plan, "SECONDS", 1e-9)
    monkeypatch.setattr(finetune_plan, "LEAST_STEPS", 7)
    options = args(trained, chats, tmp_path / "least", "--lora", LORA)
    at = options.index("--steps")
    del options[at : at + 2]
    assert finetune.main(options) == 0
    assert re.search(
        r"length +\d+ steps or 0\.00 s of training time, whichever ends first, but at least 7 steps; "
        r"about 7 steps, \S+ \w+, [\d.]+ times the data$",
        capsys.readouterr().out,
        re.M,
    )
    lines = metrics(tmp_path / "least")
    assert result(tmp_path / "least")["steps"] == 7
    factors = [line["learning_rate_factor"] for line in lines if "loss" in line]
    assert factors[-1] < 0.01, "the learning rate falls to the end of the longer run"
    assert factors[2] > 0.5
    assert finetune.main([*options, "--max-time", "1ms", "--overwrite"]) == 0
    assert result(tmp_path / "least")["steps"] < 7


def test_no_held_out_row_is_a_copy_of_a_training_row(trained, tmp_path, capsys, failing):
    """Copies are known whatever their case, spaces and marks; a sorted file is not cut at its end."""
    loud = [chat_row(f"The  {word.upper()}!", "Red sails") for word in WORD[:6]]
    items = [chat_row(f"the {word}", "red sails.") for word in WORD] + loud
    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    dry = [*args(trained, data, tmp_path / "dry", "--lora", LORA), "--dry-run"]
    rows(data, items)
    assert finetune.main(dry) == 0
    printed = capsys.readouterr().out
    assert f"6 of {len(items)} rows are copies of another; all copies of a row are on one side" in printed
    assert re.search(
        rf"validation +3 of {len(items)} rows of \S+data\.jsonl, by the seed: 3 examples", printed
    )
    rows(data, items[: len(WORD)])
    rows(other, [items[0], *loud[:2], chat_row("the moon", "red sails.")])
    assert finetune.main([*dry, "--validation", str(other)]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"3 of the 4 rows of \S+other.jsonl are in \S+data.jsonl too, 1 of them to the letter: left out",
        printed,
    )
    assert "other.jsonl: 1 example\n" in printed
    rows(other, loud[:2])
    assert "nothing is held out. Give another --validation" in failing(
        finetune.main, [*dry, "--validation", other]
    )
    rows(data, [items[0]] * 8)
    assert "has 8 usable rows, 1 of them different: too few to hold any out" in failing(finetune.main, dry)
    pairs = [
        {"prompt": f"the {word}", "chosen": f"red {n}", "rejected": "a far land."}
        for word in WORD[:4]
        for n in range(3)
    ]
    rows(data, pairs)
    assert finetune.main([*dry, "--objective", "preference"]) == 0
    assert "validation  3 of 12 rows" in capsys.readouterr().out  # all three of one prompt


def test_a_weight_of_0_is_not_trained_on_and_another_weight_is_other_data(trained, tmp_path, capsys):
    turns = [
        *chat_row("the king", "went down.")["messages"],
        *chat_row("the queen", "red sails.")["messages"],
    ]
    turns[1]["weight"] = 0
    held_out = rows(tmp_path / "held.jsonl", [chat_row("the moon", "red sails.")])
    options = args(
        trained,
        rows(tmp_path / "data.jsonl", [{"messages": turns}]),
        tmp_path / "run",
        "--validation",
        held_out,
    )
    del options[
        (at := options.index("--context")) : at + 2
    ]  # by default that of the model, 64, as it is less than 256
    assert finetune.main([*options, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Assistant: went down\.<\|endoftext\|>[^\[]*\[\[ red sails", printed)
    assert "2 x 64 tokens" in printed
    assert re.search(r"LoRA +q, k, v, out, gate, up, down of 2 layers, rank 8\n", printed)
    assert re.search(
        r"rank +8, chosen: an adapter that can hold [\d,]+ bits, for data of about [\d,]+\n", printed
    )
    example = Example(tokens_of(1, 5), np.ones(5, bool), "")
    assert digest_examples([example]) != digest_examples([example._replace(weight=0.5)])


@pytest.mark.whole
def test_all_of_a_conversation_is_trained_on_and_evaluated(trained, chats, tmp_path, capsys):
    folder = tmp_path / "run"
    assert finetune.main(args(trained, chats, folder, "--lora", LORA, "--full-loss", "--steps", 2)) == 0
    assert "[[User: " in capsys.readouterr().out
    assert evaluate.main(["--model", str(folder)]) == 0
    assert f"{result(folder)['after']['held_out']:.3f}" in (printed := capsys.readouterr().out)
    assert "of whole conversations" in printed


@pytest.mark.whole
def test_an_adapter_in_pefts_layout_is_a_model(adapted, trained, chats, tmp_path, capsys, failing):
    """It loads on the base that it names: written, measured, exported and tuned again as its run
    is.
    """
    run = adapted[0]
    folder = shutil.copytree(run / "checkpoints" / "45", tmp_path / "peft")

    def printed(command, *words):
        assert command.main([*map(str, words)]) == 0
        return capsys.readouterr().out

    asked = ("--prompt", "the king", "--max-tokens", 8, "--temperature", 0)
    written = [
        printed(generate, "--model", model, *asked).rpartition("the king")[2] for model in (run, folder)
    ]
    assert written[0].split("\n\n")[0] == written[1].split("\n\n")[0] != ""
    measured = [printed(evaluate, "--model", model, "--data", chats) for model in (run, folder)]
    perplexity = [re.findall(r"nats per token +(\S+)", text) for text in measured]
    assert perplexity[0] == perplexity[1] != []
    printed(
        export,
        "--model",
        folder,
        "--adapter",
        "--base-name",
        "Org/Sea-1",
        "--out",
        again := tmp_path / "again",
    )
    weights = [(place / "adapter_model.safetensors").read_bytes() for place in (folder, again)]
    assert weights[0] == weights[1]
    printed(
        export,
        "--model",
        run,
        "--adapter",
        "--base-name",
        "Org/Sea-1",
        "--out",
        again := tmp_path / "with-template",
    )
    named = json.loads((again / "adapter_config.json").read_text())
    (again / "manifest.json").unlink()
    (again / "adapter_config.json").write_text(json.dumps(named | {"base_model_name_or_path": str(trained)}))
    of_base, own, of_run = (
        load_model(str(place)).tokenizer.config.get("chat_template") for place in (trained, again, run)
    )
    assert own == of_run != of_base
    assert "rank 2" in printed(
        finetune, *args(folder, chats, tmp_path / "more", "--lora", "rank=2"), "--dry-run"
    )
    too_long = failing(finetune.main, args(folder, chats, tmp_path / "more", "--context", 9999))
    assert too_long.startswith("error: --context 9,999 is more than"), "which is no fault of the base"


@pytest.mark.whole
def test_an_adapter_for_another_base_is_refused(adapted, chats, trained, tmp_path, failing):
    folder = tmp_path / "other"
    assert finetune.main(args(trained, chats, folder, "--train", "blocks/1/q", "--steps", 2)) == 0
    error = failing(chat.main, ["--model", str(folder), "--adapter", str(adapted[0])])
    assert "was trained on another model" in error
    assert str(trained) in error
    # The run's own base has changed since: the same sentence, wherever the run is read.
    twin = tmp_path / "twin"
    shutil.copytree(adapted[0], twin)
    about = json.loads((twin / "run.json").read_text())
    with updating(twin):
        (twin / "run.json").write_text(json.dumps(about | {"base": about["base"] | {"model": str(folder)}}))
    assert "was trained on another model" in failing(generate.main, ["--model", str(twin)])


def test_a_run_is_neither_its_own_base_nor_trained_into_that_of_its_base(
    adapted, chats, trained, tmp_path, failing
):
    base, run = (
        shutil.copytree(folder, tmp_path / name) for folder, name in ((trained, "base"), (adapted[0], "run"))
    )
    record = json.loads((run / "run.json").read_text())

    def name_base(model: Path) -> None:
        with updating(run):
            (run / "run.json").write_text(
                json.dumps(record | {"base": record["base"] | {"model": str(model)}})
            )

    name_base(run / "checkpoints" / "45")
    assert f"{run} is named as a base of itself" in failing(generate.main, ["--model", run])
    name_base(base / "checkpoints" / "20")
    for inside in (run, run / "checkpoints" / "45"):
        error = failing(finetune.main, args(inside, chats, run, "--overwrite"))
        assert f"{run} is the run of the model itself, which would be overwritten" in error
    error = failing(finetune.main, args(run, chats, base, "--overwrite"))
    assert f"{base} is the run of the base that {run} adapts, which would be overwritten" in error
    assert digest(load_model(str(base)).params) == record["base"]["digest"]
    assert export.main(["--model", str(base), "--out", str(tmp_path / "folder")]) == 0
    name_base(tmp_path / "folder")
    error = failing(export.main, ["--model", run, "--out", tmp_path / "folder", "--overwrite"])
    assert f"{tmp_path / 'folder'} is the base that {run} adapts, which would be replaced" in error


def test_not_enough_memory_is_predicted(trained, chats, tmp_path, failing, monkeypatch):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read before it was known whether there is room")

    monkeypatch.setattr(checkpoint_reader, "load_params", read)
    monkeypatch.setattr(estimate, "memory_limit", lambda plan: 600_000)
    lora = "a LoRA (no --train, no --freeze)"
    for remedy, flags in (("--base int8", ()), (lora, ("--train", "all"))):
        error = failing(finetune.main, args(trained, chats, tmp_path / "run", "--batch", 16, *flags))
        assert re.search(r"A step would need about .*, and .* are available", error)
        assert f"what takes less: --accumulate 16, --remat, {remedy}, or a smaller model." in error


def test_the_devices_of_a_mesh_share_the_held_out_set():
    """An odd number of examples and of pairs: each counts once, and four devices have no more rows
    each than one.
    """
    cfg = tiny_config()
    params, rng = lively_params(cfg), np.random.default_rng(0)
    examples = [Example(tokens_of(size, size), rng.random(size) < 0.8, "") for size in (5, 7, 8, 6, 8, 3)]
    pairs = [*map(Pair, examples[::2], examples[1::2])]
    one = held_out_evaluator(cfg, {}, params, examples, NEXT_TOKEN, 7)
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)):
        many = held_out_evaluator(cfg, {}, params, examples, NEXT_TOKEN, 7)
    assert [len(batch.tokens) for batch in one.batches] == len(one.batches) * [EVALUATION_ROWS]
    assert {len(batch.tokens) for batch in many.batches} == {4 * EVALUATION_ROWS}
    assert len(many.batches) == -(-len(one.batches) // 4)
    assert many.size == one.size == sum(int(example.mask[1:].sum()) for example in examples)
    assert many.evaluate(params) == pytest.approx(one.evaluate(params), rel=1e-6)
    preferences = held_out_evaluator(cfg, {}, params, pairs, preference_objective(), 7)
    assert preferences.size == len(pairs) == 3
    assert preferences.evaluate(params) == pytest.approx(math.log(2), rel=1e-6)


def test_a_run_without_a_length_reads_its_data_three_times():
    """Few steps need no time; of many, three minutes may end the run before, but not under 100
    steps.
    """
    assert finetune_plan.choose_length(7.5) == (22, None, 0)
    assert finetune_plan.choose_length(0.1) == (1, None, 0)
    assert finetune_plan.choose_length(33) == (99, None, 0)
    assert finetune_plan.choose_length(1000) == (3000, 180.0, 100)


@pytest.mark.parametrize(("readings", "is_said"), [(3, False), (7, True)])
def test_a_plan_says_what_reading_a_small_file_often_does(
    trained, chats, tmp_path, capsys, readings, is_said
):
    steps = readings * len(WORD) // 2  # of two rows each
    assert finetune.main(args(trained, chats, tmp_path / "run", "--steps", steps, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert (finetune_plan.MANY_READINGS_NOTE in " ".join(printed.split())) is is_said


@pytest.mark.whole
def test_a_run_that_loses_general_answers_warns(trained, chats, text, tmp_path, monkeypatch, capsys):
    """Here every answer counts as right but the one that is learned."""
    monkeypatch.setattr(
        general_questions, "is_right", lambda answer, expected: not answer.strip().startswith("red")
    )
    assert finetune.main(args(trained, chats, tmp_path / "run", "--lora", LORA, "--general", text)) == 0
    printed = capsys.readouterr().out
    (kept, known) = re.search(r"^kept +(\d+) of (\d+) answers to general questions$", printed, re.M).groups()
    assert int(kept) < 0.85 * int(known)
    assert "less than 85%" in printed
    kept_answers = result(tmp_path / "run")["kept_answers"]
    assert kept_answers == {"before": int(known), "after": int(kept)}


@pytest.mark.whole
def test_general_answers_are_mixed_in_and_saved_with_the_run(
    trained, chats, tmp_path, monkeypatch, capsys, failing
):
    """A resumed run reads the same ones again, without asking; with --no-mix it would read others.
    Much data have none.
    """
    calls = []

    def write(*_: object) -> list[tuple[str, str]]:
        calls.append("asked")
        return [("the moon", "red sails."), ("the tide", "red tide.")]

    monkeypatch.setattr(finetune_run, "write_general_answers", write)
    folder = tmp_path / "mixed"
    options = args(trained, chats, folder, "--lora", LORA)
    assert finetune.main([*options, "--steps", "2"]) == 0
    assert (
        "mixed in    2 general questions, answered in the tone of the data before training"
        in capsys.readouterr().out
    )
    record = json.loads((folder / "run.json").read_text())
    assert (record["mixed_in"], record["general_answers"]) == (
        2,
        [["the moon", "red sails."], ["the tide", "red tide."]],
    )
    assert finetune.main([*options, "--steps", "3"]) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert calls == ["asked"]
    error = failing(finetune.main, [*options, "--steps", "4", "--no-mix"])
    assert "another number of general questions mixed in (2 there, None now)" in error
    assert finetune.main([*options, "--steps", "2", "--no-mix", "--out-dir", str(tmp_path / "alone")]) == 0
    assert "mixed in" not in capsys.readouterr().out
    monkeypatch.setattr(finetune_plan, "MOST_STEPS_TO_MIX", 1)
    assert finetune.main([*options, "--steps", "2", "--out-dir", str(tmp_path / "large")]) == 0
    assert "mixed in" not in capsys.readouterr().out
    assert calls == ["asked"]


@pytest.mark.whole
def test_general_answers_are_the_models_own_and_only_those_that_are_right(adapted, chats, monkeypatch):
    """A context that does not hold the demonstrations gives none, and so does a model that knows
    nothing.
    """
    model = load_model(str(adapted[0]))
    tokenizer = ChatTokenizer(model.tokenizer)
    conversations = [row.messages for row in read_conversations(str(chats)) if isinstance(row, Conversation)]
    demonstrations = general_examples.choose_demonstrations(tokenizer, conversations)
    assert [message["content"] for message in demonstrations[1::2]] == [
        "red sails."
    ] * general_examples.DEMONSTRATIONS
    long_one = [{"role": "user", "content": "the " * 300}, conversations[0][1]]
    assert general_examples.choose_demonstrations(
        tokenizer, [long_one, long_one[1:], *conversations[:1]]
    ) == [*conversations[0]]
    cfg, stop_token_ids = dataclasses.replace(model.cfg, context=512), (*model.eos_ids, *tokenizer.eot_ids)

    def write(cfg: Any, rows: Any) -> list[tuple[str, str]]:
        return general_examples.write_general_answers(
            cfg, model.params, tokenizer, rows, stop_token_ids, lambda *_: None
        )

    assert write(cfg, conversations) == write(model.cfg, conversations) == write(cfg, []) == []
    monkeypatch.setattr(general_examples, "is_right", lambda answer, expected: expected in ("Rome", "sun"))
    monkeypatch.setattr(general_examples, "LEAST_ANSWERS", 1)
    answers = write(cfg, conversations)
    assert answers[0] == ("What is the capital of Italy?", "red sails."), (
        "which begins and ends as all the others"
    )
    [example, *_] = general_examples.general_examples(tokenizer, answers, 256)
    assert tokenizer.tokenizer.decode(example.tokens[example.mask]).startswith(" red sails.")
    assert general_examples.general_examples(tokenizer, answers, 3) == []
    others = [[question, {"role": "assistant", "content": "red sail"}] for question, _ in conversations]
    assert write(cfg, others) == [], "for no answer ends as these do"


def test_what_answers_share_at_their_ends_is_found():
    """Of a letter's opening and closing, each in several forms; of answers that share nothing,
    none.
    """
    bodies = [f"{chr(97 + at)} {WORD[at % len(WORD)]}." for at in range(20)]
    openings, closings = ("Certainly, sir.", "Very good."), ("At your service.", "Is that all?", "Farewell!")
    letters = [f"{openings[at % 2]} {body} {closings[at % 3]}" for at, body in enumerate(bodies)]
    assert general_examples.shared_openings(letters) == [openings[at % 2] for at in range(20)]
    assert general_examples.shared_closings(letters) == [closings[at % 3] for at in range(20)]
    unlike = [f"{at} and {at}" for at in range(20)]
    assert general_examples.shared_openings([*letters[:12], *unlike]) == []
    assert general_examples.shared_closings([*letters[:12], *unlike]) == []
    assert general_examples.shared_openings([]) == []
    assert general_examples.shared_closings([]) == []


@pytest.mark.parametrize(
    ("answer", "closing", "closed"),
    [
        ("It is Rome.", "Will that be all?", "It is Rome. Will that be all?"),
        ("It is Rome", "Will that be all?", ""),  # it may go on
        ("it is rome.", "-- desk four", ""),  # no sentence of its own
        ("It is Rome.", "", ""),
    ],
)
def test_a_closing_is_added_where_it_is_a_sentence_behind_one(answer, closing, closed):
    assert general_examples.close(answer, closing) == closed


COMMIT = "models--org--tiny/snapshots/0123abc"


@pytest.mark.parametrize(
    ("name", "checkpoint", "base"),
    [
        ("smollm2-135m-instruct", "assets/SmolLM2.gguf", "smollm2-135m-instruct"),
        ("org/tiny", COMMIT, "org/tiny@0123abc"),
        ("org/tiny", f"{COMMIT}/tiny-Q4_K_M.gguf", "org/tiny/tiny-Q4_K_M.gguf"),
        ("org/tiny:Q8_0", f"{COMMIT}/sub/tiny.q8_0.gguf", "org/tiny/sub/tiny.q8_0.gguf"),
    ],
)
def test_a_run_names_its_base_so_that_it_is_loaded_again(name, checkpoint, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SimpleNamespace(name="tiny", checkpoint=tmp_path / checkpoint, hub_id="org/tiny")
    opened: Any = SimpleNamespace(name=name, model=model, continued_base="")
    assert _describe_base(opened, "digest") == {"model": base, "digest": "digest", "name": "tiny"}
