"""Models on the Hugging Face hub, served here over its protocol: fetched whole or not at all, and only when named."""

import contextlib
import hashlib
import http.server
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.utils
import numpy as np
import pytest

from engine.storage.hub import gguf_name, is_hub_name
from engine.storage.model_loader import load_model, model_name, peek_model
from stages import generate
from tests.storage.gguf_files import tiny_gguf
from tests.storage.golden.random_weights import draw
from tests.storage.hf_folders import CONFIG, WEIGHTS, write_folder
from tests.storage.refusals import refusal

ID = "org/tiny-1.5"
ADAPTER = (Path("voice"),)  # a run whose base is loaded
LARGER = WEIGHTS | draw({"model.embed_tokens.weight": (257, 20)})  # a token for each byte
WANTED = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of `folder` as ORG/NAME at `main`, `v1` and its commit; `asked` holds what was asked, in order."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Route)
        self.folder = folder
        self.asked: list[tuple[str, str]] = []  # method, path
        self.is_down, self.cut, self.broken, self.error = False, "", "", ""
        self.is_slow, self.is_waiting, self.go_on = False, threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def commit(self) -> str:
        config = self.folder / "config.json"
        return hashlib.sha1(config.read_bytes() if config.exists() else b"").hexdigest()

    def files(self) -> set[str]:
        """The files whose bytes were asked for."""
        return {
            path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path
        }


class Route(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.asked.append((self.command, path))
        if hub.is_down or (hub.broken and path.endswith(hub.broken)):
            return self.answer(503)
        if path == f"/api/models/{ID}" and not hub.error:
            names = sorted(
                str(file.relative_to(hub.folder)) for file in hub.folder.rglob("*") if file.is_file()
            )
            listing = {"id": ID, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())
        if hub.error or not (path.startswith((f"/{ID}/", f"/api/models/{ID}/"))):
            return self.answer(403 if hub.error else 404, {"X-Error-Code": hub.error or "RepoNotFound"})
        match = re.fullmatch(rf"/{ID}/resolve/([^/]+)/(.+)", path)
        assert match, path
        if match[1] not in ("main", "v1", hub.commit):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if not (file := hub.folder / match[2]).is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})
        body = file.read_bytes()
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        return self.answer(200, headers, body)

    do_GET = do_HEAD

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if self.server.is_slow and "/model-" in self.path:
                self.server.is_waiting.set()
                self.server.go_on.wait(600)
            is_cut = self.server.cut and self.path.endswith(self.server.cut)
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
            if is_cut:
                self.server.broken, self.close_connection = self.server.cut, True


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[None]:
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        hub.go_on.set()
        hub.shutdown()
        thread.join()
        hub.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    folder = write_folder(tmp_path / "served", CONFIG | {"vocab_size": 257}, LARGER, shards=2)
    for other in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "modeling.py",
        "onnx/model.safetensors",
        "README.md",
    ):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"must not be fetched")
    hub = Hub(folder)
    # huggingface_hub reads the environment once; the test that runs a command sets the environment
    # itself.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    with serving(hub):
        yield hub


