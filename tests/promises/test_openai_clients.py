"""S10: OpenAI clients just work: the official one, sync, async and streaming, and schema fuzzing of our own OpenAPI."""

import asyncio
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from figures import exactly
from openai_suite import *  # noqa: F403

pytestmark = [pytest.mark.anyio, pytest.mark.promises("S10", "OpenAI clients just work")]

SMALL_CAPACITY = 80  # tokens where schemas are fuzzed: sound requests without a limit run until it is full
FUZZING_SECONDS = 1200  # in which schemathesis is to end


@pytest.fixture
def address(server):
    return f"http://127.0.0.1:{server.port}"


async def test_schema_fuzzing(make_server, quick, tmp_path, expect):
    """Sound and unsound requests that schemathesis makes of our OpenAPI.

    That a sound request is answered is not among its checks: a prompt that does not fit is refused, which no schema can
    say. `--quick` leaves out its walk over every boundary of every field.
    """
    async with make_server("--capacity", str(SMALL_CAPACITY)) as server:
        code, summary = await asyncio.to_thread(_run_schemathesis, server.port, quick, tmp_path)
    expect(exactly("exit code of schema fuzzing", code, 0), over=f"openai {openai.__version__}; schemathesis: {summary}")


def _run_schemathesis(port: int, quick: bool, folder: Path) -> tuple[int, str]:
    """Its exit code and its own summary; 1 when it does not end in FUZZING_SECONDS."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json", "--mode", "all",
        "--max-examples", "4" if quick else "30", "--request-timeout", "30", "--seed", "1", "--no-color", "--workers", "4",
        "--phases", "fuzzing" if quick else "coverage,fuzzing", "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=FUZZING_SECONDS)
    except subprocess.TimeoutExpired:
        return 1, f"did not end in {FUZZING_SECONDS} s"
    output = run.stdout + run.stderr
    lines = [line.strip("= ") for line in output.splitlines() if "generated" in line or "No issues" in line]
    return run.returncode, ", ".join(lines) or output[-300:]
