"""Chat: the whole conversation is read again each turn, nothing is left out in silence, and weights stay as they are."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ROOT, command

from engine.errors import UserError
from engine.inference.request import SamplingParams
from engine.storage.model_loader import load_model
from stages.chat import __main__ as chat
from stages.chat.run import Repl
from stages.chat.session import ChatSession, with_setting
from stages.cli.console import Console

PROMPT = "\r\n> "
QUICK = ("--temperature", "0", "--max-tokens", "6")


@pytest.fixture(scope="module")
def conversation(trained):
    from engine.inference import decode
    from engine.text.chat_tokenizer import ChatTokenizer

    model = load_model(str(trained))
    chat = ChatTokenizer(model.tokenizer)
    sampling = SamplingParams(max_tokens=6, temperature=0)
    yield ChatSession(model.cfg, decode.prepare_params(model.cfg, model.params), chat, model.eos_ids, sampling)
    chat.close()


@pytest.fixture
def fresh(conversation):
    conversation.turns.clear()
    conversation.system = ""
    return conversation


def piped(model: Path, text: str, *flags: object) -> subprocess.CompletedProcess:
    return command("chat", "--model", model, *QUICK, *flags, stdin=text.encode())


def test_piped_lines_are_turns(trained):
    result = piped(trained, "the king\n\nthe sea\n")
    assert result.returncode == 0, result.stderr
    assert b"\x1b" not in result.stdout + result.stderr
    assert re.fullmatch(r"> the king\n(?s:.+)\n\n> the sea\n(?s:.+)\n\n", result.stdout.decode())  # one can be read
    assert b"turn" not in result.stderr
    again = piped(trained, "the king\n/stats\nthe sea\n/set temperature 0.5\n/system be brief\n", "--verbose")
    assert again.stdout == result.stdout  # what begins with a slash is no turn
    output = again.stderr.decode()
    reads = [int(number) for number in re.findall(r"turn \d: (\d+) tokens read", output)]
    assert len(reads) == 2
    assert reads[1] > reads[0]  # the second turn reads the first again
    assert f"{sum(reads)} tokens, {reads[0]} of them not for the first time" in output
    assert output.count("unchanged: SHA-256") == 2
    for words in (r"turn 2: \d+ tokens read, \d+ of them again", r"\[system: be brief\]", "temperature +0.5", "plain template",
                  "sampling +temperature 0 by a flag; top_p 0.9 by default"):  # fmt: skip
        assert re.search(words, output)


def test_each_turn_reads_the_whole_conversation(fresh):
    first = "".join(fresh.reply("the king"))
    second = "".join(fresh.reply("the sea"))
    assert [turn.completion for turn in fresh.turns] == [first.rstrip(), second.rstrip()]
    prompt = fresh.chat.prompt([
        {"role": "user", "content": "the king"}, {"role": "assistant", "content": first.rstrip()},
        {"role": "user", "content": "the sea"},
    ])  # fmt: skip
    assert fresh.turns[1].prompt_tokens == len(prompt)
    fresh.turns = fresh.turns[:1]  # an answer depends on the text before it and on nothing else
    assert "".join(fresh.reply("the sea")) == second


def test_what_no_longer_fits_is_named_and_nothing_is_generated(fresh):
    with pytest.raises(UserError, match=r"This message alone makes \d+ tokens and the model's context holds 64"):
        next(fresh.reply("the king and queen of a far land " * 9))
    assert fresh.turns == []
    while len(fresh.chat.prompt(fresh.messages("the king and queen"))) < fresh.cfg.context:
        list(fresh.reply("the king and queen"))
    turns = len(fresh.turns)
    with pytest.raises(UserError, match=r"tokens and the model's context 64: (turn 1 no longer fits|turns 1 to \d)") as caught:
        next(fresh.reply("the king and queen"))
    assert len(fresh.turns) == turns
    forget = int(re.findall(r"/forget (\d+)", str(caught.value))[0])
    del fresh.turns[: forget - 1]
    with pytest.raises(UserError, match="no longer fit"):  # one fewer would not do
        fresh.prompt("the king and queen")
    del fresh.turns[:1]
    assert fresh.prompt("the king and queen")


def test_stopped_in_the_middle_keeps_what_was_generated(fresh):
    fresh.sampling = with_setting(fresh.sampling, "max_tokens", "40")
    reply = "".join(fresh.reply("the king"))
    fresh.turns.clear()
    part = "".join(fresh.reply("the king", is_stopped=lambda: True))
    assert reply.startswith(part)
    assert len(part) < len(reply)
    if fresh.turns:
        assert fresh.turns[-1].finish_reason == "interrupted"
    fresh.sampling = with_setting(fresh.sampling, "max-tokens", "6")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (b"the king and queen of a far land " * 9, b"This message alone"),
        (b"caf\xe9", b"Line 2 of the input is not UTF-8: byte 0xE9"),
    ],
)
def test_a_line_that_cannot_be_answered_ends_a_pipe(second, words, trained):
    result = command("chat", "--model", trained, *QUICK, stdin=b"the king\n" + second + b"\nthe sea\n")
    assert result.returncode == 2
    assert words in result.stderr
    assert b"Traceback" not in result.stderr


def test_commands(fresh, capsys):
    from engine.storage.digest import digest

    repl = Repl(fresh, Console(sys.stderr), digest(fresh.params), chatty=True)

    def after(line: str, done: bool = True) -> str:
        capsys.readouterr()
        assert repl.handle(line) is done
        return re.sub(" +", " ", capsys.readouterr().err)

    assert "turn 1" in after("the king")
    assert "cut off: max_tokens is 6" in after("the sea")
    assert "1 turns are left" in after("/forget 1")
    assert "from 1 to the 1" in after("/forget 2", done=False)
    assert "forgotten" in after("/clear")
    assert fresh.turns == []
    assert "[system: be brief]" in after("/system be brief")
    assert "be brief" in after("/system")
    assert "what the template says" in after("/system -")
    assert "temperature 0.25" in after("/set temperature 0.25")
    assert "temperature 0.0" in after("/set temperature=0")
    assert "Did you mean 'temperature'" in after("/set tempreature 1", done=False)
    assert "above 0 and up to 1" in after("/set top_p 2", done=False)
    assert "name and a value" in after("/set top_p", done=False)
    assert "/forget N" in after("/help")
    assert "Did you mean 'stats'" in after("/sttas", done=False)
    assert "There is no command" in after("/", done=False)
    after("//set is what I say")
    assert fresh.turns[-1].message == "/set is what I say"
    assert "weights unchanged" in after("/stats")
    repl.digest = "0" * 64
    assert "CHANGED" in after("/stats")
    assert not repl.is_over
    after("/quit")
    assert repl.is_over


def test_bad_flags(trained, tmp_path, capsys):
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    for flags, words in (
        (["--template", str(tmp_path / "none.jinja")], "cannot be read"),
        (["--template", str(broken)], "The chat template failed with TemplateSyntaxError"),
        (["--top-p", "0"], "--top-p"),
        (["--model", str(tmp_path / "none")], "There is no model"),
    ):
        assert chat.main(["--model", str(trained), *flags]) == 2
        assert words in capsys.readouterr().err


class Terminal:
    """A chat in a terminal of its own, gone with its block; `program` is what Python runs."""

    def __init__(self, *program: object) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, program)], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=os.environ | {"TERM": "dumb", "COLUMNS": "100", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        os.close(slave)
        self.unread = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def wait_for(self, *phrases: str, seconds: float = 60) -> str:
        """Returns the output since the last wait, up to and with the last of these phrases, in this order."""
        until, output = time.monotonic() + seconds, ""
        for phrase in phrases:
            while phrase not in self.unread:
                assert time.monotonic() < until, self.unread
                if select.select([self.master], [], [], 0.1)[0]:
                    self.unread += os.read(self.master, 65536).decode(errors="replace")
            before, _, self.unread = self.unread.partition(phrase)
            output += before + phrase
        return output

    def type(self, text: str, *phrases: str) -> str:
        """Types a text and waits for what it brings."""
        os.write(self.master, text.encode())
        return self.wait_for(*phrases)

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)


def test_a_person_at_a_terminal(trained):
    with Terminal("-m", "stages.chat", "--model", trained, "--max-tokens", 20) as terminal:
        opening = terminal.wait_for(PROMPT)
        assert "/help" in opening
        assert "compiling" in opening
        terminal.type("the king\n", "[turn 1:", PROMPT)
        for _ in range(2):
            terminal.interrupt()  # with nothing being written
            terminal.wait_for("Ctrl-D leaves", PROMPT)
        terminal.type("/clear\n", "forgotten")
        terminal.type("the sea\\\nof red sails\n", "[turn 1:", PROMPT)
        assert "turns" in terminal.type("\x04", "unchanged: SHA-256")
        assert terminal.process.wait(timeout=20) == 0


SLOW = """
import sys, time
from engine.inference.slots import Slots
step = Slots.step
Slots.step = lambda self: (print("step", flush=True), time.sleep(0.5), step(self))[-1]
from stages.chat.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_stops_the_answer_and_not_the_chat(trained):
    with Terminal("-c", SLOW, "--model", trained, "--temperature", 1, "--max-tokens", 50, "--seed", 3) as terminal:
        terminal.wait_for(PROMPT)
        for _ in range(2):
            terminal.type("the king\n", "the king\r\n")
            terminal.wait_for("step")
            terminal.interrupt()
            terminal.wait_for("[stopped]", seconds=10)
            terminal.type("/clear\n", "forgotten", PROMPT)
        terminal.type("/quit\n", "unchanged")
        assert terminal.process.wait(timeout=20) == 0