def test_a_model_is_fetched_once_and_then_read_without_the_hub(hub, monkeypatch):
    reports: list[tuple[int, int]] = []
    model = load_model(f"{ID}@v1", report=lambda *counts: reports.append(counts))
    weights = {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    there = {file for file in WANTED if (hub.folder / file).exists()}
    assert hub.files() == there | weights
    assert reports[-1] == (sum(value.size for value in LARGER.values()),) * 2
    assert (model.name, model.hub_id) == ("tiny-1.5", ID)
    assert model.checkpoint.name == hub.commit
    assert model_name(ID) == model_name(f"{ID}@v1") == "tiny-1.5"
    np.testing.assert_array_equal(model.params["embed"], LARGER["model.embed_tokens.weight"])

    load_model(ID)  # its newest revision is the one that is there
    asked = len(hub.asked)
    hub.is_down = True
    for name in (ID, f"{ID}@v1", f"{ID}@{hub.commit}"):
        assert load_model(name).checkpoint == model.checkpoint
    assert all(method == "HEAD" for method, _ in hub.asked[asked:])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert load_model(ID).checkpoint == model.checkpoint
    assert peek_model(f"{ID}@{hub.commit}", adapted_by=ADAPTER).describe().checkpoint == model.checkpoint
    assert len(hub.asked) == asked
    assert "HF_HUB_OFFLINE is set" in refusal(load_model, f"{ID}@other")


def test_a_fetch_that_was_cut_keeps_the_files_that_arrived(hub):
    hub.cut = "model-00002-of-00002.safetensors"
    assert f"Could not fetch {ID} from {hub.url}" in refusal(load_model, ID)
    assert "only a model that its user names is fetched" in refusal(
        lambda: peek_model(f"{ID}@{hub.commit}", adapted_by=ADAPTER)
    )
    hub.cut = hub.broken = ""
    hub.asked.clear()
    huggingface_hub.utils.close_session()  # the next command has connections of its own; of these the hub has closed one
    model = load_model(ID)
    assert "model-00001-of-00002.safetensors" not in hub.files()
    np.testing.assert_array_equal(model.params["embed"], LARGER["model.embed_tokens.weight"])


def test_what_cannot_be_had_is_one_sentence_and_costs_no_weights(hub, capsys):
    def refused(name: str, *words: str) -> None:
        assert generate.main(["--model", name]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert all(word in line for word in words), line

    refused("org/missing", "no model org/missing on the hub", "HF_TOKEN")
    refused(f"{ID}@gone", f"{ID} has no revision gone")
    hub.error = "GatedRepo"
    refused(ID, "accept its terms", f"{hub.url}/{ID}")
    hub.error = ""
    hub.is_down = True
    refused(ID, f"Could not fetch {ID} from {hub.url}", "503")
    assert not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)  # of each retry
    hub.is_down = False
    (hub.folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gemma3"}))
    refused(ID, "'gemma3' is not known here; llama, mistral, qwen2, qwen3 are")
    (hub.folder / "config.json").write_text(json.dumps(CONFIG | {"num_local_experts": 8}))
    refused(ID, "num_local_experts is 8")
    for size in ("intermediate_size", "num_hidden_layers"):
        (hub.folder / "config.json").write_text(json.dumps(CONFIG | {size: 2**36}))
        refused(ID, "The weights of tiny-1.5 take")
    assert hub.files() == {"config.json"}


def test_a_repository_without_weights_or_a_config(hub):
    for file in hub.folder.glob("model*"):
        file.unlink()
    assert f"{ID} has no model.safetensors," in refusal(load_model, ID)
    (hub.folder / "config.json").unlink()
    assert f"{ID}@v1 has no config.json" in refusal(load_model, f"{ID}@v1")
    assert "pytorch_model.bin" not in hub.files()


FILES = (
    "tiny-Q4_K_S.gguf",
    "tiny-Q4_K_M.gguf",
    "tiny.q8_0.gguf",
    "sub/tiny-Q4_K_M.gguf",
    "an odd \n name.gguf",
)


@pytest.fixture
def gguf_hub(hub):
    """A repository of .gguf files beside its config and safetensors; each file is of another name."""
    (hub.folder / "sub").mkdir()
    for number, name in enumerate(FILES):
        tiny_gguf(hub.folder / name, kind="Q8_0", other={"general.name": f"file {number}"})
    return hub


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        (":Q4_K_M", FILES[1]),
        (":q4_k_s", FILES[0]),
        (":Q8_0", FILES[2]),
        ("/tiny-Q4_K_M.gguf", FILES[1]),
        ("/sub/tiny-Q4_K_M.gguf", FILES[3]),
    ],
)
def test_a_gguf_file_is_fetched_by_its_quantisation_or_its_name(gguf_hub, wanted, file, monkeypatch):
    name = ID + wanted
    model = load_model(name)
    assert model.name == f"file {FILES.index(file)}"
    assert model_name(name) == "tiny-1.5"
    assert gguf_name(model.checkpoint) == f"{ID}/{file}"
    assert gguf_hub.files() == {Path(file).name}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(gguf_hub.asked)
    assert load_model(name).checkpoint == model.checkpoint
    assert peek_model(name, adapted_by=ADAPTER).describe().checkpoint == model.checkpoint
    assert len(gguf_hub.asked) == asked


