"""Text and tokens are two writings of the same thing, whatever the text, whole or piece by piece."""

import base64
import itertools
import json
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.storage.huggingface import load_tokenizer
from engine.text import tokenizer as tokenizer_module
from engine.text.tokenizer import END, Tokenizer, byte_tokenizer, train_bpe

PROSE = (
    "The quality of mercy isn't strain'd, it droppeth as the gentle rain; 1596 or 1597? Größe, 東京, "
    "नमस्ते, 👩‍👩‍👧!\n\n" * 40
)
BPE = train_bpe([PROSE], 320)
BYTE = byte_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])

# Every code point with something of each alternative of the split around it, and random text full
# of what it looks for.
EVERY = "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, sys.maxunicode + 1))))
texts = (
    st.text()
    | st.text(alphabet=" \t\r\n'abZsé1½٣^_\u0301\u200d\ufe0f東。😀<|>")
    | st.sampled_from([END, "<|im_start|>"])
)


@BOTH
def test_every_code_point_comes_back(tokenizer):
    for text in (EVERY, " ".join(EVERY[::37])):
        # A plain assertion about a million characters would have pytest explain the difference for
        # minutes.
        same = tokenizer.decode(tokenizer.encode(text)) == text
        assert same


@BOTH
@settings(max_examples=200)
@given(parts=st.lists(texts))
def test_every_text_comes_back(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert (ids.dtype, ids.ndim) == (np.int32, 1)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert tokenizer.eos_id not in ids


@settings(max_examples=200)
@given(ids=st.lists(st.integers(-3, BPE.vocab + 3)))
def test_stream_joins_to_decode(ids):
    stream = BPE.stream()
    text, cut = "".join(map(stream.push, ids)), stream.push(BPE.encode("a")[0])
    assert text + cut.removesuffix("a") == BPE.decode(
        ids
    )  # U+FFFD for a part of a character, once it is sure to be one


@settings(max_examples=200)
@given(text=st.text(alphabet="aé東😀\ufffd\u0301"))
def test_stream_never_shows_half_a_character(text):
    stream = BYTE.stream()
    output = ""
    for token in BYTE.encode(text):
        output += stream.push(token)
        assert text.startswith(output)
    assert output == text  # without waiting longer than it must
    assert stream.push(0xF0) == ""


@BOTH
def test_control_tokens_are_never_made_from_text(tokenizer):
    ids = tokenizer.encode(f"before{END}after{END}")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"before{END}after{END}"
    # Put in by id they end a text, and stand for no text and no bytes.
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]) == "ab"
    assert tokenizer.count_bytes([-1, tokenizer.eos_id, tokenizer.vocab, 10_000]) == 0


NOISE = random.Random(0)
LONG_TEXTS = [
    unit * (40_000 // len(unit))
    for unit in (
        "a",
        "^",
        "7",
        " ",
        "\n",
        "\r\n",
        "\u0301",
        "東",
        "ab ",
        "'s",
        "👩\u200d👩\u200d👧",
        END,
        " " * 63 + "\n",
        "!?" * 40 + "\n" * 70,
    )
]
LONG_TEXTS += [
    base64.b64encode(NOISE.randbytes(40_000)).decode(),
    "".join(chr(NOISE.randrange(0x20, 0x3000)) for _ in range(40_000)),
]


@BOTH
@pytest.mark.parametrize("text", LONG_TEXTS, ids=lambda text: ascii(text[:5]))
def test_cut_into_pieces_the_tokens_are_those_of_the_whole(tokenizer, text):
    assert _same_as_in_one_go(tokenizer, text)


@pytest.mark.parametrize(
    "line", [pytest.param("to be or not to be, ", marks=pytest.mark.whole), "不以物喜，不以己悲。"]
)
def test_a_long_line_is_cut(line):
    assert len([*BPE.encode_parts([line * 300_000])]) > 2


@settings(max_examples=100)
@given(parts=st.lists(texts, max_size=60), piece=st.integers(1, 40))
def test_pieces_are_cut_between_tokens(parts, piece):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE", piece)
        assert _same_as_in_one_go(BPE, text)


def _same_as_in_one_go(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.encode(text).tolist() == tokenizer.inner.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("broken", ["ab\ud83dcd", "ab\udc00"])
def test_half_a_character_is_refused_with_its_place(broken):
    with pytest.raises(UserError, match=r"surrogate U\+D.* at character 2"):
        BPE.encode(broken)
    with pytest.raises(UserError, match="character 2"):
        train_bpe([broken], 300)


def test_same_texts_same_vocabulary():
    assert train_bpe(iter([PROSE]), 320).digest == BPE.digest
    assert train_bpe([PROSE], 321).digest != BPE.digest
    assert train_bpe([PROSE + "zz " * 1000], 320).digest != BPE.digest


def test_a_text_too_small_for_a_vocabulary():
    assert train_bpe(["text"], 257).vocab == 257
    short = train_bpe(["text"], 1000)
    assert short.vocab < 300
    assert short.eos_id == short.vocab - 1


@BOTH
def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path).tokenizer
    assert loaded.digest == tokenizer.digest
    assert (loaded.vocab, loaded.eos_id, loaded.config) == (
        tokenizer.vocab,
        tokenizer.eos_id,
        tokenizer.config,
    )
    np.testing.assert_array_equal(loaded.encode(PROSE + END), tokenizer.encode(PROSE + END))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == END


def test_another_end_is_taken_from_the_config(tmp_path):
    BPE.save(tmp_path)
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    source["added_tokens"].append(dict(source["added_tokens"][0], id=320, content="<|im_end|>"))
    source["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    for named in ("<|im_end|>", {"content": "<|im_end|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        loaded = load_tokenizer(tmp_path).tokenizer
        assert loaded.eos_id == 320
        assert loaded.vocab == 321
        assert loaded.decode(loaded.encode(f"{PROSE}<|im_end|>{END}")) == f"{PROSE}<|im_end|>{END}"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=f"{tmp_path} has no token '</s>', which should end a text"):
        load_tokenizer(tmp_path)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    saved = (tmp_path / "tokenizer.json").read_text()
    for damaged in (saved[: len(saved) // 2], "", "[]", "{}", saved.replace('"ByteLevel"', '"Nothing"')):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json does not hold"):
            load_tokenizer(tmp_path)
    source = json.loads(saved)
    source["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match="decodes with Fuse"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(saved)
    for config in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            load_tokenizer(tmp_path)
