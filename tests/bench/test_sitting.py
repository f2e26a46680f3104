"""A machine's documents are of one sitting: one commit, one speed. READMEs show the newest whole folder."""

import copy
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import ROOT
from bench.docs.machines import RESULTS, TRIES, machines, shown_machine
from bench.docs.readmes import shown
from bench.sitting import SPREAD, differences, read_documents, to_measure_again

# Documents of before this day say neither model numbers nor what their machine reached, and were
# measured one by one.
SINCE = "2026-12-02T12"
RATES = {"bf16_gflops": 880.0, "f32_gflops": 450.0, "int8_gflops": 1800.0, "read_gbs": 58.0}


def sitting(*names, date="2026-12-03T10:00:00Z"):
    """The documents of a sitting on a machine whose rates differ by a few hundredths."""
    documents = {}
    for place, name in enumerate(names):
        rates = {rate: value * (1 + 0.09 * place / len(names)) for rate, value in RATES.items()}
        luck = {rate: 1.7 * value for rate, value in rates.items()}
        documents[name] = {
            "machine": {
                "processor": "a chip",
                "model_numbers": {"vendor_id": "maker", "model": "2"},
                "instructions": "avx2",
                "cores": 2,
                "reached_before": rates,
                "reached_after": luck,
            },
            "commit": "c" * 40,
            "date": date,
            "versions": {"jax": "1", "numpy": "2"},
        }
    return documents


def write(folder, documents):
    folder.mkdir(parents=True)
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return folder


GOOD = sitting("bench.json", "peers.json", "step.json")


def test_a_whole_sitting_has_no_differences():
    assert differences(GOOD) == []


def test_a_machine_whose_rates_cannot_be_measured_apart_has_no_differences():
    documents = copy.deepcopy(GOOD)
    for document in documents.values():
        document["machine"] |= {"reached_before": None, "reached_after": None}
    assert differences(documents) == []


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("commit",), "d" * 40, "commit: "),
        (("commit",), "c" * 40 + "-dirty", "commit: step.json is of none"),
        (("versions", "jax"), "1.1", "version of jax: "),
        (("machine", "processor"), "another chip", "processor: "),
        (("machine", "model_numbers", "model"), "3", "model_numbers: "),
        *(
            (("machine", "reached_before", rate), factor * value, f"{rate}: ")
            for rate, value in RATES.items()
            for factor in (0.8, 1.2)
        ),
    ],
)
def test_a_document_of_another_sitting_is_named(keys, value, words):
    documents = copy.deepcopy(GOOD)
    inside = documents["step.json"]
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    lines = differences(documents)
    assert any(line.startswith(words) and "step.json" in line for line in lines), lines


def test_a_document_that_others_disturbed_is_named():
    documents = copy.deepcopy(GOOD)
    documents["step.json"]["machine"]["taken_by_others"] = 0.2
    assert differences(documents) == ["others: they took 20% of the cores' time in step.json"]


def test_documents_of_another_speed_than_most_are_measured_again():
    documents = sitting("a.json", "b.json", "c.json", "d.json", "e.json")
    assert to_measure_again(documents) == set()
    documents["b.json"]["machine"]["reached_before"]["bf16_gflops"] *= 0.5
    documents["d.json"]["machine"]["reached_before"]["read_gbs"] *= 1.2
    documents["e.json"]["machine"]["taken_by_others"] = 0.2
    assert to_measure_again(documents) == {"b.json", "d.json", "e.json"}


@given(st.lists(st.floats(100, 1000), min_size=1, max_size=7))
def test_what_is_not_measured_again_lies_within_the_spread(rates):
    documents = sitting(*map(str, range(len(rates))))
    for document, rate in zip(documents.values(), rates, strict=True):
        for moment in ("reached_before", "reached_after"):
            document["machine"][moment]["f32_gflops"] = rate
    again = to_measure_again(documents)
    kept = [rate for name, rate in zip(documents, rates, strict=True) if name not in again]
    assert max(kept) <= SPREAD * min(kept)
    for lowest in rates:
        assert sum(lowest <= rate <= SPREAD * lowest for rate in rates) <= len(kept)


def test_documents_without_ceilings_are_measured_again_for_others_alone():
    documents = copy.deepcopy(GOOD)
    for document in documents.values():
        document["machine"] |= {"reached_before": None, "reached_after": None}
    documents["step.json"]["machine"]["taken_by_others"] = 0.2
    assert to_measure_again(documents) == {"step.json"}


def test_a_document_without_ceilings_is_named():
    documents = copy.deepcopy(GOOD)
    del documents["step.json"]["machine"]["reached_after"]
    assert differences(documents) == ["ceilings: step.json has none"]


@pytest.mark.parametrize("folder", machines(), ids=lambda folder: folder.name)
def test_the_documents_of_each_machine_are_of_one_sitting(folder):
    documents = read_documents(folder)
    if all(document["date"] < SINCE for document in documents.values()):
        pytest.skip(f"the documents of {folder.name} are of an earlier form, measured one by one")
    assert differences(documents) == []


def test_readmes_show_the_newest_whole_folder(tmp_path):
    names = [*GOOD]
    write(tmp_path / "new", sitting(*names, date="2026-12-05T10:00:00Z"))
    write(tmp_path / "old", sitting(*names, date="2026-12-04T10:00:00Z"))
    write(tmp_path / "newest", sitting(*names[:2], date="2026-12-06T10:00:00Z"))
    write(tmp_path / "tried", {})
    assert shown_machine(names, tmp_path).name == "new"
    assert shown_machine(names[:2], tmp_path).name == "newest"
    assert shown_machine([*names, "more.json"], tmp_path).name == "new", "lacks the fewest"


def test_a_folder_is_as_old_as_its_oldest_document(tmp_path):
    mixed = sitting("bench.json", date="2026-12-01T10:00:00Z") | sitting(
        "step.json", date="2026-12-09T10:00:00Z"
    )
    write(tmp_path / "mixed", mixed)
    write(tmp_path / "whole", sitting(*mixed, date="2026-12-04T10:00:00Z"))
    assert shown_machine(mixed, tmp_path).name == "whole"


def test_the_machine_that_readmes_show_is_one_of_the_results():
    assert shown() in machines()
    assert TRIES not in machines()


def test_no_machine_is_spelled_outside_the_results():
    """Else another machine's folder would need an edit elsewhere."""
    names = [re.sub(r"(?<=\D)(?=\d)", r"\\W?", re.escape(folder.name)) for folder in machines()]
    spelled = re.compile(rf"\b({'|'.join(names)})\b", re.IGNORECASE)
    found = []
    for folder in ("engine", "stages", "bench", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".c", ".h", ".toml") and RESULTS not in path.parents:
                found += [str(path) for _ in spelled.findall(path.read_text(encoding="utf-8"))]
    found += [str(path) for path in ROOT.glob("*.md") if spelled.search(path.read_text(encoding="utf-8"))]
    assert found == []