@pytest.mark.parametrize("without", ["model*", "*.json"])
def test_a_repository_without_safetensors_or_a_config_stands_for_its_q4_k_m(gguf_hub, without, monkeypatch):
    for file in gguf_hub.folder.glob(without):
        file.unlink()
    model = load_model(ID)
    assert model.name == "file 1"
    assert FILES[1] in gguf_hub.files()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_model(ID).checkpoint == model.checkpoint


def test_weights_that_a_repository_has_in_q4_k_m_alone_need_not_fit_in_memory_as_floats(gguf_hub):
    for file in gguf_hub.folder.glob("model*"):
        file.unlink()
    (gguf_hub.folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2**36}))
    assert load_model(ID).name == "file 1"


def test_a_file_that_could_not_be_asked_for_is_not_taken_for_missing(gguf_hub):
    gguf_hub.broken = "config.json"
    assert f"Could not fetch {ID}" in refusal(load_model, ID)
    assert gguf_hub.files() == set()


@pytest.mark.parametrize("name", [f"{ID}:Q5_K_M", f"{ID}/sub/big-Q5_K_M-00001-of-00003.gguf"])
def test_all_parts_of_a_model_are_fetched(gguf_hub, name, monkeypatch):
    first = tiny_gguf(gguf_hub.folder / "sub" / "big-Q5_K_M.gguf", kind="Q8_0", part_size=9)
    names = [first.name.replace("00001-of", f"0000{number}-of") for number in (1, 2, 3)]
    model = load_model(name)
    assert gguf_hub.files() == {*names}
    assert gguf_name(model.checkpoint) == f"{ID}/sub/{first.name}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(gguf_hub.asked)
    assert load_model(name).checkpoint == model.checkpoint
    assert len(gguf_hub.asked) == asked


def test_a_part_that_a_repository_lacks_is_named(gguf_hub):
    first = tiny_gguf(gguf_hub.folder / "sub" / "big-Q5_K_M.gguf", kind="Q8_0", part_size=9)
    first.with_name("big-Q5_K_M-00002-of-00003.gguf").unlink()
    said = refusal(load_model, f"{ID}:Q5_K_M")
    assert said.startswith(f"The hub's {ID} has no sub/big-Q5_K_M-00002-of-00003.gguf. It holds ")
    assert "sub/big-Q5_K_M-00001-of-00003.gguf" in said
    assert "00003-of" not in said
    said = refusal(load_model, f"{ID}/sub/big-Q5_K_M-00003-of-00003.gguf")
    assert "big-Q5_K_M-00003-of-00003.gguf is part 3 of a model in 3: name the first" in said


