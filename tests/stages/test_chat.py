"""Chat: the whole conversation is read again each turn, nothing is left out in silence, and weights stay as they are."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.stages.tiny_runs import PATIENCE, ROOT, command
from tests.text.chat_models import save_chat_model

PROMPT = "\r\n> "
QUICK = ("--max-tokens", 6)


@pytest.mark.whole
def test_piped_lines_are_turns(trained, talk):
    first = command("chat", "--model", trained, "--temperature", 0, *QUICK, stdin=b"the king\n\nthe sea\n")
    assert first.returncode == 0, first.stderr
    assert b"\x1b" not in first.stdout + first.stderr
    assert re.fullmatch(
        r"> the king\n(?s:.+)\n\n> the sea\n(?s:.+)\n\n", first.stdout.decode()
    )  # one can be read
    assert b"turn" not in first.stderr
    lines = b"the king\nthe sea\n/system  be brief \n/system\n/clear\n//clear\n"
    code, replies, output = talk(lines, trained, *QUICK, "--verbose")
    assert code == 0
    assert replies.startswith(first.stdout.decode())  # what begins with a slash is no turn
    assert replies.count("> ") == 3
    assert "> /clear\n" in replies
    reads = [int(number) for number in re.findall(r"turn \d: (\d+) tokens read", output)]
    assert len(reads) == 3
    assert reads[0] < reads[1] > reads[2]  # the second turn reads the first again, the third none
    for words in (
        r"turn 2: \d+ tokens read, \d+ of them again",
        r"\[system: be brief\]",
        r"\[system: what the template says",
        r"turn 1: \d+ tokens read; (?s:.+)\[the conversation is forgotten\]\n\[turn 1: \d+ tokens read; ",
        "plain template",
        r"cut off: --max-tokens is 6",
        "weights unchanged: SHA-256",
        "sampling +temperature 0 by a flag; top_p 0.9 by default",
        "device .*kernels in C",
    ):
        assert re.search(words, output)
    code, _, error = talk(b"/stats\n", trained)
    assert code == 2
    assert "no command /stats; there are /clear, /system TEXT and /quit." in error


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (
            b"the king and queen of a far land " * 9,
            r"This message alone makes \d+ tokens and the model's context holds 64",
        ),
        (
            b"the king and queen\n" * 9,
            r"The conversation has \d+ tokens and .* holds 64: /clear begins a new one",
        ),
        (b"caf\xe9", "Line 2 of the input is not UTF-8: byte 0xE9"),
    ],
)
def test_a_line_that_cannot_be_answered_ends_a_pipe(second, words, trained, talk):
    code, _, error = talk(b"the king\n" + second + b"\nthe sea\n", trained, *QUICK)
    assert code == 2
    assert re.search(words, error)
    assert "Traceback" not in error


@pytest.mark.whole
def test_documents_come_before_the_question_and_are_shown(trained, talk, tmp_path):
    documents, model = tmp_path / "documents", tmp_path / "model"
    save_chat_model(model, context=512)
    documents.mkdir()
    (documents / "tide.md").write_text("The tide turns at noon.\n\nThe king went down to sea.")
    (documents / "picture.png").write_bytes(b"\x89PNG\xff")
    code, _, output = talk(b"king\nand why\n", model, *QUICK, "--documents", documents, "--verbose")
    assert code == 0
    assert "documents" in output
    assert "not UTF-8 text (1 .png)" in output
    for words in (
        r"\[from documents: tide.md \(2\); \d+ of the \d+ tokens read, about \d",
        r"\[nothing of the documents fits",
    ):
        assert len(re.findall(words, output)) == 1
    assert (
        "[nothing of the documents fits" in talk(b"king\n", trained, *QUICK, "--documents", documents)[2]
    )  # a context of 64
    (documents / "tide.md").write_bytes(b"\xff")
    for folder, words in ((documents, "tide.md should be UTF-8"), (tmp_path / "none", "There is no text at")):
        code, _, error = talk(b"king\n", trained, "--documents", folder)
        assert code == 2
        assert words in error


class Terminal:
    """A chat in a terminal of its own, gone with its block; `program` is what Python runs."""

    def __init__(self, *program: object, term: str = "dumb") -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, program)],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": term, "COLUMNS": "100", "PYTHONPATH": str(ROOT)},
        )
        os.close(slave)
        self.unread = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def wait_for(self, *phrases: str) -> str:
        """Returns the output since the last wait, up to and with the last of these phrases, in this
        order.
        """
        until, output = time.monotonic() + PATIENCE, ""
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


@pytest.mark.whole
def test_a_person_at_a_terminal(trained):
    with Terminal("-m", "stages.chat", "--model", trained, "--max-tokens", 20) as terminal:
        opening = terminal.wait_for(PROMPT)
        assert "/clear begins anew" in opening
        assert "compiling" in opening
        terminal.type("the king\n", "[turn 1:", PROMPT)
        for _ in range(100):
            # with nothing being written, and often before the prompt waits for a key
            terminal.interrupt()
            terminal.wait_for("Ctrl-D leaves", PROMPT)
        terminal.type("/clear\n", "forgotten")
        terminal.type("the sea\\\nof red sails\n", "[turn 1:", PROMPT)
        terminal.type("\x04", "weights unchanged: SHA-256")
        assert terminal.process.wait(timeout=PATIENCE) == 0


def test_a_paste_of_lines_is_one_message(trained):
    with Terminal("-m", "stages.chat", "--model", trained, *QUICK, term="xterm") as terminal:
        terminal.wait_for("\x1b[?2004h> ")  # asks the terminal to mark what is pasted
        terminal.type("\x1b[200~the sea\nof red sails\n\x1b[201~\n", "[turn 1:", "\x1b[?2004h> ")
        assert "turn 2" not in terminal.type("\x04", "weights unchanged")


# The third step of the first two answers, and the first of the last one, begins once Ctrl-C has
# been received.
HELD = """
import sys, time
from engine.inference.engine import Engine
from stages.cli import signals
step, steps, held = Engine.step, [], {3, 6, 7}
def hold(self):
    if signals._deferral:
        steps.append("step")
        print("step", flush=True)
        while len(steps) in held and not signals._deferral.received:
            time.sleep(0.01)
    return step(self)
Engine.step = hold
from stages.chat import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_stops_the_answer_and_not_the_chat(trained):
    with Terminal(
        "-c", HELD, "--model", trained, "--temperature", 1, "--max-tokens", 50, "--seed", 3
    ) as terminal:
        terminal.wait_for(PROMPT)
        for _ in range(2):
            terminal.type("the king\n", "the king\r\n")
            terminal.wait_for(*["step"] * 3)  # the first reads the prompt
            terminal.interrupt()
            terminal.wait_for("[stopped]")
            terminal.type("/clear\n", "forgotten", PROMPT)
        terminal.type("the king\n", "the king\r\n", "step")
        terminal.interrupt()  # while the prompt is read
        assert "step" not in terminal.wait_for("(no answer)", PROMPT)
        terminal.type("/quit\n", "unchanged")
        assert terminal.process.wait(timeout=PATIENCE) == 0
