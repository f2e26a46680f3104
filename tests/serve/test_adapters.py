"""Adapters over HTTP: requests name one as their model in every dialect; they come and go while others are served, by a key."""

import dataclasses
import json
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.device import start_jax
from engine.errors import UserError
from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import complete
from engine.inference.request import Request, SamplingParams
from engine.model.config import ModelConfig
from engine.model.native.library import native_problem
from engine.model.paths import merge, unflatten
from engine.model.weights.convert import weight_types
from engine.model.weights.lora import LoRA
from engine.storage.adapter import CONFIG, WEIGHTS, base_digest
from engine.storage.adapter_writer import save_adapter
from engine.storage.digest import digest
from engine.storage.model_loader import load_model
from stages.cli.console import Console
from stages.cli.flags import model_names, plain_name
from stages.export import main as export
from stages.serve.compile_ahead import CompileAhead
from stages.serve.flags import ServeFlags
from stages.serve.load import ServerOptions, load_state
from stages.serve.run import check_adapters
from stages.serve.state import ServerState
from tests.serve.started import Started
from tests.serve.tiny_server import TinyServer, ask, good, refused, tiny_model, until
from tests.text.chat_models import save_chat_model
from tests.tiny import normal

KEY = {"Authorization": "Bearer one"}


def adapter(seed: int, rank: int = 2, cfg: ModelConfig | None = None) -> Any:
    cfg = cfg or tiny_model().cfg
    return unflatten(
        {
            f"blocks/{layer}/{name}": LoRA(
                None, normal(seed, rows, rank) * rows**-0.5, normal(seed + 1, rank, columns), 0.5
            )
            for layer in range(cfg.layers)
            for name, (rows, columns) in cfg.matrices.items()
        }
    )


