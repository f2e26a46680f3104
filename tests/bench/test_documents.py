"""Answers from documents against fine-tuning: each question finds its fact, and the verdict follows from the facts recalled."""

import json

import pytest

from bench.documents import FACTS, judge_documents
from bench.timing import Ratio
from engine.text.documents import Documents
from engine.text.tokenizer import byte_tokenizer


def test_every_question_finds_the_fact_that_answers_it(tmp_path):
    facts = [json.loads(line) for line in FACTS.read_text().splitlines()]
    (tmp_path / "island.md").write_text("\n\n".join(fact["fact"] for fact in facts))
    documents = Documents(tmp_path)
    for fact in facts:
        assert fact["answer"] in fact["fact"]
        assert not {fact["asked"]} & {fact["question"], fact["fact"]}
        assert fact["fact"] in [
            found.text for found in documents.find(fact["asked"], byte_tokenizer(), 512)
        ], fact["asked"]


@pytest.mark.parametrize(
    ("documents", "tuned", "verdict"),
    [(20, 4, "false here"), (4, 20, "true here"), (12, 10, "undecided for this model")],
)
def test_the_verdict_follows_from_the_facts_recalled(documents, tuned, verdict):
    row = lambda name, right, seconds: {
        "name": name,
        "right": right,
        "seconds": seconds,
        "answers": [{}] * 24,
    }
    rows = [row("as it is", 0, 1.0), row("from documents", documents, 1.5), row("fine-tuned", tuned, 1.0)]
    claim = judge_documents(rows, Ratio(1.5, 1.4, 1.6, 6), 300, 0.36)
    assert claim["verdict"] == verdict
    assert claim["numbers"]["fine-tuned"] == tuned
    for words in (
        f"answers 0 as it is, {documents} with",
        "cost $0.15 from documents, and $0.10 beside $0.03 for",
        "after 600 ",
    ):
        assert words in claim["value"]
    rows[1]["seconds"] = 0.9
    assert "tuning never pays" in judge_documents(rows, Ratio(0.9), 300, 0.36)["value"]