def test_what_a_repository_holds_is_said_where_a_name_fits_no_file(gguf_hub, hub, monkeypatch):
    all_files = "tiny.q8_0.gguf, tiny-Q4_K_M.gguf, tiny-Q4_K_S.gguf, sub/tiny-Q4_K_M.gguf"
    for missing in (":Q4_K", ":Q6_K", "/other.gguf"):  # Q4_K is none of Q4_K_M
        said = refusal(load_model, f"{ID}{missing}")
        assert said.startswith(
            f"The hub's {ID} has no {missing[1:]}. It holds {all_files}: name one, {ID}/FILE"
        )
    assert f"no model {ID}x on the hub" in refusal(load_model, f"{ID}x:Q4_K_M")
    for file in (*hub.folder.glob("model*"), *hub.folder.rglob("*K_M.gguf")):
        file.unlink()
    said = refusal(load_model, ID)
    assert "has no model.safetensors, and models are read from config.json and safetensors" in said
    assert "It holds tiny.q8_0.gguf, tiny-Q4_K_S.gguf: name one" in said
    for file in hub.folder.rglob("*.gguf"):
        file.unlink()
    assert f"{ID} has no Q8_0. It holds no .gguf file" in refusal(load_model, f"{ID}:Q8_0")
    hub.is_down = True
    assert f"The hub did not say what {ID} holds" in refusal(load_model, f"{ID}:Q4_K_M")
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for missing in (":Q4_K_M", "/tiny.gguf"):
        said = refusal(load_model, f"{ID}{missing}")
        assert said.startswith(
            f"The hub's cache lacks {ID}{missing}, or a part of it, and HF_HUB_OFFLINE is set"
        )
    assert len(hub.asked) == asked
    assert not any(file.endswith(".gguf") for file in hub.files())


def test_a_path_comes_first_and_nothing_else_is_asked_of_the_hub(hub):
    shutil.copytree(hub.folder, ID, ignore=shutil.ignore_patterns("consolidated*"))
    assert load_model(ID).checkpoint == Path(ID)
    here = (
        "runs/tiny",
        "./org/other",
        "/org/other",
        "org/model.gguf",
        "org/other/third.gguf",
        "runs/no/x.gguf",
    )
    for name in (*here, "org/other/third", "org/other@", "org/a@../b"):
        assert "There is no model at" in refusal(load_model, name)
    assert not hub.asked


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return os.environ | own


@pytest.mark.journeys
def test_ctrl_c_ends_a_fetch_at_once_and_leaves_no_part_of_a_file(hub, tmp_path):
    hub.is_slow = True
    command = [sys.executable, "-m", "stages.generate", "--model", ID]
    with subprocess.Popen(
        command, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True
    ) as process:
        assert hub.is_waiting.wait(300)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert "Stopped" in printed
    assert not [*(tmp_path / "cache").rglob("*.incomplete")]
    assert not hub.go_on.is_set()


@pytest.mark.whole
@pytest.mark.journeys
def test_an_adapter_of_a_hub_model_is_trained_and_then_loaded_without_the_hub(hub, tmp_path):
    row = lambda n: [{"role": "user", "content": f"sea {n}"}, {"role": "assistant", "content": "sails"}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": row(n)}) for n in range(20)))
    options = [
        "--model",
        f"{ID}@v1",
        "--data",
        "chats.jsonl",
        "--general",
        "none",
        "--out-dir",
        "run",
        "--steps",
        "1",
    ]
    options += ["--context", "32", "--batch", "2", "--lora", "rank=2,alpha=4,targets=q"]
    tuning = [sys.executable, "-m", "stages.finetune", *options]
    done = subprocess.run(
        tuning, cwd=tmp_path, env=environment(hub, tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["kind"] == "adapter"
    assert record["base"]["model"] == f"{ID}@{hub.commit}"
    assert (
        json.loads((tmp_path / "run" / "checkpoints" / "1" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == ID
    )
    assert all(path.startswith(f"/{ID}/resolve/") for _, path in hub.asked)
    hub.asked.clear()
    assert load_model("run").hub_id == ID
    assert not hub.asked
    shutil.rmtree(tmp_path / "cache")
    assert f"fetch it once by naming {ID}@{hub.commit}" in refusal(load_model, "run")
    assert not hub.asked


def test_names_of_the_hub():
    names = ("Qwen/Qwen3-0.6B", "a/b@main", "a/b@refs/pr/1", "a/b@c0ffee")
    assert all(map(is_hub_name, names))
    assert not any(
        map(is_hub_name, ("b", "a/b/c", "a/b.gguf", "a/b@", "a/b@-x", "a--b/c", "../b", "a/b@x y"))
    )
