"""Evaluating, generating and drafting: read-only, reproducible, and streamed as whole characters."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine import manifest
from engine.device import start_jax
from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.runner import ModelRunner
from engine.model.native.library import native_problem
from engine.model.ops import computes_in_c
from engine.model.weights.block_layout import KINDS
from engine.storage import checkpoint_reader
from engine.storage.digest import digest
from engine.storage.model_loader import load_model
from engine.storage.run_folder import read_config, read_json
from engine.text.corpus import open_token_file
from engine.text.detokenizer import CompletionText
from engine.text.tokenizer import byte_tokenizer, save_tokenizer
from stages import chat, export, generate
from stages.cli.console import Console
from stages.evaluate import __main__ as evaluate
from stages.finetune import __main__ as finetune
from stages.reinforce import __main__ as reinforce
from stages.runs.folder import updating
from stages.serve import __main__ as serve
from stages.serve.load import load_state
from stages.train import __main__ as train
from tests.stages.tiny_runs import ROOT, WORDS, command, tiny, typed
from tests.storage.gguf_files import k_quants_gguf


def generated(capsys: pytest.CaptureFixture[str], model: Path, *flags: object) -> tuple[str, str]:
    assert generate.main(["--model", str(model), *map(str, flags)]) == 0
    output = capsys.readouterr()
    return output.out, output.err


def test_generation_is_a_function_of_its_flags(trained, capsys):
    flags = ("--prompt", "The king", "--max-tokens", 40, "--temperature", 1.0)
    first, notes = generated(capsys, trained, *flags, "--seed", 5, "--verbose")
    assert first == generated(capsys, trained, *flags, "--seed", 5)[0]
    assert first != generated(capsys, trained, *flags, "--seed", 6)[0]
    for words in (" tokens, the first", "0 recompiles", "tokens/s", "weights unchanged", "kernels in C"):
        assert words in notes
    assert first == generated(capsys, trained / "checkpoints" / "20", *flags, "--seed", 5)[0]


@pytest.mark.whole
def test_a_file_is_multiplied_as_it_lies(trained, tmp_path, capsys, talk):
    """Where kernels in C compute; by XLA its weights are multiplied in the compute dtype."""
    file = tmp_path / "file.gguf"
    assert export.main(["--model", str(trained), "--out", str(file), "--dtype", "q8_0"]) == 0
    model = load_model(str(file), keep_kinds=KINDS if computes_in_c() else ())
    sha256 = f"SHA-256 {digest(prepare_params(model.cfg, model.params))[:16]}"
    assert sha256 in generated(capsys, file, "--prompt", "the", "--max-tokens", 4, "--verbose")[1]
    assert sha256 in talk(b"the\n", file, "--max-tokens", 4, "--verbose")[2]


@pytest.mark.whole
def test_k_quants_are_the_same_weights_in_every_command(tmp_path, capsys, talk):
    """Multiplied as they lie where kernels in C compute; each command answers from them."""
    file = k_quants_gguf(tmp_path / "k.gguf")
    kinds = r"\((\w+, ){3}\w+\)"
    becomes = "are widened to bfloat16"
    if computes_in_c():
        becomes = "stay as they are"
    line = re.compile(rf"file +all 15 matrices {becomes} {kinds}\n")
    text, notes = generated(
        capsys, file, "--prompt", "the", "--max-tokens", 9, "--temperature", 0, "--verbose"
    )
    assert text.strip()
    assert line.search(notes)
    (sha256,) = re.findall("SHA-256 [0-9a-f]{16}(?! before)", notes)
    code, answer, notes = talk(b"the\n", file, "--max-tokens", 9, "--verbose")
    assert code == 0
    assert answer.strip()
    assert line.search(notes)
    assert sha256 in notes
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the", "completion": "12 123"}\n')
    assert evaluate.main(["--model", str(file), "--data", str(rows), "--weights", "file"]) == 0
    assert line.search(capsys.readouterr().out)
    state, ahead = load_state(
        str(file), EngineConfig(1, 64, weights="file"), start_jax(one_arena=False), Console()
    )
    ahead.stop()
    state.tokenizer.close()
    if computes_in_c():
        assert line.search(capsys.readouterr().out)
        assert state.digest[:16] in sha256


@pytest.mark.whole
def test_float32_keeps_a_files_numbers_in_every_command(tmp_path, capsys, talk):
    """Bfloat16, in which they are computed by default, has too few bits for them."""
    file = k_quants_gguf(tmp_path / "k.gguf")
    params = load_model(str(file), dtype="float32").params
    config = EngineConfig(1, 64, weights="float32")
    cfg = config.model_config(load_model(str(file)).cfg)
    sha256 = digest(config.prepare_params(cfg, params))[:16]
    options = ["--max-tokens", 4, "--weights", "float32", "--verbose"]
    assert f"SHA-256 {sha256}" in generated(capsys, file, "--prompt", "the", *options)[1]
    assert f"SHA-256 {sha256}" in talk(b"the\n", file, *options)[2]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the", "completion": "12 123"}\n')
    assert evaluate.main(["--model", str(file), "--data", str(rows), "--weights", "float32"]) == 0
    assert f"SHA-256 {sha256}" in capsys.readouterr().out
    state, ahead = load_state(str(file), config, start_jax(one_arena=False), Console())
    ahead.stop()
    state.tokenizer.close()
    assert state.digest.startswith(sha256)


@pytest.mark.whole
def test_every_command_says_what_becomes_of_a_files_kinds(trained, tmp_path, capsys, talk):
    """The tiny model's `down` has no whole blocks, and lies in the file in float16."""
    rows = [{"prompt": f"the {word}", "completion": "red sails."} for word in WORDS.split()]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, rows)))
    file, again = tmp_path / "file.gguf", tmp_path / "again.gguf"
    assert export.main(["--model", str(trained), "--out", str(file), "--dtype", "q8_0"]) == 0
    widened = re.compile(
        r"file +of 15 matrices 2 are rounded to bfloat16 \(F16\), 13 are widened to bfloat16 \(Q8_0\)\n"
    )
    stays = re.compile(
        r"file +of 15 matrices 13 stay as they are \(Q8_0\), 2 are rounded to bfloat16 \(F16\)\n"
    )
    in_blocks = stays if computes_in_c() else widened
    float32 = re.compile(r"file +all 15 matrices are widened to float32 \(Q8_0, F16\)\n")
    assert in_blocks.search(generated(capsys, file, "--prompt", "the", "--max-tokens", 1)[1])
    assert in_blocks.search(talk(b"the\n", file, "--max-tokens", 1, "--verbose")[2])
    assert evaluate.main(["--model", str(file), "--data", str(chats)]) == 0
    assert in_blocks.search(capsys.readouterr().out)
    assert export.main(["--model", str(file), "--out", str(again)]) == 0
    assert float32.search(capsys.readouterr().out)
    tuning = ["--model", str(file), "--data", str(chats), "--general", "none", "--dry-run"]
    assert finetune.main(tuning) == 0
    assert widened.search(capsys.readouterr().out)
    assert finetune.main([*tuning, "--train", "all"]) == 0
    assert float32.search(capsys.readouterr().out)
    assert finetune.main([*tuning, "--base", "int8"]) == 0
    assert re.search(r"file +all 15 matrices are rounded to int8 \(Q8_0, F16\)\n", capsys.readouterr().out)
    assert reinforce.main(["--model", str(file), "--task", "length:4", "--dry-run", "--max-tokens", "4"]) == 0
    assert widened.search(capsys.readouterr().out)
    device = start_jax(one_arena=False)
    state, ahead = load_state(str(file), EngineConfig(1, 64, weights="file"), device, Console())
    ahead.stop()  # or its programs would count as recompiles of the tests that follow
    state.tokenizer.close()
    printed = capsys.readouterr().out
    served = "2 are rounded to int8 (F16)" if computes_in_c() else "are rounded to int8 (Q8_0, F16)"
    assert re.search(rf"file +(of|all) 15 matrices .*{re.escape(served)}\n", printed), printed


