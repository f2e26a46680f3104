"""T2: a damaged file of the newest checkpoint is named, and the one before it is used."""

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest

from engine.storage import checkpoint
from tests.promises.figures import exactly
from tests.promises.training.tiny_training import bits, saved_bits


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = random.Random(str(path)).randrange(len(data))
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


CORRUPTIONS = {
    "delete": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "flip a bit": flip_bit,
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "lengthen": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder instead": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.promises(name="T2")
def test_every_file_corrupted_in_every_way(make_run, reference, side_by_side, quick, expect):
    """Each file of a run folder, and of what is cached, corrupted in each way; then the same
    command again.
    """
    wanted = reference()
    runs = [make_run(server=server) for server in (0, 1)]
    assert runs[0].live() == 0
    whole = shutil.copytree(runs[0].work, runs[0].work.with_name("whole"))
    parts = sorted(
        path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size
    )
    cases = [(part, way) for part in parts if "hardware" not in part.parts for way in CORRUPTIONS][
        :: 40 if quick else 1
    ]
    earlier, last = checkpoint.steps(whole / "run")
    newest = f"run/checkpoints/{last}/"

    def corrupt(half: int) -> list[str]:
        run, wrong = runs[half], []
        for part, way in cases[half::2]:
            shutil.rmtree(run.work)
            shutil.copytree(whole, run.work)
            if part.parts[0] == "cache":  # read by a new run
                shutil.rmtree(run.folder)
            CORRUPTIONS[way](run.work / part)
            code, text = run.live(), run.output.read_text()
            named = f"damaged: {run.work / part}" in text and f"resumed at step {earlier}" in text
            # A damaged log is not noticed: no run computes with it.
            found = saved_bits(run.folder) if part.name == "metrics.jsonl" else bits(run.folder)
            same = code == 0 and found.items() <= wanted.items()
            refused = code == 2 and "error: " in text and str(run.work / part.parts[0]) in text
            refused = refused and [earlier, last] == checkpoint.steps(run.folder)
            if (
                not ((named and same) if str(part).startswith(newest) else (same or refused))
                or "Traceback" in text
            ):
                wrong.append(f"{way} {part}: {code} {named=} {same=} {text[-300:]}")
        return wrong

    wrong = [*itertools.chain(*side_by_side(corrupt, (0, 1)))]
    print(*wrong, sep="\n")
    inside = sum(str(part).startswith(newest) for part, _ in cases)
    over = f"{inside} damages to the newest checkpoint, {len(cases) - inside} to other files of the run and its cache"
    expect(exactly("damages that were neither named nor harmless", len(wrong), 0), over=over)
