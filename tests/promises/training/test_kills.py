"""T1, T3, T7 and T8: a run that is ended, killed or refused by the disk at any moment goes on to the same bits."""

import contextlib
import errno
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.faults import ENDED
from tests.promises.figures import Figure, at_most, exactly
from tests.promises.training.fork_server import ROOT
from tests.promises.training.tiny_training import SAVE_EVERY, Fault, TinyRun, bits, differing

MUON, ADAMW = (), ("--optimizer", "adamw")
# training goes on while a save is written, but the next one waits for it
MOST_LOST = 2 * SAVE_EVERY
LAST = 2000  # more changes on disk than any of these runs makes


def conclude(expect, runs: list[TinyRun], different: int, over: str, *figures) -> None:
    problems = [problem for run in runs for problem in run.problems]
    print(*problems, sep="\n")
    finished = sum(len(run.finished) for run in runs)
    expect(
        exactly("checkpoints lost or damaged, unclear ends", len(problems), 0),
        exactly("resumed runs of other bits", different, 0),
        *figures,
        over=f"{over}; {finished} runs finished",
    )


def work_lost(runs: list[TinyRun]) -> tuple[Figure, Figure]:
    """What a kill costs: the steps of an interval, and those while a save is written, which the
    next save waits for.
    """
    return (
        at_most("steps from a checkpoint to the next save", max(run.unsaved for run in runs), SAVE_EVERY),
        at_most("steps lost", max(max(run.losses) for run in runs), MOST_LOST),
    )


def survive_each(
    make_run, reference, side_by_side, strides, code: int, faults
) -> tuple[list[TinyRun], int, str]:
    """Gives runs of two kinds each k-th fault, k in steps of `strides`: the runs, how many ended
    otherwise, and the faults.
    """
    for words in strides:
        reference(*words)
    runs = [[make_run(*words, server=half) for words in strides] for half in (0, 1)]

    def survive(half: int) -> int:
        ranges = [range(1 + half * stride, LAST, 2 * stride) for stride in strides.values()]
        return sum(run.survive(map(faults, ks), [code]) for run, ks in zip(runs[half], ranges))

    happened = sum(side_by_side(survive, (0, 1)))
    different = sum(differing(run, reference(*words)) for half in runs for words, run in zip(strides, half))
    every = runs[0] + runs[1]
    kinds = sum((run.kinds for run in every), Counter()).most_common()
    return every, different, f"{happened}: {', '.join(f'{count} at {kind}' for kind, count in kinds)}"


@pytest.mark.promises(name="T1")
def test_ends_at_every_change_on_disk(make_run, reference, side_by_side, quick, expect):
    """The process ends at its k-th change on disk, for each k (Muon) and each eighth (AdamW); the
    next one goes on.
    """
    strides = {MUON: 90} if quick else {MUON: 1, ADAMW: 8}
    runs, different, happened = survive_each(make_run, reference, side_by_side, strides, ENDED, Fault)
    conclude(expect, runs, different, f"ends {happened}", *work_lost(runs))