def test_sampling_is_as_the_model_recommends_unless_a_flag_says_else(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    model = load_model(str(trained))
    with updating(run):
        save_tokenizer(
            run / "tokenizer", model.tokenizer, model.eos_ids, {"temperature": 0.0, "repetition_penalty": 1.3}
        )
    flags = ("--prompt", "The king", "--max-tokens", 20)
    greedy, notes = generated(capsys, run, *flags)
    assert "repetition_penalty is 1.3, and only `stages.serve` computes it" in notes
    assert "sampling  temperature 0 as the model recommends\n" in notes
    assert greedy == generated(capsys, trained, *flags, "--temperature", 0)[0]
    assert "sampling  temperature 1 by a flag\n" in generated(capsys, run, *flags, "--temperature", 1)[1]


def test_each_of_several_continuations_is_that_of_its_seed(trained, capsys, monkeypatch):
    """And their prompt is computed once."""
    flags = ("--max-tokens", 20, "--temperature", 1.0, "--prompt", "The king and queen")
    computed, prefill = [], ModelRunner.prefill
    with monkeypatch.context() as patch:
        patch.setattr(
            ModelRunner, "prefill", lambda self, *chunk: computed.append(chunk) or prefill(self, *chunk)
        )
        together, notes = generated(capsys, trained, *flags, "--seed", 1, "--count", 2)
    assert len(computed) == 1
    assert "tokens/s, 0 recompiles" in notes
    alone = [generated(capsys, trained, *flags, "--seed", seed)[0] for seed in (1, 2)]
    assert together == f"{alone[0]}\n--- 2 of 2\n{alone[1]}"
    assert (
        "/s" not in generated(capsys, trained, "--max-tokens", 1, "--count", 2)[1]
    )  # nothing after the first


def test_generation_stops_where_the_context_is_full(trained, capsys):
    _, notes = generated(capsys, trained, "--max-tokens", 500)
    assert "63 tokens" in notes
    assert "the context of 64 tokens is full" in notes


def test_prompt_from_standard_input(trained, capsys):
    result = command(
        "generate", "--model", trained, "--prompt", "-", "--max-tokens", "10", stdin=b"The queen"
    )
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout.decode() == generated(capsys, trained, "--prompt", "The queen", "--max-tokens", 10)[0]
    )
    assert b"\x1b" not in result.stdout + result.stderr


