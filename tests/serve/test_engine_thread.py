"""The engine's thread: short texts are answered before the programs for long ones are there."""

import asyncio
import queue
import threading
from typing import Any

import pytest
from tiny import lively_params, tiny_config
from tiny_server import until

from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from stages.serve.engine_thread import EngineThread


@pytest.mark.parametrize("fails", [False, True])
def test_a_long_text_waits_for_its_programs_and_holds_up_no_short_one(fails, monkeypatch):
    """The engine is ready with the programs for short texts; the others are compiled beside it."""
    cfg = tiny_config()
    config = EngineConfig(5, 62, kv_dtype="float32", chunk=16, tail=4, short=16)  # of programs that test_engine_company has too
    engine = Engine(cfg, prepare_params(cfg, lively_params(cfg)), config)
    may_prepare, prepare, finished = threading.Event(), engine.runner.compile_long_programs, queue.SimpleQueue()

    def prepare_later() -> None:
        assert may_prepare.wait(60)
        if fails:
            raise RuntimeError("no memory for a compiler")
        prepare()

    monkeypatch.setattr(engine.runner, "compile_long_programs", prepare_later)

    async def ask_engine() -> None:
        thread, changed = EngineThread(engine), asyncio.Event()
        thread.start(changed.set)
        await changed.wait()

        def submit(name: str, prompt: int) -> None:
            def listen(event: Any) -> None:
                if event.finish_reason:
                    finished.put((name, event.finish_reason))

            thread.submit(Request(tuple(range(prompt)), SamplingParams(max_tokens=3, temperature=0.0)), 0, listen)

        submit("long", 40), submit("grows long", 15), submit("short", 10)
        while finished.empty():
            await asyncio.sleep(0.01)
        assert finished.get() == ("short", "length")
        assert (thread.ready, thread.error, thread.has_long_programs) == (True, None, False)
        assert (engine.running, thread.waiting) == (1, 1), "who grew long keeps its slot until another wants it"
        tick = thread.last_tick
        assert until(lambda: thread.last_tick > tick + 0.3), "it is not stuck"
        assert not engine.scheduler.has_step
        may_prepare.set()
        while finished.qsize() < 2:
            await asyncio.sleep(0.01)
        assert thread.has_long_programs == (not fails)
        thread.stop()
        assert thread.compiles_after_ready == 0

    asyncio.run(asyncio.wait_for(ask_engine(), 120))
    reason = "error" if fails else "length"
    assert {finished.get(), finished.get()} == {("long", reason), ("grows long", reason)}
