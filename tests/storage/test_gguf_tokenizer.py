"""Tokenizers in GGUF files: each known split, control tokens, what begins a text, and sentencepiece's own answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from engine.storage.gguf import read_tokenizer, set_pre_tokenizer
from engine.storage.gguf_header import read_header
from engine.storage.gguf_writer import FALLBACK_PRE_TOKENIZER, tokenizer_metadata
from engine.storage.huggingface import load_tokenizer
from engine.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from tests.storage.gguf_files import MERGES, SYMBOLS, TOKENS, tiny_gguf, weights

VOCAB = len(TOKENS)


def load(path: Path, vocab: int = VOCAB, **changes: Any) -> tuple[Tokenizer, tuple[int, ...]]:
    return read_tokenizer(read_header(tiny_gguf(path / "x.gguf", **changes)), vocab)[:2]


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


TEXT = "It's 12345 don't  \n\nTHE the"
CUT = {
    "gpt-2": ["It", "'s", " 12345", " don", "'t", " ", " \n\n", "THE", " the"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", " don", "'t", "  \n", "\n", "THE", " the"],
    "llama-bpe": ["It", "'s", " ", "123", "45", " don", "'t", "  \n\n", "THE", " the"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " don", "'t", "  \n\n", "THE", " the"],
}


@pytest.mark.parametrize("pre", CUT)
def test_each_split_cuts_as_its_name_says(pre):
    decode = dict(zip(SYMBOLS, range(256)))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    set_pre_tokenizer(tokenizer, pre)
    spans = tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    cut = [bytes(decode[symbol] for symbol in span).decode() for span, _ in spans]
    if pre in (
        "gpt-2",
        "smollm",
    ):  # a pattern of GPT-2's leaves the last of several spaces to what follows it
        assert "".join(cut) == TEXT
        assert [piece for piece in cut if piece.strip()] == [piece for piece in CUT[pre] if piece.strip()]
    else:
        assert cut == CUT[pre]


def test_merges_apply_within_what_is_split(tmp_path):
    assert pieces(load(tmp_path)[0], "the the 123") == ["the", " the", " ", "1", "2", "3"]
    assert pieces(load(tmp_path, words={"pre": "llama-bpe"})[0], "1234") == ["123", "4"]


def test_llama_3_takes_a_word_that_no_merge_leads_to(tmp_path):
    words = {"tokens": [*TOKENS[:-2], "xyz", TOKENS[-1]], "merges": MERGES[:-1]}
    assert pieces(load(tmp_path, words=words)[0], "xyz") == ["x", "y", "z"]
    assert pieces(load(tmp_path, words=words | {"pre": "llama-bpe"})[0], "xyz") == ["xyz"]


def test_text_never_becomes_a_control_token(tmp_path):
    tokenizer, eos_ids = load(tmp_path)
    assert 261 not in tokenizer.encode("a<|end|>b")
    assert tokenizer.decode(tokenizer.encode("a<|end|>b")) == "a<|end|>b"
    assert tokenizer.eos_id == 261
    assert eos_ids == (261,)


def test_what_begins_a_text_is_what_the_file_says(tmp_path):
    start = lambda **words: load(tmp_path, words=words)[0].bos_ids
    assert start() == ()
    assert start(add_bos_token=True, bos_token_id=260) == (260,)
    assert start(add_bos_token=None, bos_token_id=260) == ()
    assert start(add_bos_token=None, bos_token_id=260, pre="llama-bpe") == (260,)
    assert start(add_bos_token=True, bos_token_id=None) == ()


GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden" / "sentencepiece.txt").read_text().splitlines()
]


def listed_by(listed: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a file that lists these tokens, scores and kinds."""
    size = len(listed["tokens"])
    words = {
        "model": "llama",
        "pre": "default",
        "tokens": listed["tokens"],
        "scores": listed["scores"],
        "token_type": listed["kinds"],
        "merges": None,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "add_bos_token": None,
    }
    table = {"token_embd.weight": np.zeros((size, 64), np.float32)}
    return load(folder, size, words=words, tensors=weights() | table)[0]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return listed_by(GOLDEN[0], tmp_path_factory.mktemp("sp"))


