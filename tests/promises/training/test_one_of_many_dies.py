"""T9: one of several processes is killed; the others end, and the same command goes on. A slow one is waited for."""

import shutil
import signal
import time

import numpy as np
import pytest

from engine.mesh.processes import RESTART
from engine.storage import checkpoint
from tests.promises.figures import at_most, exactly
from tests.promises.training.tiny_training import bits
from tests.stages.distributed.many_processes import FLAGS, finish, until_saved
from tests.stages.tiny_runs import metrics, tiny


@pytest.mark.promises(name="T9")
def test_one_of_several_dies(start, text, tmp_path, quick, expect):
    """kill -9 of each in turn; then to the end with as many processes, which changes no bit, and
    with half as many.
    """
    words = lambda folder: tiny(text, folder, *FLAGS, "--steps", 16 if quick else 40)
    slowest, kills, wrong, different, furthest = 0.0, 0, 0, 0, 0.0
    for count in (2,) if quick else (2, 4):
        whole, folder = tmp_path / f"whole{count}", tmp_path / f"killed{count}"
        codes, errors = finish(start(count, "train", *words(whole)))
        assert codes == {0}, errors
        for victim in (1,) if quick else range(count):
            processes = start(count, "train", *words(folder))
            until_saved(folder, max(checkpoint.steps(folder), default=0) + 4, processes)
            processes.pop(victim).kill()
            begin = time.monotonic()
            codes, errors = finish(processes)
            slowest, kills = max(slowest, time.monotonic() - begin), kills + 1
            wrong += not codes <= {RESTART, -signal.SIGABRT}
        fewer = shutil.copytree(folder, tmp_path / f"fewer{count}")
        for processes, end in ((count, folder), (count // 2, fewer)):
            codes, errors = finish(start(processes, "train", *words(end)))
            assert codes == {0}, errors
        different += bits(folder) != bits(whole)
        ours, theirs = ([row["loss"] for row in metrics(end) if "loss" in row] for end in (fewer, whole))
        furthest = max(furthest, float(np.abs(np.divide(ours, theirs) - 1).max()))
    expect(
        at_most("until all are gone", slowest, 15, " s"),
        exactly("ends with a code that asks for no restart", wrong, 0),
        exactly("resumed runs of other bits", different, 0),
        at_most("losses on half as many processes, relative", furthest, 1e-5),
        over=f"{kills} kills, of 2 processes" + " and of 4" * (not quick),
    )


SLOW = """
import time, jax.stages
from stages.runs.text_evaluators import Evaluator
compile, evaluate = jax.stages.Lowered.compile, Evaluator.evaluate
jax.stages.Lowered.compile = lambda *arguments: (time.sleep(SECONDS), compile(*arguments))[1]
Evaluator.evaluate = lambda *arguments: (time.sleep(SECONDS), evaluate(*arguments))[1]
"""


@pytest.mark.promises(name="T9")
def test_a_slow_process_is_not_taken_for_dead(start, text, tmp_path, quick, expect):
    """One is stopped for 35 s before it joins; then it takes longer for each program that it
    compiles and each evaluation.
    """
    seconds = 35 if quick else 60
    two = start(
        2,
        "train",
        *tiny(text, tmp_path / "run", *FLAGS),
        patch=lambda i: SLOW.replace("SECONDS", str(seconds)) * i,
    )
    two[1].send_signal(signal.SIGSTOP)
    time.sleep(35)
    two[1].send_signal(signal.SIGCONT)
    for process in two:
        process.wait(1200)
    codes, errors = finish(two)
    expect(
        exactly("slow starts ended", sum(code != 0 for code in codes), 0),
        over=f"1 start, {seconds} s slower: {errors}",
    )