@pytest.mark.whole
def test_a_second_command_finds_the_programs_of_the_first_stored(trained, monkeypatch, tmp_path):
    """It traces none, for which it would import Flax."""
    if not native_problem():  # else the first builds the kernels in C
        shutil.copytree(Path(os.environ["THRICE_CACHE"]) / "native", tmp_path / "native")
    # Another test may have stored the same programs in the tests' own cache.
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    runs = [
        command("generate", "--model", trained, "--prompt", "The", "--max-tokens", 5, "--count", 3)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert [b"flax.linen" in run.stderr for run in runs] == [True, False]


SOURCE_THAT_EDITS_ITSELF = """
import os
import pathlib

if os.environ.get("EDIT"):  # once it is imported: from now on the least likely token is sampled
    path = pathlib.Path(__file__)
    path.write_text(path.read_text().replace("logits == logits.max(-1", "logits == logits.min(-1"))
"""


@pytest.mark.whole
def test_a_source_that_is_edited_while_a_command_starts_leaves_no_program_of_the_old_one_for_the_next(
    trained, tmp_path
):
    for package in ("engine", "stages"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "page", "serve")
        )
    source = tmp_path / "engine" / "inference" / "sampling.py"
    source.write_text(source.read_text() + SOURCE_THAT_EDITS_ITSELF)

    def generate_text(cache: str, edit: str) -> bytes:
        # Without bytecode of these sources: Python does not see an edit of the same length within a
        # second.
        variables = {"THRICE_CACHE": str(tmp_path / cache), "EDIT": edit, "PYTHONDONTWRITEBYTECODE": "1"}
        words = typed(
            "generate", "--model", trained, "--prompt", "The", "--max-tokens", 8, "--temperature", 0
        )
        run = subprocess.run(words, cwd=tmp_path, env=os.environ | variables, capture_output=True, check=True)
        return run.stdout

    for cache in ("one", "two"):
        (tmp_path / cache).mkdir(0o700)
        if not native_problem():  # else each builds the kernels in C
            shutil.copytree(Path(os.environ["THRICE_CACHE"]) / "native", tmp_path / cache / "native")
    before = generate_text("one", edit="yes")
    assert "logits.min(-1" in source.read_text()
    after = generate_text("one", edit="")
    assert after != before
    assert after == generate_text("two", edit="")


