"""The rows of chat: prompts that no model here is trained on, and speculation that changes no token, or is reported."""

import pytest

from bench import machine
from bench.peers.serving import PROMPTS, chat_calls, measure_calls
from engine.inference.decode import prepare_params
from engine.text.conversations import SHIPPED, read_conversations
from tests.tiny import lively_params, tiny_config


def test_the_prompts_are_two_sets_and_nobody_trains_on_them():
    sets = PROMPTS
    assert {name: len(prompts) for name, prompts in sets.items()} == {"ordinary": 24, "repeating": 12}
    prompts = {prompt for each in sets.values() for prompt in each}
    assert len(prompts) == 36
    assert not any(
        prompt in str(record) for name in SHIPPED for record in read_conversations(name) for prompt in prompts
    )


@pytest.mark.parametrize(
    ("instructions", "expected"), [("avx2 avx512f", 1), ("avx2 avx512_vnni", 2), ("avx512_vnni amx_int8", 3)]
)
def test_each_family_of_processors_has_its_bar(instructions, expected, monkeypatch):
    monkeypatch.setattr(machine, "processor", lambda: ("any", instructions))
    assert machine.bar(1, 2, 3) == expected


@pytest.mark.whole
def test_chats_are_answered_with_and_without_speculation_by_the_same_tokens(capsys):
    cfg = tiny_config()
    prompts = [[1, 2, 3] * 5, [4, 5, 6, 7, 4, 5], [8]]
    calls = chat_calls(cfg, prepare_params(cfg, lively_params(cfg)), prompts, 9, {3})
    plain, speculative = calls["plain"](), calls["speculative"]()
    assert plain["tokens"] == speculative["tokens"]
    assert [len(tokens) for tokens in plain["tokens"] if 3 not in tokens] == [9] * 3
    assert 0 < speculative["steps"] <= plain["steps"]
    required = {"plain": None, "speculative": 1.3}
    peer = lambda: {"decode": 1.0, "decoded": 24, "tokens": [[0] * 9] * 3}
    rows = measure_calls("repeating", calls | {"peer": peer}, required, 6)
    assert [row["name"] for row in rows] == ["repeating_plain", "repeating_speculative"]
    assert rows[0]["peer_tokens_per_second"] == pytest.approx(24)
    assert rows[1]["tokens_per_step"] >= 1
    assert "of plain" in capsys.readouterr().out
    other = {**speculative, "tokens": [[0, 1]] * 3}
    with pytest.raises(ValueError, match="changed a token"):
        measure_calls("ordinary", calls | {"speculative": lambda: other}, required, 6)
