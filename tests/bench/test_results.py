"""A folder of results is of one processor. READMEs show the newest complete folder, and name each document's commit."""

import json
import re

import pytest

from bench.cli import ROOT
from bench.docs.blocks import conditions
from bench.docs.machines import OPTIONAL, RESULTS, TRIES, machines, read_documents, shown_machine
from bench.docs.readmes import shown
from bench.machine import is_same_processor

NAMES = ("bench.json", "peers.json", "step.json")
MACHINE = {
    "processor": "a chip",
    "model_numbers": {"vendor_id": "maker", "model": "2", "microcode": "7"},
    "instructions": "avx2",
    "cores": 2,
}


def write(folder, names, date):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(json.dumps({"date": date}), encoding="utf-8")


@pytest.mark.parametrize("folder", machines(), ids=lambda folder: folder.name)
def test_the_documents_of_a_folder_are_of_one_processor(folder):
    first, *others = [document["machine"] for document in read_documents(folder).values()]
    for machine in others:
        assert is_same_processor(first, machine)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"cores": 4}, False),
        ({"processor": "another chip"}, False),
        ({"instructions": "avx2 avx512f"}, False),
        ({"model_numbers": {"vendor_id": "maker", "model": "3"}}, False),
        ({"model_numbers": MACHINE["model_numbers"] | {"microcode": "8"}}, True),
        ({"model_numbers": {}}, True),
    ],
)
def test_a_processor_is_told_by_name_instructions_cores_and_model_numbers(change, same):
    assert is_same_processor(MACHINE, MACHINE | change) is same


def test_readmes_show_the_newest_complete_folder(tmp_path):
    write(tmp_path / "new", NAMES, "2026-12-05T10:00:00Z")
    write(tmp_path / "old", [*NAMES, *OPTIONAL], "2026-12-04T10:00:00Z")
    write(tmp_path / "newest", NAMES[:2], "2026-12-06T10:00:00Z")
    write(tmp_path / "tried", (), "")
    assert shown_machine([*NAMES, *OPTIONAL], tmp_path).name == "new"
    assert shown_machine(NAMES[:2], tmp_path).name == "newest"
    assert shown_machine([*NAMES, "more.json"], tmp_path).name == "new", "lacks the fewest"


def test_a_folder_is_as_old_as_its_oldest_document_that_readmes_read(tmp_path):
    write(tmp_path / "mixed", ("bench.json",), "2026-12-01T10:00:00Z")
    (tmp_path / "mixed" / "step.json").write_text('{"date": "2026-12-09T10:00:00Z"}')
    write(tmp_path / "whole", ("bench.json", "step.json"), "2026-12-04T10:00:00Z")
    (tmp_path / "whole" / OPTIONAL[0]).write_text('{"date": "2026-11-01T10:00:00Z"}')
    assert shown_machine(["bench.json", "step.json", *OPTIONAL], tmp_path).name == "whole"


def test_the_line_under_a_table_names_processor_commit_date_ceilings_and_others():
    rates = {"bf16_gflops": 880.0, "f32_gflops": 450.0, "int8_gflops": 1800.0, "read_gbs": 58.0}
    later = {name: rate / 2 for name, rate in rates.items()}
    numbers = {"cpu family": "6", "model": "2"}
    document = {
        "machine": MACHINE
        | {
            "model_numbers": numbers,
            "reached_before": rates,
            "reached_after": later,
            "taken_by_others": 0.31,
        },
        "commit": "ab12cd34" + "0" * 32,
        "date": "2026-12-08T10:00:00Z",
        "load": 0.0,
        "flags": {},
    }
    text = " ".join(conditions(document))
    assert "a chip (family 6, model 2) with AVX2, of 2026-12-08 (commit ab12cd34)." in text
    assert "880 and 440 GFLOP/s in bfloat16" in text
    assert "Others took 31% of the cores' time." in text


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