def test_a_window_is_no_longer_than_the_text(trained, text, capsys):
    short = text.parent / "short.txt"
    short.write_text("The king went down to the sea.\n")
    assert evaluate.main(["--model", str(trained), "--data", str(short), "--context", "100000000"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_only_whole_characters_are_written(capsys):
    printer = generate.ContinuationPrinter([CompletionText(byte_tokenizer().stream()) for _ in range(2)])
    euro, other = "€".encode(), b"ab"
    output = []
    for index, byte, finished in (
        (0, euro[0], None),
        (1, other[0], None),
        (0, euro[1], None),
        (0, euro[2], None),
        (1, other[1], "length"),
        (0, ord("!"), "stop"),
    ):
        length = printer.write(index, [byte], finished)
        output.append(capsys.readouterr().out)
    assert output == ["", "", "", "€", "", "!\n\n--- 2 of 2\nab\n"]
    assert length == 4


@pytest.mark.law("immutable weights")
def test_evaluation_agrees_with_the_run_and_changes_nothing(trained, capsys):
    assert evaluate.main(["--model", str(trained)]) == 0
    output = capsys.readouterr().out
    value = read_json(trained / "run.json")["result"]["val_bits_per_byte"]
    assert f"{value:.4f}" in output
    assert "unchanged" in output


def test_evaluation_stores_the_weights_as_serve_does_and_changes_nothing(trained, capsys):
    bits, digests = [], []
    for weights in ("float32", "int8", "q4"):
        assert evaluate.main(["--model", str(trained), "--weights", weights]) == 0
        output = capsys.readouterr().out
        assert "unchanged" in output
        bits.append(float(output.split("bits per byte")[1].split()[0]))
        digests.append(output.split("SHA-256")[1].split()[0])
    assert bits[1:] == [pytest.approx(bits[0], rel=0.02)] * 2
    assert len({*digests}) == 3
    assert evaluate.main(["--model", str(trained), "--weights", "int8", "--mesh", "fsdp=1"]) == 2


def test_evaluation_counts_every_byte_of_a_text(trained, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("The king went down to sea, é.\n" * 20)
    values = []
    for stride in (1, 16, 64):
        assert evaluate.main(["--model", str(trained), "--data", str(path), "--stride", str(stride)]) == 0
        lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
        assert lines["bytes"].strip() == f"{path.stat().st_size:,}"
        values.append(float(lines["bits per byte"]))
    assert len(set(values)) == 3  # a longer look back tells more


def test_the_newest_finished_run_is_taken_when_none_is_named(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy = read_json(trained / "run.json")
    unfinished, long = json.dumps(toy | {"result": None}), toy | {"result": toy["result"] | {"steps": 1471}}
    shorter = toy | {"result": toy["result"] | {"steps": 1}}
    records = {"new": long, "shorter": shorter, "short": toy, "broken": "{", "stopped": unfinished}
    for hour, (name, record) in enumerate(records.items()):
        folder = shutil.copytree(trained, Path("runs", name), ignore=shutil.ignore_patterns("optimizer"))
        with updating(folder):
            (folder / "run.json").write_text(record if isinstance(record, str) else json.dumps(record))
        os.utime(folder / "run.json", (hour, hour))

    def note(*flags: str, code: int = 0) -> str:
        assert generate.main(["--max-tokens", "2", *flags]) == code
        return capsys.readouterr().err.splitlines()[0]

    passed = "runs/stopped (not finished), runs/broken (not finished) and 2 more"
    assert note() == f"using runs/new; passed over {passed}: name one to use it"
    assert "using" not in note("--model", "runs/stopped")
    for name in ("broken", "stopped"):
        shutil.rmtree(f"runs/{name}")
    steps = toy["result"]["steps"]
    passed = f"runs/short (only {steps} steps), runs/shorter (only 1 step)"
    assert note() == f"using runs/new; passed over {passed}: name one to use it"
    shutil.move("runs/new", "new")
    assert note() == f"using runs/short (only {steps} steps), as no other run is finished"
    for name in ("short", "shorter"):
        shutil.rmtree(f"runs/{name}")
    shutil.move("new", "runs/new")
    assert note() == "using runs/new, the newest run"
    Path("runs/new/run.json").write_text(unfinished)
    assert "No run in runs/ is finished. Finish runs/new" in note(code=2)
    shutil.rmtree("runs")
    assert "There is no trained model in runs/" in note(code=2)


@pytest.fixture
def commands(text, tmp_path):
    """Every command that loads a model, with what else it needs."""
    return [
        (generate.main, ()),
        (evaluate.main, ()),
        (chat.main, ()),
        (serve.main, ("--port", 0)),
        (export.main, ("--out", tmp_path / "out")),
        (finetune.main, ("--data", text, "--out-dir", tmp_path / "tuned")),
        (reinforce.main, ("--task", "length:3", "--out-dir", tmp_path / "tuned")),
    ]


@pytest.mark.whole
def test_weights_that_are_not_those_of_the_config_are_refused_by_every_command(
    trained, commands, text, tmp_path, failing
):
    """Whoever makes a run folder makes its manifests right."""
    run = shutil.copytree(trained, tmp_path / "run")
    step = run / "checkpoints" / "20"
    file = step / "params.safetensors"
    arrays = load_file(file)
    save_file(arrays | {"blocks/0/gate": arrays["blocks/0/gate"].astype(np.float16)}, file)
    (step / manifest.NAME).unlink()
    manifest.write_manifest(step)
    sentence = f"{file} does not hold the model that the config describes: blocks/0/gate should be float32 or bfloat16"
    for main, more in commands:
        for model in (run, step):
            assert sentence in failing(main, ["--model", model, *more])
    resumed = tiny(text, run, "--steps", 30, "--tokenizer", "bpe:300", "--context", 64)
    error = failing(train.main, resumed)
    assert (
        f"{step / 'params'} is of another model: at blocks/0/gate float32 (32, 88) was wanted and "
        "float16 (32, 88) came" in error
    )


def test_a_damaged_file_of_a_run_is_named_by_every_command_that_loads(
    trained, commands, tmp_path, failing, capsys
):
    run, flags = shutil.copytree(trained, tmp_path / "run"), ("--prompt", "The king", "--max-tokens", 9)
    plain = generated(capsys, trained, *flags)[0]
    files = [run / "config.json", run / "run.json", *(run / "tokenizer").iterdir()]
    assert len(files) == 5
    for number, file in enumerate(files):
        whole = file.read_bytes()
        at = re.search(rb"\d(?=\D*$)", whole) or re.search(rb"\w", whole)
        file.write_bytes(whole[: at.start()] + b"7" + whole[at.end() :])
        for main, more in commands if number == 0 else commands[:1]:
            for model in (run, run / "checkpoints" / "20"):
                error = failing(main, ["--model", model, *more])
                assert f"{file} is damaged: its SHA-256 is another" in error, error
        file.write_bytes(whole)
    assert not (tmp_path / "out").exists()
    restored, notes = generated(capsys, run, *flags)
    assert (restored, "manifest" in notes) == (plain, False)
    with pytest.raises(KeyboardInterrupt), updating(run):
        raise KeyboardInterrupt
    earlier, notes = generated(capsys, run, *flags)
    note = f"{run} has no manifest.json: its config and tokenizer are not checked"
    assert (earlier, notes.splitlines()[0]) == (plain, note)


def test_quick_look_is_at_the_text_itself_and_every_mesh_shares_its_windows(text, trained, monkeypatch):
    from stages.runs import text_evaluators

    tokenizer = byte_tokenizer()
    tokens = open_token_file([lambda: iter([text.read_text()[:1000]])], tokenizer)
    counted = lambda cfg, params, batch: float(np.asarray(batch.mask).sum())
    quick = text_evaluators.quick_evaluator(read_config(trained), tokens, tokenizer, counted)
    for batch in quick.batches:
        for row, target in zip(np.asarray(batch.tokens), np.asarray(batch.targets)):
            assert bytes(row[1:].tolist()) == bytes(target[:-1].tolist())
            assert bytes(row.tolist()) in text.read_bytes()
    reports: list[tuple[int, int]] = []
    assert quick.evaluate(None, lambda *counts: reports.append(counts)) == pytest.approx(1 / np.log(2))
    assert reports == [
        (number, len(quick.batches)) for number in range(len(quick.batches) + 1)
    ]  # 0 before it compiles
    windows = np.concatenate([batch.tokens for batch in quick.batches])
    for shards in (2, 7, 64):
        monkeypatch.setattr(text_evaluators, "row_shards", lambda shards=shards: shards)
        others = text_evaluators.quick_evaluator(read_config(trained), tokens, tokenizer, counted).batches
        np.testing.assert_array_equal(
            np.concatenate([batch.tokens[batch.mask.all(1)] for batch in others]), windows
        )
        assert all(len(batch.tokens) == len(others[0].tokens) for batch in others)
        assert len(others[0].tokens) % shards == 0
        assert sum(len(batch.tokens) for batch in others) < len(windows) + len(others[0].tokens)


@pytest.mark.parametrize("stage", [finetune, reinforce])
def test_a_dry_run_reads_no_weights(trained, tmp_path, monkeypatch, stage):
    rows = [{"prompt": f"the {word}", "completion": "red sails."} for word in WORDS.split()]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, rows)))

    def read(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(checkpoint_reader, "load_params", read)
    options = ["--data", str(chats), "--general", "none"]
    if stage is reinforce:
        options = ["--task", "length:4", "--max-tokens", "4"]
    options += ["--model", str(trained), "--out-dir", str(tmp_path / "run")]
    assert stage.main([*options, "--dry-run"]) == 0
    with pytest.raises(AssertionError, match="weights are read"):
        stage.main(options)
