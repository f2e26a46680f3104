"""Damages model files at random and loads each under a limit on memory; `python hostile.py SEED COUNT` says what came of it.

Every file must be refused with a UserError or read as a model. Anything else (another exception, a
crash, memory beyond the file and 64 MB, more than a second) is an escape, and the exit code is 1.
"""

import collections
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.allocator import return_freed_memory
from engine.errors import UserError
from engine.storage.model_loader import load_model
from tests.storage.gguf_files import tiny_gguf
from tests.storage.hf_folders import CONFIG, WEIGHTS, write_folder

ALLOWED = 64 * 2**20
LONGEST = 1.0  # seconds of computing
TRIES = 20
NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    9,
    31,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def damaged(data: bytes, head: int, draw: random.Random) -> bytes:
    """The same file with a few faults, most of them in its first `head` bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        at = (
            draw.randrange(min(head, len(changed)) if draw.random() < 0.95 else len(changed))
            if changed
            else 0
        )
        match draw.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << draw.randrange(8)]) if changed else b""
            case 2:
                changed[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))
            case 3:
                changed[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS) % 2**32)
            case 4:
                del changed[at : at + draw.choice([1, 4, 8, 100])]
            case 5:
                length = draw.choice([1, 4, 8, 100])
                changed[at:at] = changed[at + length : at + 2 * length]
            case 6:
                del changed[draw.randrange(len(changed) + 1) if draw.random() < 0.3 else len(changed) - 1 :]
    return bytes(changed)


def limited() -> None:
    """From here on no more than ALLOWED is to be had beyond what is held already. The files are of
    a few kilobytes.

    A thread that starts at that moment holds twice its heap and gives half back, and one that ends
    gives back its stack: a limit set just then is too wide by as much. So the limit is tried, and
    set again until it holds.
    """
    for _ in range(TRIES):
        return_freed_memory()
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory + ALLOWED, resource.RLIM_INFINITY))
        try:
            bytearray(ALLOWED + 2**20)
        except MemoryError:
            return
        time.sleep(0.1)
    sys.exit("the limit on memory does not hold")


def main(seed: int, count: int) -> int:
    with tempfile.TemporaryDirectory() as place:
        folder, file = (
            write_folder(Path(place) / "model", CONFIG, WEIGHTS),
            tiny_gguf(Path(place) / "model.gguf", kind="Q8_0"),
        )
        files: list[tuple[Path, Callable[[], object], int]] = [
            (file, lambda: load_model(file), 8000),
            (folder / "model.safetensors", lambda: load_model(folder), 3000),
            (folder / "config.json", lambda: load_model(folder), 10**6),
            (folder / "tokenizer.json", lambda: load_model(folder), 10**6),
            (folder / "tokenizer_config.json", lambda: load_model(folder), 10**6),
        ]
        sound = {path: path.read_bytes() for path, _, _ in files}
        for path, load, head in files:
            load()
            damaged(sound[path], head, random.Random(0))
        limited()
        outcomes: collections.Counter[str] = collections.Counter()
        slowest = 0.0
        for number in range(count):
            draw = random.Random(seed * 10**9 + number)
            path, load, head = draw.choices(files, [10, 10, 1, 1, 1])[0]
            path.write_bytes(damaged(sound[path], head, draw))
            begin = time.process_time()
            try:
                load()
                outcome = "read"
            except UserError:
                outcome = "refused"
            except BaseException as error:
                outcome = "escaped"
                print(
                    f"seed {seed}, number {number}, {path.name}: {type(error).__name__}: {str(error)[:200]}"
                )
            seconds = time.process_time() - begin
            if seconds > LONGEST:
                outcome = "escaped"
                print(f"seed {seed}, number {number}, {path.name}: {seconds:.1f} s")
            slowest = max(slowest, seconds)
            outcomes[f"{outcome} {path.suffix}"] += 1
            path.write_bytes(sound[path])
    print(json.dumps({"outcomes": outcomes, "slowest_s": round(slowest, 3)}))
    return 1 if any(name.startswith("escaped") for name in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
