"""The command as its own process: its output, its refusals and its end (S8)."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from engine.counting import hardware
from engine.device import start_jax
from engine.errors import UserError
from engine.inference import config as engine_config
from engine.inference.config import EngineConfig
from engine.inference.request import SamplingParams
from engine.model.native.library import KERNELS, native_problem
from engine.model.ops import kernels_note
from stages.cli.command import explain_error
from stages.cli.console import Console
from stages.serve import load
from stages.serve.__main__ import main
from stages.serve.compile_ahead import CompileAhead
from stages.serve.engine_thread import EngineThread
from stages.serve.flags import ServeFlags
from stages.serve.run import start_engine
from stages.serve.state import ServerState
from tests.serve.started import HOLDS, Started
from tests.serve.tiny_server import PATIENCE, ask, until
from tests.text.chat_models import save_chat_model
from tests.tiny import tiny_config

INT8 = "int8" if native_problem() else "Q8_0"  # which the kernel multiplies in blocks
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in Hugging Face's layout, of whole blocks."""
    sizes = {"width": 32, "heads": 8, "kv_heads": 2, "head_dim": 8, "ff": 96}
    save_chat_model(place := tmp_path_factory.mktemp("models") / "sea", **sizes)
    return place


def in_background(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def running(server: Started, count: int, status: str = "ok") -> bool:
    is_so = lambda health: health["running"] >= count and health["status"] == status
    return until(lambda: is_so(server.client.get("/health").json()))


@pytest.fixture
def hold(tmp_path):
    """A file: while it is there, the servers that are started with its variable hold the requests
    that have a slot.
    """
    (tmp_path / "hold").touch()
    return tmp_path / "hold"


@pytest.mark.law("immutable weights")
def test_a_signal_lets_what_is_under_way_end(folder, hold):
    with Started(folder, "--name", "sea", "--root-path", "/llm/", env={"HOLD": str(hold)}) as server:
        assert f"weights   {INT8}" in server.output
        assert server.client.get("/llm/live").json() == server.client.get("/live").json()
        assert server.client.get("/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert re.search(r"compiling \.\.\. \d", server.output)
        replies: list[httpx.Response] = []
        body = ask("Hello " * 20, 100, ignore_eos=True, model="sea", logprobs=2, presence_penalty=0.5) | {
            "temperature": 1
        }
        threads = [
            in_background(
                lambda more=more: replies.append(server.client.post("/v1/completions", json=body | more))
            )
            for more in ({"stream": True}, {})
        ]
        assert running(server, 2)
        server.process.send_signal(signal.SIGTERM)
        assert running(server, 2, "draining")
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            late = server.client.post(path, json=ask(model="sea"))
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert late.headers["retry-after"]
        hold.unlink()
        for thread in threads:
            thread.join()
        assert server.ends() == 0
        assert {reply.status_code for reply in replies} == {200}
        assert sum(reply.text.count("[DONE]") for reply in replies) == 1
        assert sum('"completion_tokens":100' in reply.text for reply in replies) == 1
        assert (
            "Finishing what is under way; another signal ends it at once. Requests under way: 2."
            in server.output
        )
        assert re.search(
            r"Weights unchanged: SHA-256 [0-9a-f]{16}; 0 programs compiled after the server was ready\.",
            server.output,
        )
        assert "Traceback" not in server.output


@pytest.mark.night
@pytest.mark.journeys
def test_a_damaged_kernel_is_built_again_and_one_cut_while_in_use_harms_nothing(folder, tmp_path):
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")
    intact = {path.name: path.read_bytes() for path in Path(os.environ["THRICE_CACHE"], "native").iterdir()}
    place = tmp_path / "native"
    place.mkdir(0o700)
    for name, data in intact.items():
        (place / name).write_bytes(data[: len(data) // 2])
    with Started(folder, env={"THRICE_CACHE": str(tmp_path)}, program=("-m", "stages.serve")) as server:
        assert "; kernels in C" in server.output
        rebuilt = [name for name, data in intact.items() if (place / name).read_bytes() == data]
        assert len(rebuilt) == len(KERNELS)
        answer = lambda: server.client.post("/v1/completions", json=ask(most=9, model="default")).json()[
            "choices"
        ]
        before = answer()
        for name in rebuilt:
            os.truncate(place / name, 0)
        assert answer() == before
        server.process.send_signal(signal.SIGTERM)
        assert server.ends() == 0


def test_a_second_signal_ends_it_at_once(folder, hold):
    with Started(folder, env={"THRICE_API_KEY": "one,two", "HOLD": str(hold)}, key="two") as server:
        assert "2 API keys" in server.output
        assert httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).status_code == 401

        replies = []

        def asks():
            with contextlib.suppress(httpx.HTTPError):
                replies.append(
                    server.client.post(
                        "/v1/completions", json=ask(most=100, ignore_eos=True, model="default")
                    )
                )

        thread = in_background(asks)
        assert running(server, 1)
        server.process.send_signal(signal.SIGTERM)
        assert running(server, 1, "draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.ends() == 143
        thread.join()
        assert replies == []


# Sends itself a signal while it prints that it is ready.
SIGNALS = """
import os, signal, time
from stages.cli.command import explain_error
from stages.cli.console import Console
say = Console.print
def say_and_signal(self, text="", style=None):
    say(self, text, style)
    if "Ctrl-C" in text:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
Console.print = say_and_signal
"""


@pytest.mark.night
def test_a_signal_that_comes_with_its_ready_line_ends_it_in_order_though_nobody_reads_on(folder):
    with Started(folder, program=("-c", SIGNALS + HOLDS)) as server:
        server.process.stdout.close()
        assert server.process.wait(300) in (0, 141)


def test_ctrl_c_while_it_compiles(folder):
    compiles = "import threading, engine.inference.engine as s\n"
    compiles += (
        "s.Engine.warm = lambda *_, **__: (print('compiles', flush=True), threading.Event().wait())\n" + HOLDS
    )
    with Started(folder, program=("-c", compiles), begun="compiles") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.ends() == 130
    assert "Stopped before it was ready." in server.output
    assert "Traceback" not in server.output


def refuses(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert main(list(map(str, flags))) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    assert len(output.err.splitlines()) == 1
    return output.err


def test_a_port_in_use(folder, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"Port {port} of 127.0.0.1 is in use" in refuses(capsys, "--model", folder, "--port", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.7.7", "example.org"])
def test_an_address_others_can_reach_needs_a_key(host, capsys, monkeypatch):
    for empty in ("", " , "):
        monkeypatch.setenv("THRICE_API_KEY", empty)
        assert "give --api-key" in refuses(capsys, "--host", host, "--port", 0)


def test_without_its_extra_it_says_how_to_get_it(folder):
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('starlette', 'uvicorn') else find(name, *a)\n"
        "from stages.serve.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--model", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "needs starlette, uvicorn" in result.stderr
    assert "uv run --extra serve python -m stages.serve --model x" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def load_state(folder: Path, sampling: Any = None, **options: Any) -> tuple[ServerState, CompileAhead]:
    told = load.ServerOptions(sampling=sampling or {})
    return load.load_state(str(folder), EngineConfig(**options), start_jax(one_arena=False), Console(), told)


@pytest.mark.whole
@pytest.mark.parametrize(
    "weights", ["int8", *(pytest.param(name, marks=pytest.mark.night) for name in ("bfloat16", "float32"))]
)
def test_the_type_of_the_weights(folder, weights, capsys, count_compiles):
    adapters = int(weights == "int8")  # their stacks are arguments of the programs
    state, ahead = load_state(folder, weights=weights, slots=3, prefix_cache_bytes=10**6, adapters=adapters)
    state.tokenizer.close()
    output = capsys.readouterr().out
    assert re.search(
        rf"weights +{INT8 if weights == 'int8' else weights}, [\d.]+ kB, SHA-256 {state.digest[:16]}", output
    )
    assert kernels_note().removeprefix("; ") in " ".join(output.split())
    assert (state.engine.capacity, state.name) == (150, "sea")
    programs, reports = list(ahead), []
    # Two that clear and copy a slot where no kernel attends, else one that decodes few rows.
    count = 10 if native_problem() else 9
    assert len(programs) == len(dict(programs)) == programs[0][1] == count
    count_compiles.clear()
    state.engine.engine.warm(lambda done, total: reports.append((done, total)), programs)
    assert count_compiles == []  # what was compiled beside the loading is what is asked for
    assert reports == [(n, count) for n in range(1, count + 1)]


@pytest.mark.parametrize(
    ("recommended", "flags", "sampling", "said"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 1.5, "top_k": 20, "min_p": None},
            {"top_k": 7, "min_p": None},
            SamplingParams(temperature=0.6, top_k=7),
            [
                "top_k 7 by a flag; temperature 0.6 as the model recommends; what a request says wins",
                "ignored: top_p must be between 0 and 1, not 1.5.",
            ],
        ),
        (
            {"temperature": 3.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
            {},
            SamplingParams(),
            ["ignored: temperature must be between 0 (greedy) and 2, not 3.0."],
        ),
    ],
)
def test_a_flag_wins_over_the_models_sampling(folder, tmp_path, capsys, recommended, flags, sampling, said):
    place = shutil.copytree(folder, tmp_path / "sea")
    (place / "generation_config.json").write_text(json.dumps(recommended))
    state, ahead = load_state(place, slots=2, weights="float32", sampling=flags)
    ahead.stop()
    state.tokenizer.close()
    assert state.sampling == sampling
    output = capsys.readouterr().out
    assert [each for each in said if each not in output] == []
    assert output.count("ignored") == 1


@pytest.mark.whole
def test_the_capacity_is_the_models_context_where_half_the_free_memory_holds_it(folder, monkeypatch, capsys):
    cfg, config = tiny_config(context=100_000), EngineConfig(4, weights="int8")
    for capacity, less in ((100_000, 65_536), (65_536, 32_768), (4096, 2048), (2048, 2048)):
        needed = 2 * config.bytes(cfg, capacity)
        capacities = [config.with_capacity(cfg, free).capacity for free in (needed, needed - 2)]
        assert capacities == [capacity, less]
    assert dataclasses.replace(config, capacity=300).with_capacity(cfg, 0).capacity == 300
    # 7,813 chunks of 128 tokens of 96 bytes
    for context, size in ((100, 64 * 10**6), (10**6, 96_006_144)):
        unsized = dataclasses.replace(config, prefix_cache_bytes=None)
        assert unsized.with_capacity(tiny_config(context=context), 10**12).prefix_cache_bytes == size
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda: 0)
    monkeypatch.setattr(engine_config, "SMALL_CAPACITY", 64)
    state, ahead = load_state(folder, weights="int8", slots=2)
    state.tokenizer.close()
    ahead.stop()
    assert state.engine.capacity == 64
    assert "2 of 64 tokens (the model's context is 150), KV cache" in capsys.readouterr().out


def out_of_memory(*_: Any, **__: Any) -> None:
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 377487360 bytes.")


def test_too_many_slots_for_memory_is_a_sentence_and_ends_what_compiles_ahead():
    stopped: list[bool] = []
    ahead: Any = SimpleNamespace(stop=lambda: stopped.append(True))
    engine: Any = SimpleNamespace(cfg=None, capacity=8, warm=out_of_memory)
    state: Any = SimpleNamespace(engine=EngineThread(engine))
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(start_engine(state, ahead, asyncio.Event(), Console()))
    state.engine.stop()
    assert stopped == [True]
    assert "fewer --slots; a smaller --capacity; --keys-values int8" in str(
        explain_error(caught.value, ServeFlags())
    )


@pytest.mark.parametrize("foreseen", [True, False])
def test_slots_beyond_memory_are_refused_with_flags_of_this_stage(folder, foreseen, monkeypatch):
    if foreseen:
        monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: 10**6)
    else:
        monkeypatch.setattr(load, "Engine", out_of_memory)
    with pytest.raises(UserError if foreseen else RuntimeError) as caught:
        load_state(folder, weights="int8", slots=500 if foreseen else 2)
    assert re.search("fewer --slots[,;] a smaller --capacity", str(explain_error(caught.value, ServeFlags())))
