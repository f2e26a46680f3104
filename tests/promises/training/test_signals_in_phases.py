"""T5: Ctrl-C, SIGTERM and a closed terminal in every phase of a run."""

import itertools
import os
import random
import signal
import time

import pytest

from engine.storage import checkpoint
from tests.promises.figures import at_most, exactly
from tests.promises.training.tiny_training import TinyRun

ENDLESS = ("--steps", 100_000, "--log-every", 1)
RARELY = 10**6
# phase: its words, and what is there when it begins
PHASES = {
    "start": (ENDLESS, lambda run: True),
    "compile": (ENDLESS, lambda run: (run.folder / "run.json").exists()),
    "train": ((*ENDLESS, "--save-every", RARELY, "--eval-every", RARELY), lambda run: len(run.rows()) > 3),
    "evaluate": ((*ENDLESS, "--save-every", RARELY, "--eval-every", 1), lambda run: len(run.rows()) > 3),
    "save": ((*ENDLESS, "--save-every", 1, "--eval-every", RARELY), lambda run: checkpoint.steps(run.folder)),
    "last measurement": (("--steps", 9, "--log-every", 1), lambda run: 9 in checkpoint.steps(run.folder)),
}
ON_TERMINAL = "import os; os.dup2(os.open({!r}, os.O_WRONLY | os.O_NOCTTY), 1); os.dup2(1, 2)"
# else it takes no time
COMPILES = "import jax; jax.config.update('jax_enable_compilation_cache', False)"


def wait_until(begun, run: TinyRun) -> None:
    until = time.monotonic() + 60
    while not begun(run):
        assert time.monotonic() < until, run.output.read_text()
        time.sleep(0.002)


@pytest.mark.promises(name="T5")
def test_a_signal_in_every_phase(make_run, side_by_side, quick, expect):
    trials = list(itertools.islice(itertools.cycle(PHASES), 6 if quick else 54))
    slowest, wrong = [0.0], []

    def stop(half: int) -> None:
        draw = random.Random(half)
        for number, phase in enumerate(trials[half::2]):
            words, begun = PHASES[phase]
            run = make_run(server=half, length=words)
            sent = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[(number + number // 3) % 3]
            closed = sent == signal.SIGHUP
            terminal, screen = os.openpty()
            printing = ON_TERMINAL.format(os.ttyname(screen)) * closed
            process = run.start(patch=f"{printing}\n{COMPILES * (phase == 'compile')}")
            wait_until(begun, run)
            time.sleep(draw.uniform(0.05, 0.6) if phase in ("start", "compile") else draw.uniform(0, 0.3))
            begin = time.monotonic()
            os.close(screen)
            os.close(terminal)
            for _ in range(1 + closed):  # its shell sends another
                os.kill(process, sent)
            code = run.server.wait()
            slowest.append(time.monotonic() - begin)
            text, logged = run.output.read_text(), max((row["step"] for row in run.rows()), default=0)
            saved = max(checkpoint.steps(run.folder), default=0)
            ok = code == 128 + sent and (closed or "Stopped " in text) and "Traceback" not in text
            if phase in ("train", "evaluate", "save"):
                ok = ok and saved == logged > 0
            run.examine(code, {code}, phase)
            if not ok or run.problems:
                wrong.append(
                    f"{phase} {sent.name}: {code}, logged {logged}, saved {saved}, {run.problems} "
                    f"{text[-300:]}"
                )

    side_by_side(stop, (0, 1))
    print(*wrong, sep="\n")
    expect(
        exactly("not saved or not said", len(wrong), 0),
        at_most("to leave", max(slowest), 10, " s"),
        over=f"{len(trials)} signals: {', '.join(PHASES)}",
    )
