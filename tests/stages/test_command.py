"""The commands themselves: quick help, plain output, words and flags, and the live line at any width."""

import ast
import io
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from engine.errors import UserError
from stages.__main__ import main as run_stage
from stages.__main__ import stages
from stages.cli import console, flags
from stages.cli.command import command_line
from tests.stages.tiny_runs import ROOT, command, tiny, typed


def test_help_imports_nothing_heavy():
    program = """
import importlib, sys
for stage in sys.argv[1:]:
    assert importlib.import_module(stage).main(["--help"]) == 0
    heavy = {"jax", "numpy", "flax", "optax", "tokenizers"} & set(sys.modules)
    assert not heavy, f"{stage} imported {heavy}"
"""
    modules = [
        f"stages.{name}.__main__" if (ROOT / "stages" / name).is_dir() else f"stages.{name}"
        for name in stages()
    ]
    result = subprocess.run(
        [sys.executable, "-c", program, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert all(f"python -m stages.{name}" in result.stdout for name in stages())
    assert "\x1b" not in result.stdout


def test_a_flags_help_breaks_its_lines_between_sentences():
    """Tyro keeps the line breaks of these docstrings."""
    for file in [*(ROOT / "stages").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            for each in node.body if isinstance(node, ast.ClassDef) else []:
                if (
                    isinstance(each, ast.Expr)
                    and isinstance(each.value, ast.Constant)
                    and each is not node.body[0]
                ):
                    assert not re.search(r"[^.]\n", each.value.value), f"{file}:{each.lineno}"


@pytest.mark.whole
def test_closed_standard_streams_are_no_error(trained):
    words = typed("generate", "--model", trained, "--max-tokens", 3)
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_every_stage_is_listed_with_what_it_does():
    listed = stages()
    assert list(listed)[:4] == ["train", "finetune", "reinforce", "evaluate"]
    assert all(line.endswith(".") for line in listed.values())
    output = command("").stdout.decode()
    assert all(line in output for line in listed.values())
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-m", "stages"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, b"")  # as in `| head`


def test_the_installed_command_runs_a_stage():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["thrice"].partition(":")
    program = f"import sys; from {module} import {function}; sys.argv = ['thrice', 'generate', '--help']; {function}()"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "python -m stages.generate" in ended.stdout


def test_a_stage_is_run_by_its_name(capsys):
    assert run_stage(["generate", "--help"]) == 0
    assert "python -m stages.generate" in capsys.readouterr().out
    assert run_stage(["train", "--help"]) == 0
    assert "python -m stages.train" in capsys.readouterr().out
    assert run_stage(["trian"]) == 2
    assert capsys.readouterr().err == "There is no stage 'trian'. Did you mean 'train'?\n"


@pytest.mark.whole
@pytest.mark.journeys
def test_piped_output_is_plain_and_brief(text, tmp_path):
    """Also where it can hold no letter but ASCII's; and no file is for others to read where the
    umask says so.
    """
    (french := tmp_path / "text.txt").write_text(text.read_text().replace("e", "é"), encoding="utf-8")
    before = os.umask(0o077)
    try:
        ascii_only = {"COLUMNS": "40", "PYTHONIOENCODING": "ascii"}
        result = command("train", *tiny(french, tmp_path / "run", "--steps", 30), env=ascii_only)
    finally:
        os.umask(before)
    assert result.returncode == 0, result.stderr
    output = result.stdout.decode("ascii")
    assert re.search(r"\\(xe9|ufffd)", output)
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "run").rglob("*")} == {0}
    assert "\x1b" not in output
    assert "\r" not in output
    assert re.search(r"compiling \.\.\. \d", output)
    assert 2 <= len(re.findall(r"^step ", output, re.M)) <= 15
    assert "what it writes" in output
    assert f"python -m stages.generate --model {tmp_path / 'run'}" in output
    assert result.stderr == b""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(output: str) -> list[str]:
    """Returns the lines a terminal shows after these characters, without the empty ones."""
    lines, row, column = [""], 0, 0
    for code, letter, character in re.findall(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b])", output):
        if letter == "A":
            row -= int(code or 1)
        elif letter == "K":
            lines[row] = ""
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_live_line_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    fields = [
        "step 1,234/5,678",
        "loss 4.321",
        "val 2.100 bits/byte (quick)",
        "lr 100%",
        "12,345 tokens/s",
        "1.2 GB",
    ]
    monkeypatch.setattr(console, "BETWEEN_FRAMES", 0)
    with console.Console(stream) as live:
        live.show_live(lambda: ["an earlier frame", "of another width"])
        live.show_live(lambda: fields)
        frame = screen(stream.getvalue())
        live.show_live(lambda: ["this stays"], important=True)
        live.show_live(lambda: fields)
        live.print("over", style="bold")
    assert max(map(len, frame)) <= width
    if width > 20:
        assert (
            " ".join(frame).split() == " ".join(fields).split()
        )  # one frame in place of the other, nothing cut
        assert all(any(field in line for line in frame) for field in fields), "fields stay whole"
    assert {"this stays", "over"} <= set(screen(stream.getvalue()))
    assert not re.search(r"\x1b\[([0-9;]*;)?[349][0-9]", stream.getvalue())  # NO_COLOR
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_task_shows_its_time_and_progress_and_a_short_one_nothing(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "BETWEEN_TASK_LINES", 0.3)
    stream = Terminal() if terminal else io.StringIO()
    with console.Console(stream) as shown:
        with shown.task("short") as report:
            report(1, 2)
        with shown.task("outer", always=True):
            with shown.task("inner") as report:
                report(3, 96)
                while not re.search(r"inner \.\.\. (0\.9|[1-9][\d.]*) s, 3 of 96", stream.getvalue()):
                    time.sleep(0.05)
            with pytest.raises(UserError), shown.task("failing", always=True):
                raise UserError("a mistake")
    text = stream.getvalue()
    lines = screen(text) if terminal else text.splitlines()
    assert [line for line in lines if "short" in line] == []
    assert re.fullmatch(r"outer \.\.\. [\d.]+ s", lines[-1]) or not terminal
    assert text.count("outer ...") > 1 or not terminal


def test_durations():
    meant = {"45": 45, "90s": 90, "3m": 180, "1h": 3600, "1h30m": 5400, "1.5h": 5400, "2min": 120}
    assert {text: flags.seconds(text) for text in meant} == meant
    for wrong in ("", "m", "3x", "-3m", "0", "3m x", "inf", "nan", "1e3"):
        with pytest.raises(ValueError, match="wanted a duration"):
            flags.seconds(wrong)
    assert (flags.interval("200"), flags.interval("30s")) == (200, 30.0)
    assert isinstance(flags.interval("200"), int)


def test_numbers():
    assert flags.integer(1)("1e6") == 1_000_000
    assert flags.integer(1)("1_000") == 1000
    assert flags.number(0, 1)("0") == 0
    for wrong in ("nan", "1.5", "x", "-1"):
        with pytest.raises(ValueError, match="wanted"):
            flags.number(0, 1)(wrong)
        with pytest.raises(ValueError, match="wanted"):
            flags.integer(0)(wrong)


def test_commands_to_type_are_quoted_and_run_as_we_were(monkeypatch):
    monkeypatch.delenv("UV", raising=False)
    assert command_line("generate", "--model", "my runs/a") == "python -m stages.generate --model 'my runs/a'"
    monkeypatch.setenv("UV", "/bin/uv")
    assert command_line("train") == "uv run python -m stages.train"
