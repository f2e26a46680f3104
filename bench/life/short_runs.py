"""Makes short runs of the stages that were not given: the same commands that a person types, for seconds."""

import asyncio
import random
import subprocess
import sys
from pathlib import Path

from bench.cli import progress
from bench.plan.hardware import rapl_joules
from bench.serving.client import complete, completion_request, random_text
from bench.serving.server import Server
from engine.errors import UserError

SECONDS, REQUESTS, ANSWER = "20s", 100, 32  # of a run; requests to the server, and tokens of each answer


def make(stage: str, trained: Path | None, folder: Path) -> tuple[Path, float]:
    """Makes a run: trains the demo preset on Python's own source, tunes a run by LoRA on the house voice, or serves it.

    Returns where its record lies, and the joules that the processor counted meanwhile; 0 where they cannot be read.
    """
    joules, out = rapl_joules(), folder / stage
    if stage == "trained":
        _run("stages.train", "demo", "--data", "python", "--max-time", SECONDS, "--out-dir", str(out))
    elif stage == "tuned":
        flags = ("--context", "128", "--lora", "rank=8", "--general", "none", "--max-time", SECONDS)
        _run("stages.finetune", "--model", str(trained), "--data", "voice", *flags, "--out-dir", str(out))
    else:
        progress(f"serving {REQUESTS} requests")
        out.write_text(asyncio.run(_serve(trained)), encoding="utf-8")
    return out, rapl_joules() - joules


async def _serve(model: Path | None) -> str:
    """Starts a server, sends it requests, eight at a time, stops it and returns its log."""
    rng, room = random.Random(0), asyncio.Semaphore(8)
    async with Server(str(model), ("--log", "json")) as server:

        async def ask() -> None:
            async with room:
                await complete(server.client, completion_request(random_text(rng, 16), ANSWER, temperature=1.0))

        await asyncio.gather(*(ask() for _ in range(REQUESTS)))
        server.process.terminate()
        if await server.wait(30) != 0:
            raise UserError(f"stages.serve did not stop as it should: {server.output()[-600:]}")
        return server.output()


def _run(*command: str) -> None:
    progress(f"python -m {' '.join(command)} ...")
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"python -m {' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