@pytest.mark.promises(name="T8")
def test_each_change_on_disk_is_refused(make_run, reference, side_by_side, quick, expect):
    """The k-th change fails: no space or read-only, as all after it do, or an error once."""

    def fault(k: int) -> Fault:
        error = (errno.ENOSPC, errno.EIO, errno.EROFS)[k // 2 % 3 if quick else k % 3]
        return Fault(k, error, error == errno.EIO)

    strides = {MUON: 90} if quick else {MUON: 1, ADAMW: 8}
    runs, different, happened = survive_each(make_run, reference, side_by_side, strides, 2, fault)
    late = at_most("steps after it", max(max(run.losses) for run in runs) - MOST_LOST, 1)
    conclude(expect, runs, different, f"refusals {happened}", late)


@pytest.mark.law("resume")
@pytest.mark.promises(name="T1")
def test_kills_at_random_moments(make_run, reference, side_by_side, quick, expect):
    """SIGKILL, and again; saves take half of the time of these runs."""
    length = ("--steps", 60, "--save-every", SAVE_EVERY, "--log-every", 1, "--eval-every", 10)
    counts = {MUON: 4, ADAMW: 2} if quick else {MUON: 130, ADAMW: 70}
    wanted = {words: reference(*words, length=length) for words in counts}
    runs = {words: make_run(*words, server=server, length=length) for server, words in enumerate(counts)}

    def kill(words: tuple[str, ...]) -> int:
        run, draw, kills = runs[words], random.Random(str(words)), 0
        saves = run.work.with_suffix(".saves")
        while kills < counts[words]:
            size = saves.stat().st_size if saves.exists() else 0
            process, until = run.start(), time.monotonic() + 30
            if kills % 2:  # the others come mostly while it starts
                while not (saves.exists() and saves.stat().st_size > size) and time.monotonic() < until:
                    time.sleep(0.002)
            end(process, draw.uniform(0, 0.5 if kills % 2 else 2.5))
            code = run.server.wait()
            kills += code == -signal.SIGKILL
            run.examine(code, {0, -signal.SIGKILL}, f"kill {kills}")
        run.finish()
        return kills

    kills = sum(side_by_side(kill, counts))
    different = sum(differing(runs[words], wanted[words]) for words in counts)
    mean = statistics.mean(itertools.chain(*(run.losses for run in runs.values())))
    over = f"{kills} SIGKILLs, each of which cost {mean:.1f} steps"
    conclude(expect, [*runs.values()], different, over, *work_lost([*runs.values()]))


def end(process: int, seconds: float) -> None:
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@pytest.mark.law("resume")
@pytest.mark.promises(name="T3")
def test_kills_at_random_steps(make_run, make_tuning, side_by_side, quick, expect):
    """SIGKILL at random steps of 200, in pretraining with Muon and in fine-tuning with LoRA."""
    steps = 60 if quick else 200
    length = ("--steps", steps, "--save-every", 10, "--log-every", 1, "--eval-every", 50)
    kinds = {
        "train": lambda server: make_run(server=server, length=length),
        "finetune": lambda server: make_tuning(server, length[:-4]),
    }
    times = 2 if quick else 20

    def kill(numbered: tuple[int, str]) -> tuple[TinyRun, int]:
        server, stage = numbered
        whole, run = kinds[stage](server), kinds[stage](server)
        assert whole.live() == 0, whole.output.read_text()
        for step in sorted(random.Random(stage).sample(range(1, steps), times)):
            process = run.start()
            while not any(row["step"] >= step for row in run.rows()):
                time.sleep(0.002)
            end(process, 0)
            run.examine(run.server.wait(), {0, -signal.SIGKILL}, f"kill at {step}")
        run.finish()
        return run, differing(run, bits(whole.folder))

    killed = side_by_side(kill, enumerate(kinds))
    runs, different = [run for run, _ in killed], sum(count for _, count in killed)
    conclude(expect, runs, different, f"{times} SIGKILLs each of {', '.join(kinds)}")


@pytest.mark.law("determinism")
@pytest.mark.promises(name="T7")
def test_two_processes(make_run, text, side_by_side, expect):
    """100 steps in processes of their own, two at a time, by Muon and AdamW. By default the clock
    decides when to evaluate.
    """
    length = ("--steps", 100, "--log-every", 1, "--eval-every", 20)
    runs = {
        name: [make_run("--optimizer", name, server=half, length=length) for half in (0, 1)]
        for name in ("muon", "adamw")
    }

    def train(half: int) -> None:
        for name in runs:
            words = [sys.executable, "-m", "stages.train", *runs[name][half].words]
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)

    side_by_side(train, (0, 1))
    different = sum(bits(a.folder) != bits(b.folder) for a, b in runs.values())
    expect(
        exactly("pairs that differ in a bit", different, 0),
        over="2 pairs of 100 steps; there is no slower mode to ask for",
    )
