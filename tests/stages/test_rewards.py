"""Rewards of one's own: weights, the time limit, and one sentence, with its line, for whatever goes wrong in the file."""

import json
import os
import re
import select
import signal
import threading
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.storage import checkpoint
from stages.reinforce import __main__ as reinforce
from stages.runs.rewards import Rewards
from tests.stages.test_reinforce import args, result
from tests.stages.tiny_runs import metrics


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"{path}:score"


def test_functions_and_rules_add_up_by_their_weights(tmp_path, capfd):
    """A function gets what it has parameters for; what it prints is no answer, and nothing of it is
    left in this process.
    """
    first = write(
        tmp_path / "first.py",
        "import sys\nprint('hello')\ndef score(completion, answer): return completion == answer\n",
    )
    second = write(
        tmp_path / "second.py",
        "def score(**row):\n    assert set(row) == {'prompt', 'completion', 'answer'}\n    return -1\n",
    )
    rewards = Rewards([f"2*{first}", f"0.5*{second}", "regex:^a"], 60)
    assert rewards(["p", "p"], ["a", "ba"], ["a", None]) == [2 - 0.5 + 1, -0.5]
    assert rewards.names == {"own", "regex"}
    assert "hello" not in capfd.readouterr().out
    assert not list(tmp_path.glob("__pycache__"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def score(completion):\n    return 1 / 0\n", r":2: ZeroDivisionError: division by zero\."),
        (
            "def helper(x):\n    raise KeyError(x)\ndef score(completion):\n    return helper('a')\n",
            r":2: KeyError: 'a'\.",
        ),
        (
            "import re\ndef score(completion):\n    return re.compile('(').match(completion)\n",
            r":3: PatternError: missing \)",
        ),
        ("def score(completion)\n", r":1: SyntaxError: expected ':'"),
        ("import nowhere\n", r":1: ModuleNotFoundError: No module named 'nowhere'\."),
        ("def other(completion): return 1\n", r" has no function score\."),
        (
            "def score(completion): return float('nan')\n",
            r": score returned 'nan', where a number .* 'c' of the prompt 'p'\.",
        ),
        ("def score(completion): pass\n", r": score returned 'None'"),
        (
            "def score(completion): return 1e300\n",
            r": score returned '1e\+300', where a number from -1e9 to 1e9 is wanted",
        ),
        ("def score(completion): return 10**400\n", r": score returned '1000"),
        (
            "def score(completion, extra): return 1\n",
            r": TypeError: score\(\) missing 1 required positional argument: 'extra'",
        ),
        (
            "import os\ndef score(completion): os._exit(3)\n",
            r": score ended its process \(exit code 3\) without a result\.",
        ),
        ("import sys\ndef score(completion): sys.exit()\n", r":2: SystemExit\."),
    ],
)
def test_an_error_is_a_sentence_with_its_line(text, sentence, tmp_path):
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/mine\.py{sentence}"):
        Rewards([write(tmp_path / "mine.py", text)], 60)(["p"], ["c"], [None])


@pytest.fixture
def pipe(tmp_path):
    """A pipe's path, and a test that whoever opened it to write has ended."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def check() -> None:
        assert select.select([read], [], [], 10)[0], "something still holds the pipe"

    yield path, check
    os.close(read)


def test_a_function_that_never_returns_is_ended(tmp_path, pipe):
    """With the processes that it started."""
    path, check = pipe
    start = f"    subprocess.Popen(['sleep', '60'], stdout=open({str(path)!r}, 'w'))\n"
    endless = "        try:\n            while True: pass\n        except BaseException: pass\n"
    stubborn = f"import subprocess\ndef score(completion):\n{start}    while True:\n{endless}"
    rewards = Rewards([write(tmp_path / "mine.py", stubborn)], 60)
    rewards.seconds = 1.0
    with pytest.raises(
        UserError, match=r"mine\.py: score did not return within 1 s, for 1 completions: mend it\."
    ):
        rewards(["p"], ["c"], [None])
    check()


@pytest.mark.parametrize("end", ["return 3", "1 / 0", "os._exit(3)", "sys.exit()"])
def test_what_a_function_started_ends_with_it(tmp_path, pipe, end):
    """Another program, and unless the function ends its process itself, a copy of that: it holds
    the pipe of the answers.
    """
    path, check = pipe
    fork = "" if "_exit" in end else "    if not os.fork(): time.sleep(60)\n"
    start = f"    subprocess.Popen(['sleep', '60'], stdout=open({str(path)!r}, 'w'))\n"
    text = f"import os, subprocess, sys, time\ndef score(completion):\n{start}{fork}    {end}\n"
    rewards = Rewards([write(tmp_path / "mine.py", text)], 60)
    if end == "return 3":
        assert rewards(["p"], ["c"], [None]) == [3]
    else:
        with pytest.raises(UserError, match=r"ZeroDivisionError|exit code 3|SystemExit"):
            rewards(["p"], ["c"], [None])
    check()


def test_an_interrupt_ends_what_a_function_started(tmp_path, pipe):
    path, check = pipe
    start = f"    subprocess.Popen(['sh', '-c', 'echo; exec sleep 60'], stdout=open({str(path)!r}, 'w'))\n"
    text = f"import subprocess, time\ndef score(completion):\n{start}    time.sleep(60)\n"
    rewards = Rewards([write(tmp_path / "mine.py", text)], 60)

    def interrupt() -> None:
        with path.open("rb", buffering=0) as started:
            started.read(1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        rewards(["p"], ["c"], [None])
    check()


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("-1*length:3", "weight of the task 'length:3' should be above 0 and at most 1,000,000, not -1"),
        ("0*sum", "at most 1,000,000, not 0"),
        (f"1{'0' * 20}*sum", "at most 1,000,000, not 1000"),
        ("gone.py:score", r"There is no file gone\.py; a function of your own is FILE\.py:FUNCTION"),
        ("2*lenght:3", "Did you mean 'length'"),
    ],
)
def test_what_is_no_task(task, sentence):
    with pytest.raises(UserError, match=sentence):
        Rewards([task], 60)


@pytest.mark.whole
def test_a_reward_that_fails_later_loses_nothing(trained, tmp_path, failing, capsys):
    """The run is saved where it was, and the same command goes on once the function is mended."""
    folder, calls = tmp_path / "run", tmp_path / "calls"
    mine = tmp_path / "mine.py"
    text = (
        "import pathlib\n"
        f"calls = pathlib.Path({str(calls)!r})\n"
        "def score(completion):\n"
        "    count = calls.stat().st_size if calls.exists() else 0\n"
        "    calls.write_text('x' * (count + 1))\n"
        "    return 1 / (LIMIT - count) if count >= LIMIT else len(completion)\n"
    )
    before, a_round = 32, 4  # completions before the first step, and of a round
    task = write(mine, text.replace("LIMIT", str(before + a_round)))
    options = [*args(trained, folder), "--task", task, "--reward-timeout", "60s"]
    error = failing(reinforce.main, options)
    assert re.search(
        rf"{mine}:6: ZeroDivisionError: division by zero\. The run was saved at round 1 before it ended\.",
        error,
    )
    assert checkpoint.steps(folder) == [1]
    write(mine, "def score(completion): return len(completion)\n")
    capsys.readouterr()
    assert reinforce.main(options) == 0
    assert "resumed at step 1" in capsys.readouterr().out
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    assert result(folder)["rounds"] == 2
    assert json.loads((folder / "run.json").read_text())["rollout"]["task"] == [task]
