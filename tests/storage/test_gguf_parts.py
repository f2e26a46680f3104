"""A GGUF model in several files: the same model as in one, and each part that does not belong is named."""

import shutil
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from engine.storage.gguf_parts import part_names, without_part
from engine.storage.model_loader import load_model, model_name
from tests.storage.gguf_files import tiny_gguf, weights
from tests.storage.refusals import refusal

PART_SIZE = 9  # of 20 tensors


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    first = tiny_gguf(tmp_path / "x.gguf", kind="Q8_0", part_size=PART_SIZE)
    paths = [first.with_name(name) for name in part_names(first.name)]
    assert [path.name for path in paths] == [f"x-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert set(paths) == {*tmp_path.iterdir()}
    return paths


def test_a_model_in_parts_is_the_one_in_a_file(parts, tmp_path):
    whole = load_model(str(tiny_gguf(tmp_path / "x.gguf", kind="Q8_0")), keep_kinds=["Q8_0"])
    model = load_model(str(parts[0]), keep_kinds=["Q8_0"])
    assert (model.name, model.cfg, model.kinds) == (whole.name, whole.cfg, whole.kinds)
    assert model.checkpoint == parts[0]
    assert model_name(str(parts[0])) == model.name == "x"
    jax.tree.map(np.testing.assert_array_equal, model.params, whole.params)
    assert [*model.tokenizer.encode("the 12")] == [*whole.tokenizer.encode("the 12")]


def test_a_part_that_is_missing_is_named(parts):
    parts[1].unlink()
    assert f"{parts[0]} is one of 3 parts, and {parts[1]} is missing" in refusal(load_model, str(parts[0]))


@pytest.mark.parametrize("place", [1, 2])
def test_a_part_that_is_there_twice_is_named(parts, place):
    shutil.copyfile(parts[3 - place], parts[place])
    said = refusal(load_model, str(parts[0]))
    assert f"{parts[place]} should be the part {place}, counted from 0" in said
    assert f"'split.no' is {3 - place}" in said


def test_the_first_part_is_what_a_name_says(parts):
    said = refusal(load_model, str(parts[1]))
    assert f"{parts[1].name} is part 2 of a model in 3: name the first, {parts[0].name}" in said
    shutil.copyfile(parts[1], parts[0])
    assert f"{parts[0]} should be the part 0" in refusal(load_model, str(parts[0]))
    renamed = parts[0].rename(parts[0].with_name("y.gguf"))
    assert f"{renamed} is one of 3 parts, by its key 'split.count', and its name" in refusal(
        load_model, str(renamed)
    )


def test_a_part_of_another_model_is_named(parts, tmp_path):
    fewer = {name: value for name, value in weights().items() if not name.startswith("blk.1.attn_norm")}
    other = tiny_gguf(tmp_path / "fewer.gguf", kind="Q8_0", tensors=fewer, part_size=PART_SIZE)
    shutil.copyfile(other.with_name("fewer-00002-of-00003.gguf"), parts[1])
    said = refusal(load_model, str(parts[0]))
    assert f"{parts[1]} is no part of the model in {parts[0]}: its key 'split.tensors.count' is 19" in said
    backwards = dict(reversed(weights().items()))
    other = tiny_gguf(tmp_path / "other.gguf", kind="Q8_0", tensors=backwards, part_size=PART_SIZE)
    shutil.copyfile(other.with_name("other-00002-of-00003.gguf"), parts[1])
    said = refusal(load_model, str(parts[0]))
    assert said.startswith(f"{parts[1]}: its tensor 'blk.")
    assert said.endswith(f"is in {parts[0]} too.")


def test_a_part_without_some_of_its_tensors_is_noticed(parts, tmp_path):
    reader = gguf.GGUFReader(parts[2])
    writer = gguf.GGUFWriter(tmp_path / "short.gguf", "llama")
    for key, value_type in (("no", "UINT16"), ("count", "UINT16"), ("tensors.count", "INT32")):
        value = reader.fields[f"split.{key}"].contents()
        writer.add_key_value(f"split.{key}", value, gguf.GGUFValueType[value_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "short.gguf").replace(parts[2])
    said = refusal(load_model, str(parts[0]))
    assert f"{parts[0]} and its other parts hold 18 tensors, and should hold 20" in said


@pytest.mark.parametrize("value", [2**15, 0])
def test_a_count_that_the_name_does_not_say(tmp_path, value):
    path = tiny_gguf(tmp_path / "x-00001-of-00002.gguf", other={"split.count": value})
    if value:
        assert f"{path} is one of {value} parts" in refusal(load_model, str(path))
    else:  # as a merged file has it
        assert load_model(str(path)).name == "x"


def test_names_of_parts():
    assert part_names("a/b-00001-of-00002.gguf") == ["a/b-00001-of-00002.gguf", "a/b-00002-of-00002.gguf"]
    for name in ("b-1-of-2.gguf", "b-00001-of-00000.gguf", "b-٠٠٠٠١-of-٠٠٠٠٢.gguf"):
        assert part_names(name) == [name]
    assert without_part("b-00001-of-00002.gguf") == without_part("b.gguf") == "b"
