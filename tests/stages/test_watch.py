"""A run that is watched: its page and its events arrive, no browser holds it up, and it ends in the bits of one that is not."""

import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver.support.ui import WebDriverWait

from stages.runs.watch import server
from stages.runs.watch.server import Watch
from stages.train import __main__ as train
from tests.stages.tiny_runs import PATIENCE, ROOT, metrics, tiny

pytestmark = pytest.mark.whole

# While the file of the variable HOLD is there, the run waits before a step from the 500th on.
HOLDS = """
import os, sys, time
from stages.runs.watch.recorder import Recorder
before_step = Recorder.before_step
def hold(self, trainable, step, progress):
    while step >= 500 and os.path.exists(os.environ.get("HOLD", "")):
        time.sleep(0.01)
    return before_step(self, trainable, step, progress)
Recorder.before_step = hold
from stages.cli.command import leave
from stages.train.__main__ import main
leave(main(sys.argv[1:]))
"""


class Run:
    """A run of the real command that is watched, until the block ends."""

    def __init__(self, text: Path, folder: Path, *flags: object, port: int = 0) -> None:
        words = [sys.executable, "-c", HOLDS, *tiny(text, folder, "--log-every", 1, "--watch", port, *flags)]
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = self.process.stdout.readline()
        self.url = self.output.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def ends(self) -> int:
        self.output += self.process.communicate(timeout=PATIENCE)[0]
        return self.process.returncode

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def events(url: str, after: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a run, each with its id, as a browser gets them that has had those up to
    `after`.
    """
    headers = {"Last-Event-ID": after} if after else {}
    with httpx.stream("GET", f"{url}/events", headers=headers, timeout=PATIENCE) as reply:
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        name = ""
        for line in reply.iter_lines():
            field, _, value = line.partition(": ")
            if field == "id":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def until(url: str, kind: str, after: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Reads events until one of the kind, and goes away."""
    found = []
    with contextlib.closing(events(url, after)) as stream:
        for name, event in stream:
            found.append((name, event))
            if event["event"] == kind:
                break
    return found


def sends(port: int, *headers: str, path: str = "/events") -> str:
    """The status of a request with just these headers."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall("\r\n".join((f"GET {path} HTTP/1.1", *headers, "", "")).encode())
        return client.recv(100).decode().split()[1]


def mute(port: int) -> socket.socket:
    """A browser that takes the events and reads none."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


@pytest.mark.journeys
def test_a_watched_run(text, tmp_path, monkeypatch):
    """Through the real command: its page; its events, without doubles after a break; the bits of a
    run that is not watched.

    That one imports nothing of it.
    """
    words = ("--steps", 600, "--eval-every", 100)
    (hold := tmp_path / "hold").touch()
    monkeypatch.setenv("HOLD", str(hold))
    with Run(text, tmp_path / "watched", *words) as run:
        page = httpx.get(run.url, timeout=PATIENCE)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "new EventSource('events')" in page.text
        with mute(run.port):
            before = until(run.url, "frame")
            stream = events(run.url, before[-1][0])
            after = [next(stream)]  # it has come again, and the run may end
            hold.unlink()
            after += stream
            assert run.ends() == 0, run.output
    names = [name for name, _ in before + after]
    assert len({*names}) == len(names)
    assert [int(name.partition("-")[2]) for name in names] == [*range(1, len(names) + 1)]
    seen = [event for _, event in before + after]
    assert (seen[0]["event"], seen[0]["stage"], seen[-1]["event"]) == ("begin", "train", "end")
    of = lambda kind: [event for event in seen if event["event"] == kind]
    assert len(of("frame")) >= 2
    assert of("frame")[-1]["digest"] == seen[-1]["digest"]
    assert of("step") == [
        {"event": "step", **line} for line in metrics(tmp_path / "watched") if "loss" in line
    ]
    assert [event["step"] for event in of("validation")] == [*range(100, 601, 100)]
    assert f"{run.url} has ended with the run; --record FILE keeps what it shows." in run.output
    args = tiny(text, tmp_path / "plain", "--log-every", 1, *words)
    program = f"import sys; from stages.train.__main__ import main; main({args})"
    program += "; print({'stages.runs.watch.recorder', 'stages.runs.watch.server', 'tensorboardX'} & set(sys.modules))"
    plain = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert plain.stdout.endswith("set()\n")
    for name in ("params.safetensors", "optimizer.safetensors"):
        ends = [
            (tmp_path / folder / "checkpoints" / "600" / name).read_bytes() for folder in ("watched", "plain")
        ]
        assert ends[0] == ends[1]


def test_what_is_not_ours_is_refused():
    with Watch(0) as watch:
        port = int(watch.url.rpartition(":")[2])
        ours = f"Host: 127.0.0.1:{port}"
        for headers in (
            [],
            ["Host: evil.example"],
            [f"Host: 127.0.0.1.evil.example:{port}"],
            [ours, "Host: evil.example"],
            [ours, "Sec-Fetch-Site: cross-site"],
            [ours, "Sec-Fetch-Site: same-site"],
        ):
            assert sends(port, *headers) == "403", headers
        for headers in ([ours], ["Host: localhost"], [ours, "Sec-Fetch-Site: same-origin"]):
            assert sends(port, *headers) == "200", headers
        # a link to the page
        assert sends(port, ours, "Sec-Fetch-Site: cross-site", path="/") == "200"
        assert sends(port, ours, path="/params.safetensors") == "404"
        with socket.socket() as elsewhere:  # another address of this machine
            assert elsewhere.connect_ex(("127.0.0.2", port))


def test_a_browser_that_does_not_read_holds_nobody_up(monkeypatch):
    """Nor is more kept for it than for others."""
    monkeypatch.setattr(server, "PAUSE", 0.02)
    monkeypatch.setattr(server, "PATIENCE", 3600)  # who waited for that browser would wait as long
    with Watch(0) as watch, mute(int(watch.url.rpartition(":")[2])):
        while not watch.is_watched():
            time.sleep(0.01)
        watch({"event": "begin", "step": 0})
        for step in range(300):
            watch({"event": "frame", "step": step, "mosaic": "A" * 100_000})
            assert watch.events[-1][1] == "frame"  # the newest is never dropped
            for each in range(20):
                watch({"event": "step", "step": step, "loss": each})
        assert watch.is_watched()  # still
        assert len(watch.events) <= 1 + server.MOST_OF_KIND["frame"] + server.MOST_OF_OTHER_KINDS
        watch({"event": "end", "step": 300})
        seen = [event for _, event in until(watch.url, "end")]
        assert (seen[0]["event"], seen[-2]["step"]) == ("begin", 299)
        assert [event["step"] for event in seen] == sorted(event["step"] for event in seen)
        assert max(event["step"] for event in seen if event["event"] == "frame") == 299
    while watch.is_watched():
        time.sleep(0.01)


def test_an_id_of_another_run_begins_anew():
    with Watch(0) as watch:
        watch({"event": "begin", "step": 0})
        watch({"event": "end", "step": 0})
        for foreign in ("00000000-1", "1", f"{watch.run}-x", f"{watch.run}-{'9' * 5000}", "-"):
            assert len(until(watch.url, "end", foreign)) == 2
        assert len(until(watch.url, "end", f"{watch.run}-1")) == 1


def test_nobody_looks(text, tmp_path, monkeypatch, capsys):
    """Then no frame is made."""
    monkeypatch.setattr("stages.runs.watch.recorder._arrays", lambda *_, **__: 1 / 0)
    assert train.main(tiny(text, tmp_path / "run", "--steps", 20, "--watch", 0)) == 0
    assert "recording ended" not in capsys.readouterr().out


def test_a_port_that_cannot_be_had(text, tmp_path, failing):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = failing(train.main, tiny(text, tmp_path / "run", "--steps", 2, "--watch", port))
    assert (
        f"Port {port} of 127.0.0.1 cannot be listened on: Address already in use. Give another with --watch."
        in error
    )
    assert not (tmp_path / "run").exists()
    for port in ("65536", "-1", "page"):
        assert "--watch: wanted an integer, between 0 and 65535" in failing(train.main, ["--watch", port])
    assert "one device" in failing(train.main, tiny(text, tmp_path / "run", "--mesh", "fsdp=2", "--watch", 0))


@pytest.mark.night  # by day test_lives_page.py has a page draw a run's events as they come
@pytest.mark.journeys
def test_in_a_browser(text, tmp_path, browser):
    """The page draws frames as they come, says when the run was killed, and goes on with the next
    one.
    """
    wait = lambda script: WebDriverWait(browser, PATIENCE, 0.1).until(
        lambda _: browser.execute_script(f"return {script}")
    )
    with Run(text, tmp_path / "run", "--max-time", "10m") as run:
        browser.get(run.url)
        wait(
            "state.recording.lives.train?.frames?.length >= 2 && state.frame >= 1 && "
            "life().steps?.length > 20"
        )
        drawn = "document.getElementById('model-weights')"
        wait(
            f"new Set({drawn}.getContext('2d').getImageData(0, 0, {drawn}.width, "
            f"{drawn}.height).data).size > 20"
        )
        assert browser.execute_script(
            "return $('alert').hidden && $('changed').textContent !== '' && curves.length >= 4"
        )
        assert "stages.train tiny" in browser.execute_script("return $('about').textContent")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    wait("!$('alert').hidden && $('alert').textContent.includes('cannot be reached since')")
    assert browser.execute_script("return life().frames.length") >= 2  # what came stays
    with Run(text, tmp_path / "other", "--max-time", "10m", port=run.port):
        wait(
            "$('alert').hidden && $('about').textContent.includes('other') && life().frames && "
            "life().steps?.length > 3"
        )
        steps = browser.execute_script("return life().steps.map((each) => each.step)")
        assert steps == sorted({*steps})


def records(file: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: their length, its checksum, the record, its checksum."""
    data = file.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + size]
        data = data[16 + size :]


def test_event_files_of_tensorboard(text, tmp_path, monkeypatch, failing):
    from tensorboardX.proto.event_pb2 import Event

    folder = tmp_path / "run"
    assert (
        train.main(tiny(text, folder, "--steps", 12, "--log-every", 2, "--eval-every", 6, "--tensorboard"))
        == 0
    )
    (file,) = (folder / "tensorboard").iterdir()
    seen = {
        (event.step, value.tag): value.simple_value
        for event in map(Event.FromString, records(file))
        for value in event.summary.value
    }
    written = {
        (line["step"], name): value
        for line in metrics(folder)
        for name, value in line.items()
        if name != "step"
    }
    assert seen == pytest.approx(written)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    error = failing(train.main, tiny(text, tmp_path / "other", "--tensorboard"))
    assert "needs tensorboardX" in error
    assert "--extra tensorboard" in error
