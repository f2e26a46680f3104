"""Promises about what is sent: nothing makes the server compile, fail or stall, long texts are read in time, clients work."""

import asyncio
import json
import subprocess
import sys
import tempfile

from bench.fuzz import fuzzed
from bench.promises import MS, Figure, Outcome, Promise, Trial, server_errors
from bench.serving.http_client import Answer
from bench.serving.load import percentile
from engine.counting.hardware import clock

PROBES = 20  # a second
SMALL = 80  # tokens of prompt and answer where schemas are fuzzed: sound requests without a limit run until it is full
FUZZING = 1200  # seconds
MEGABYTE = 1 << 20
TEXTS = {
    "a": b"a" * MEGABYTE,
    "^": b"^" * MEGABYTE,
    "emoji": "🙂👩‍🚀🏳️‍🌈".encode() * (MEGABYTE // len("🙂👩‍🚀🏳️‍🌈".encode())),
    "base64": None,  # drawn
}


async def nothing_disturbs_it(trial: Trial) -> Outcome:
    """Damaged requests, eight at a time, while /health is asked 20 times a second."""
    count = trial.count(10_000, 800)
    client, left = trial.server.client, iter(range(count))
    answers: list[Answer] = []

    async def sends() -> None:
        for _ in left:
            asked = fuzzed(trial.rng)
            answers.append(await client.ask(asked.method, asked.path, asked.body, headers=asked.headers, seconds=30))

    done = asyncio.Event()
    probes = asyncio.create_task(_probed(trial, done))
    await asyncio.gather(*(sends() for _ in range(8)))
    done.set()
    health = await probes
    compiles = (await client.get("/health")).json()["compiles_after_ready"]
    trial.asked += count
    good = sum(answer.status == 200 for answer in answers)
    return Outcome(
        (
            Figure("compiles after ready", compiles, 0),
            Figure("5xx", server_errors(answers), 0),
            Figure("unanswered", sum(answer.broken is not None for answer in answers), 0),
            Figure("/health p99", percentile(health, 0.99) * MS, 100, " ms"),
        ),
        f"{count:,} fuzzed requests of which {good:,} were sound, {len(health)} probes of /health",
    )


async def _probed(trial: Trial, done: asyncio.Event) -> list[float]:
    """Seconds of each GET of /health; one that is not 200 counts as never answered."""
    taken, at = [], clock()
    while not done.is_set():
        answer = await trial.server.client.get("/health", asked=at, seconds=10)
        taken.append(answer.seconds if answer.status == 200 else float("inf"))
        at = max(at + 1 / PROBES, clock())
        await asyncio.sleep(max(0.0, at - clock()))
    return taken


async def tokenizing_is_linear(trial: Trial) -> Outcome:
    """A megabyte of one thing, tokenized by the server; /health is asked meanwhile."""
    import base64

    figures = []
    for name, text in TEXTS.items():
        data = text if text is not None else base64.b64encode(trial.rng.randbytes(MEGABYTE * 3 // 4))
        body = json.dumps({"model": "default", "prompt": data.decode()}, ensure_ascii=False).encode()
        answer = await trial.server.client.post("/tokenize", body, seconds=60)
        taken = answer.seconds / (len(data) / MEGABYTE) if answer.status == 200 and answer.json()["count"] else float("nan")
        figures.append(Figure(f"1 MB of {name}", taken, 1, " s"))
    return Outcome(tuple(figures), "through /tokenize, the way there and back included")


async def clients_just_work(trial: Trial) -> Outcome:
    """The official client, sync, async and streaming, and schema fuzzing of the server's own OpenAPI."""
    try:
        import openai  # noqa: F401
    except ImportError:
        return Outcome((), "", "needs the official client: pip install -e '.[dev]'")
    from bench.promises_client import cases

    done, failed = await asyncio.to_thread(cases, trial.server.port)
    async with trial.another("--capacity", str(SMALL)) as small:
        code, said = await asyncio.to_thread(_schema_fuzzing, small.port, trial.count(30, 4), trial.quick)
    return Outcome(
        (Figure("client cases that work", done / (done + len(failed)), 1, most=False),
         Figure("schema fuzzing's failures", float(code), 0)),
        f"{done + len(failed)} cases of openai {_version('openai')}; {said}" + "".join(f"; failed: {name}" for name in failed),
    )  # fmt: skip


def _version(library: str) -> str:
    from importlib.metadata import version

    return version(library)


def _schema_fuzzing(port: int, examples: int, quick: bool) -> tuple[int, str]:
    """Runs schemathesis, positive and negative, on every operation -> its exit code and its own summary.

    That a sound request is answered is not among its checks: a prompt that does not fit is refused, which no schema can say.
    `quick` leaves out its walk over every boundary of every field. What has not ended in FUZZING seconds has failed.
    """
    phases = "fuzzing" if quick else "coverage,fuzzing"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json", "--mode", "all",
                 "--max-examples", str(examples), "--request-timeout", "30", "--seed", "1", "--no-color", "--workers", "4",
                 "--phases", phases, "--exclude-checks", "positive_data_acceptance"],
                cwd=folder, capture_output=True, text=True, check=False, timeout=FUZZING,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 1, f"schemathesis did not end in {FUZZING} s"
    said = done.stdout + done.stderr
    lines = [line.strip("= ") for line in said.splitlines() if "generated" in line or "No issues" in line]
    return done.returncode, "schemathesis: " + (", ".join(lines) or said[-300:])


PROMISES: list[tuple[str, str, Promise]] = [
    ("S6", "no request causes a compile, an out-of-memory or a blocked loop", nothing_disturbs_it),
    ("S7", "tokenizing is linear and bounded", tokenizing_is_linear),
    ("S10", "OpenAI clients just work", clients_just_work),
]