def save(folder: Path, seed: int, rank: int = 2, base: str = "") -> Path:
    model = tiny_model()
    return save_adapter(
        folder, model.cfg, adapter(seed, rank), base=base or base_digest(model.params), base_name="tiny"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for adapters: two of them, and others that are refused."""
    folder = tmp_path_factory.mktemp("adapters")
    save(folder / "sea", 1)
    save(folder / "ours/rock", 2, rank=3)
    save(folder / "large", 3, rank=4)
    save(folder / "other", 4, base="0" * 64)
    for name, change in (("dora", {"use_dora": True}), ("bias", {"bias": "all"})):
        shutil.copytree(folder / "sea", folder / name)
        config = json.loads((folder / name / CONFIG).read_text())
        (folder / name / CONFIG).write_text(json.dumps(config | change))
        (folder / name / "manifest.json").unlink()
    shutil.copytree(folder / "sea", folder / "damaged")
    data = bytearray((folder / "damaged" / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / "damaged" / WEIGHTS).write_bytes(data)
    (folder / "link").symlink_to(folder / "sea")
    shutil.copytree(folder / "sea", folder / "holds-link")
    (folder / "holds-link" / "more").symlink_to("/etc/passwd")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with TinyServer(keys=("one",), adapter_folder=folder) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client(headers=KEY) as client:
        yield client
        for name in [*server.state.adapters.adapters]:
            good(client.delete(f"/v1/adapters/{name}"))


def add(client: Any, name: str, folder: str) -> Any:
    return client.post("/v1/adapters", json={"name": name, "folder": folder})


def test_every_dialect_answers_with_the_adapter_that_is_named(client, server):
    assert good(add(client, "sea", "sea"))["adapter"]
    good(add(client, "rock", "ours/rock"))
    cards = {card["id"]: card for card in good(client.get("/v1/models"))["data"]}
    assert [*cards] == ["tiny", "sea", "rock"]
    assert {card["root"] for card in cards.values()} == {"tiny"}
    assert len({card["adapter"] for card in cards.values()}) == 3
    assert [model["name"] for model in good(client.get("/api/tags"))["models"]] == [*cards]
    assert good(client.get("/v1/models/rock")) == cards["rock"]
    user, greedy = [{"role": "user", "content": "Hello"}], {"temperature": 0}

    def answers(name: str) -> tuple[Any, ...]:
        replies = [
            good(client.chat("Hello", 6, model=name)),
            good(
                client.post(
                    "/v1/responses", json={"input": "Hello", "max_output_tokens": 6, "model": name, **greedy}
                )
            ),
            good(
                client.post("/v1/messages", json={"messages": user, "max_tokens": 6, "model": name, **greedy})
            ),
            good(
                client.post(
                    "/api/chat",
                    json={
                        "messages": user,
                        "model": name,
                        "stream": False,
                        "options": {"num_predict": 6, "temperature": 0},
                    },
                )
            ),
        ]
        assert {reply["model"] for reply in replies} == {name}
        texts = {
            replies[0]["choices"][0]["message"]["content"],
            replies[1]["output"][0]["content"][0]["text"],
            replies[2]["content"][0]["text"],
            replies[3]["message"]["content"],
        }
        assert len(texts) == 1
        completion = good(client.complete("Hello there", 6, model=name))
        score = good(
            client.post("/v1/score", json={"prompt": "Hello", "candidates": [" sea", " rock"], "model": name})
        )
        vector = good(client.post("/v1/embeddings", json={"input": "Hello", "model": name}))
        assert (
            completion["system_fingerprint"]
            == score["system_fingerprint"]
            == replies[0]["system_fingerprint"]
        )
        assert {completion["model"], score["model"], vector["model"]} == {name}
        return (
            texts.pop(),
            completion["choices"][0]["text"],
            completion["system_fingerprint"],
            score["data"][0]["logprob"],
            tuple(vector["data"][0]["embedding"]),
        )

    by_name = {name: answers(name) for name in cards}
    for part in zip(*by_name.values()):
        assert len(set(part)) == 3
    refused(client.complete(model="gone"), 404)
    assert good(client.complete(model="default"))["model"] == "tiny"
    # what it says is what its merged model says
    model, prompt = server.model, client.tokens("Hello there")
    for name, seed, rank in (("sea", 1, 2), ("rock", 2, 3)):
        params = prepare_params(model.cfg, merge(adapter(seed, rank), model.params))
        (expected,) = complete(model.cfg, params, [prompt], [SamplingParams(6, temperature=0.0)])
        assert by_name[name][1] == model.tokenizer.decode(expected.tokens)


def test_adapters_come_and_go_while_others_are_answered(client, server):
    """Streams under way end as they would have; an index is used again only when nobody reads it;
    the base stays.
    """
    before, compiled = (
        good(client.get("/v1/attestation")),
        good(client.get("/health"))["compiles_after_ready"],
    )
    good(add(client, "sea", "sea"))
    good(add(client, "rock", "ours/rock"))
    label = 'max_lora="2",running_lora_adapters="rock,sea",waiting_lora_adapters=""'
    assert f"vllm:lora_requests_info{{{label}}}" in client.get("/metrics").text
    body = ask("Hello", 120, ignore_eos=True, logprobs=1)
    alone = [
        good(client.post("/v1/completions", json=body | {"model": name}))["choices"]
        for name in ("tiny", "sea", "rock")
    ]
    go, step = threading.Event(), server.engine.step
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(server.engine, "step", lambda: step() if go.wait(0.01) or server.engine.waiting else [])
        sent = [
            pool.submit(client.post, "/v1/completions", json=body | {"model": name})
            for name in ("tiny", "sea", "rock")
        ]
        assert until(lambda: server.engine.running == 3)
        assert good(client.delete("/v1/adapters/sea")) == {"id": "sea", "deleted": True, "object": "model"}
        refused(client.complete(model="sea"), 404)
        assert "under way" in refused(add(client, "sea", "sea"), 409)["message"]
        go.set()
        replies = [good(reply.result())["choices"] for reply in sent]
    assert replies == alone
    good(add(client, "again", "sea"))
    assert good(client.post("/v1/completions", json=body | {"model": "again"}))["choices"] == alone[1]
    assert "--max-adapters" in refused(add(client, "third", "sea"), 409)["message"]
    after = good(client.get("/v1/attestation"))
    assert (after["digest"], after["unchanged"]) == (before["digest"], True)
    assert digest(server.engine.params) == before["digest"]
    assert good(client.get("/health"))["compiles_after_ready"] == compiled


def test_a_request_whose_adapter_goes_while_its_text_is_read_is_refused(client, server, monkeypatch):
    """Its index may be another's by then."""
    good(add(client, "sea", "sea"))
    encode = server.state.tokenizer.encode

    def remove_first(*values: Any, **options: Any) -> Any:
        server.state.adapters.adapters.pop("sea", None)
        return encode(*values, **options)

    monkeypatch.setattr(server.state.tokenizer, "encode", remove_first)
    for path, body in (
        ("completions", ask(model="sea")),
        ("score", {"prompt": "Hello", "candidates": [" sea"], "model": "sea"}),
        ("embeddings", {"input": "Hello", "model": "sea"}),
    ):
        assert "has been removed" in refused(client.post(f"/v1/{path}", json=body), 404)["message"]
        good(add(client, "sea", "sea"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../sea", "is no folder below"),
        ("/etc", "is no folder below"),
        ("ours/../sea", "is no folder below"),
        ("./sea", "is no folder below"),
        ("ours//rock", "is no folder below"),
        ("sea\0", "is no folder below"),
        ("..\\sea", "is no folder below"),
        ("gone", "There is no folder"),
        ("sea/" + WEIGHTS, "There is no folder"),
        ("link", "is a link"),
        ("holds-link", "is a link or holds one"),
        ("empty", "There is no adapter at empty"),
        ("large", "has a rank of 4, above 3"),
        ("other", "was trained on another model"),
        ("damaged", "is damaged"),
        ("dora", "lora_magnitude_vector"),
        ("bias", "bias"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused(client, folder, path, message):
    problem = refused(add(client, "bad", path))
    assert problem["param"] == "folder"
    assert message in problem["message"]
    assert str(folder) not in problem["message"]
    assert len(good(client.get("/v1/models"))["data"]) == 1


def test_one_that_can_share_no_batch_is_to_be_merged(client, folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "bias" / WEIGHTS)
    config = json.loads((folder / "bias" / CONFIG).read_text()) | {"bias": "none"}
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(half), np.float32)
        for name, half in tensors.items()
        if "lora_B" in name
    }
    whole = {
        "base_model.model.model.embed_tokens.weight": np.ones(
            (tiny_model().cfg.vocab, tiny_model().cfg.width), np.float32
        )
    }
    for name, more, changes in (("a-dora", magnitudes, {"use_dora": True}), ("a-whole", whole, {})):
        (folder / name).mkdir()
        save_file(tensors | more, folder / name / WEIGHTS)
        (folder / name / CONFIG).write_text(json.dumps(config | changes))
        assert f"python -m stages.export --model {name}" in refused(add(client, "bad", name))["message"]


def test_names_and_keys_are_checked(client, server):
    good(add(client, "sea", "sea"))
    assert "already" in refused(add(client, "sea", "sea"), 409)["message"]
    for name in ("tiny", "default"):
        assert "model itself" in refused(add(client, name, "sea"), 409)["message"]
    for name in ("", "a b", "a/b", "a" * 65, ".", "..", "../sea", "a\n", "..\n", "a\0", "a?b", "a%2fb", "é"):
        assert refused(add(client, name, "sea"))["param"] == "name"
    for name in ("...", ".a", "a..", "a" * 64):  # which a client asks for as they are written
        good(add(client, name, "sea"))
        assert good(client.get(f"/v1/models/{name}"))["id"] == name
        good(client.delete(f"/v1/adapters/{name}"))
    refused(client.delete("/v1/adapters/tiny"), 404)
    refused(client.delete("/v1/models/sea"), 405)
    with server.client() as stranger:
        refused(add(stranger, "more", "sea"), 401)
        refused(stranger.delete("/v1/adapters/sea"), 401)


def test_a_server_without_a_folder_for_adapters_takes_none(tiny_server):
    with tiny_server.client() as client:
        assert "--adapter-folder" in refused(add(client, "sea", "sea"), 403)["message"]
        refused(client.delete("/v1/adapters/sea"), 404)


def test_names_by_flags_can_be_segments_of_a_url():
    """A model's may have several: /v1/models/ORG/NAME."""
    for name in ("a.b", "...", "a:1", "-"):
        assert plain_name(name) == name
    for name in ("", ".", "..", "a/b", "a b", "a\n", "..\n", "\0", "é"):
        with pytest.raises(ValueError, match="wanted a name of letters, digits"):
            plain_name(name)
    for names in ("gpt-5, anthropic/claude:1", "a,,b,", ""):
        assert model_names(names) == names
    for names in ("a,..", "a/../b", "a//b", "/a", "a/", "a b", "a\nb", "a?b", "a#b", "a%20b", "a\\b"):
        with pytest.raises(ValueError, match="wanted a name of letters, digits"):
            model_names(names)


@pytest.mark.parametrize(
    ("options", "has_keys", "message"),
    [
        ({"adapter_folder": Path()}, False, "give --api-key"),
        ({"adapter_folder": Path("gone")}, True, "no folder gone"),
        ({"max_adapters": 3}, True, "--max-adapters is about"),
        ({"adapter": (("a", Path("x")), ("", Path("y")))}, True, "give each a name"),
        ({"adapter": (("a", Path("x")), ("a", Path("y")))}, True, "given twice"),
        ({"adapter": (("a", Path("x")),), "name": "b,a"}, True, "given twice"),
        ({"adapter": (("a", Path("x")),), "mesh": "tensor=2"}, True, "leave --mesh out"),
        ({"adapter": (("a", Path("x")), ("b", Path("y"))), "max_adapters": 1}, True, "--max-adapters is 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(options, has_keys, message):
    flags = dataclasses.replace(ServeFlags(), **options)
    with pytest.raises(UserError, match=message):
        check_adapters(flags, has_keys)


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory):
    """A folder with a GGUF file in blocks, and adapters: one that was trained on its numbers, one
    on others.
    """
    folder = tmp_path_factory.mktemp("blocks")
    save_chat_model(folder / "model", width=64, ff=96, tied=True)
    assert export(["--model", str(folder / "model"), "--out", str(folder / "x.gguf"), "--dtype", "q4_1"]) == 0
    model = load_model(str(folder / "x.gguf"))  # as `stages.finetune` has it
    own = base_digest(model.params)
    for name, seed, base in (("sea", 1, own), ("rock", 2, own), ("other", 3, "0" * 64)):
        save_adapter(folder / name, model.cfg, adapter(seed, 2, model.cfg), base=base, base_name="x.gguf")
    return folder


@pytest.mark.parametrize("weights", ["file", "q4"])
def test_adapters_are_served_over_a_files_blocks(in_blocks, weights, count_compiles):
    """Which are known by the digest of their numbers; what was compiled while they were read is
    what is asked for.
    """

    def load(*names: str) -> tuple[ServerState, CompileAhead]:
        config = EngineConfig(2, weights=weights, prefix_cache_bytes=10**6, adapters=2, adapter_rank=2)
        folders = [(name, in_blocks / name) for name in names]
        device = start_jax(one_arena=False)
        return load_state(
            str(in_blocks / "x.gguf"), config, device, Console(), ServerOptions(adapters=folders)
        )

    with pytest.raises(UserError, match="was trained on another model"):
        load("sea", "other")
    state, ahead = load("sea", "rock")
    state.tokenizer.close()
    engine, programs = state.engine.engine, list(ahead)
    served = "int8" if weights == "file" and native_problem() else "Q4_1, Q8_0, int8"
    assert weight_types(engine.params) == served
    count_compiles.clear()
    engine.warm(None, programs)
    assert count_compiles == []
    models = [state.find_model(name) for name in ("default", "sea", "rock")]
    assert len({model.fingerprint for model in models}) == 3
    ids = [
        engine.submit(Request((5, 6, 7), SamplingParams(9, temperature=0.0), adapter=model.adapter))
        for model in models
    ]
    output: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            output[event.id] += event.tokens
    assert len({*map(tuple, output.values())}) == 3


@pytest.mark.whole
@pytest.mark.journeys
@pytest.mark.parametrize("blocks", [False, True])
def test_the_command_serves_adapters_by_name(folder, tmp_path_factory, in_blocks, blocks):
    """One named at the start and one added, beside the model: answers that differ, no program
    compiled, no weight changed.
    """
    save_chat_model(model := tmp_path_factory.mktemp("models") / "tiny")
    if blocks:
        model, folder = in_blocks / "x.gguf", in_blocks
    flags = "--adapter", f"sea={folder / 'sea'}", "--adapter-folder", folder, "--max-rank", 3
    with Started(
        model, *flags, env={"THRICE_API_KEY": "one"}, key="one", program=("-m", "stages.serve")
    ) as server:
        assert re.search(r"adapters +sea; at most 8 at once, of rank 3", server.output)
        good(add(server.client, "rock", "rock" if blocks else "ours/rock"))
        texts = [
            good(server.client.post("/v1/completions", json=ask(most=12, ignore_eos=True, model=name)))[
                "choices"
            ][0]["text"]
            for name in ("default", "sea", "rock")
        ]
        assert len({*texts}) == 3
        good(server.client.delete("/v1/adapters/sea"))
        good(add(server.client, "sea2", "sea"))
        again = good(server.client.post("/v1/completions", json=ask(most=12, ignore_eos=True, model="sea2")))
        assert again["choices"][0]["text"] == texts[1]
        server.process.send_signal(signal.SIGTERM)
        assert server.ends() == 0
        assert re.search(r"Weights unchanged: SHA-256 [0-9a-f]{16}; 0 programs compiled", server.output)