def test_scores_and_not_places_say_what_merges_first(sentencepiece, tmp_path):
    count = GOLDEN[0]["kinds"].index(1)  # unknown, control and byte tokens stay in front
    reordered = {name: values[:count] + values[: count - 1 : -1] for name, values in GOLDEN[0].items()}
    other = listed_by(reordered, tmp_path)
    for case in GOLDEN[1:]:
        assert pieces(other, case["text"]) == pieces(sentencepiece, case["text"])


@pytest.mark.parametrize("case", GOLDEN[1:], ids=lambda case: case["text"][:12])
def test_sentencepiece_vocabularies_cut_as_sentencepiece_does(case, sentencepiece):
    assert sentencepiece.encode(case["text"]).tolist() == case["ids"]
    if "▁" not in case["text"]:  # the sign for a space is read as one
        assert sentencepiece.decode(case["ids"]) == case["text"]


def test_a_long_text_is_cut_in_places_that_change_nothing(sentencepiece):
    assert sentencepiece.bos_ids == (1,)
    text = GOLDEN[3]["text"] + " ".join(case["text"] for case in GOLDEN[1:]) * 300
    assert len(text) > 3 * 16_384
    tokens = sentencepiece.inner.encode(text, add_special_tokens=False).ids
    assert sentencepiece.encode(text).tolist() == tokens
    assert len(list(sentencepiece.encode_parts([text]))) > 2
    stream = sentencepiece.stream()
    assert "".join(map(stream.push, tokens[5:9])) == sentencepiece.decode(
        [tokens[0], *tokens[5:9]]
    ).removeprefix(sentencepiece.decode(tokens[:1]))


def test_a_saved_sentencepiece_vocabulary_is_loaded(sentencepiece, tmp_path):
    sentencepiece.save(tmp_path)
    again = load_tokenizer(tmp_path).tokenizer
    config = sentencepiece.to_json()
    config["normalizer"] = None  # newer files do the same in a step of another name
    config["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    newer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(config)), sentencepiece.config)
    long = GOLDEN[1]["text"] * 2000
    for text in [*(case["text"] for case in GOLDEN[1:]), long]:
        ids = sentencepiece.encode(text).tolist()
        assert again.encode(text).tolist() == ids
        # that step takes a space that is there already for its own
        if text.strip() and text[0] not in " ▁":
            assert newer.encode(text).tolist() == ids
            assert newer.decode(ids) == again.decode(ids) == sentencepiece.decode(ids)
    assert again.bos_ids == (1,)


def round_trip(tokenizer, vocab, tmp_path, eos_ids=()):
    metadata = tokenizer_metadata(tokenizer, eos_ids or (tokenizer.eos_id,), vocab)
    table = {"token_embd.weight": np.zeros((vocab, 64), np.float32)}
    absent = dict.fromkeys(("merges", "bos_token_id"))
    return load(tmp_path, vocab, words=absent, other=metadata, tensors=weights() | table)[0], metadata


def test_a_sentencepiece_vocabulary_comes_back(sentencepiece, tmp_path):
    again, _ = round_trip(sentencepiece, sentencepiece.vocab, tmp_path)
    for case in GOLDEN[1:]:
        assert again.encode(case["text"]).tolist() == case["ids"]
    assert again.bos_ids == sentencepiece.bos_ids


def test_a_named_split_comes_back_without_its_json(tmp_path):
    ends = {"eot_token_id": 260, "eom_token_id": 259}
    tokenizer, eos_ids = load(tmp_path, words=ends, other={"tokenizer.chat_template": "{{ x }}"})
    assert (eos_ids, tokenizer.config["eos_token"]) == ((261, 260, 259), "<|end|>")
    again, metadata = round_trip(tokenizer, VOCAB + 3, tmp_path, (261, 260))
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert "tokenizer.huggingface.json" not in metadata
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB + 2}]"
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert again.config["chat_template"] == "{{ x }}"
    assert metadata["tokenizer.ggml.eot_token_id"] == 260


def test_our_own_split_has_no_name_and_travels_whole(tmp_path):
    tokenizer = train_bpe(["the king of the sea, 1234 and 12 the the"] * 3, 280)
    again, metadata = round_trip(tokenizer, 300, tmp_path)
    assert metadata["tokenizer.ggml.pre"] == FALLBACK_PRE_TOKENIZER
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert again.eos_id == tokenizer.eos_id


def test_bytes_alone_have_no_place_in_a_gguf():
    with pytest.raises(ValueError, match="without merges"):
        tokenizer_metadata(byte_tokenizer(), (256,), 257)
