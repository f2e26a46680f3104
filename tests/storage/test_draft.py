"""A draft is a file beside its model: it comes back to the bit, and is for no other model."""

import numpy as np
import pytest
from tiny import lively_params, tiny_config

from engine.errors import UserError
from engine.ngrams import count_ngrams
from engine.storage.digest import digest
from engine.storage.draft import draft_path, find_draft, load_draft, save_draft
from engine.storage.huggingface import safetensors

CFG = tiny_config()
NGRAMS = count_ngrams([([n % 7, 2 * n % 40, 0, 3, n % 40], 1) for n in range(30)], CFG.vocab)._replace(answer_seconds=2.5)


def test_it_comes_back_to_the_bit_for_its_own_model(tmp_path):
    params, other = lively_params(CFG), lively_params(CFG, 1)
    for model in (tmp_path / "tiny.gguf", tmp_path):
        path = draft_path(model)
        assert find_draft(model, CFG.vocab, params) == (None, "")
        save_draft(path, NGRAMS, digest(params))
        found, note = find_draft(model, CFG.vocab, params)
        assert note == ""
        for one, loaded in zip(NGRAMS, found, strict=True):
            np.testing.assert_array_equal(one, loaded)
        found, note = find_draft(model, CFG.vocab, other)
        assert found is None
        assert note == (
            f"The draft {path} is left out: it was trained for another model, of the digest {digest(params)[:16]!r}, and this "
            f"one has {digest(other)[:16]!r}; train it again."
        )


@pytest.mark.parametrize(
    ("name", "rows", "problem"),
    [
        ("other", np.ones((2, 5)), "holds no draft"), ("ngrams", np.ones((2, 4)), "holds no draft"),
        ("ngrams", np.array([[1, 1, 1, CFG.vocab, 0.5]]), "no token of 41"), ("ngrams", [[1, -2, 1, 1, 0.5]], "no token"),
        ("ngrams", [[1, 1.5, 1, 1, 0.5]], "no token"), ("ngrams", [[1, 1, 1, -1, 0.5]], "no token"),
        ("ngrams", [[1, np.nan, 1, 1, 0.5]], "no token"), ("ngrams", [[1, 1, 1, 1, np.nan]], "no token"),
        ("ngrams", [[1, 1, 1, 1, 1.5]], "a chance above 1"), ("ngrams", np.ones((0, 5)), "a chance above 1, or nothing"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_refused_and_left_out(name, rows, problem, tmp_path):
    path, rows = draft_path(tmp_path), np.asarray(rows, np.float32)
    safetensors.write_file(path, {name: rows.shape}, "F32", [rows])
    with pytest.raises(UserError, match=problem):
        load_draft(path, CFG.vocab)
    found, note = find_draft(tmp_path, CFG.vocab, {})
    assert found is None
    assert problem in note


def test_seconds_that_are_no_number_are_refused(tmp_path):
    path = draft_path(tmp_path)
    safetensors.write_file(path, {"ngrams": (1, 5)}, "F32", [np.ones((1, 5), np.float32)], {"thrice.answer_seconds": "nan"})
    with pytest.raises(UserError, match="'nan' is no number of seconds"):
        load_draft(path, CFG.vocab)
