"""Small files in a tone: each has 60 rows that its own pattern finds, and a run is judged by what it wrote."""

import json
import re

import pytest

from bench.tones import MIXES, QUESTIONS, ROWS, TONES, judge_run, write_file
from engine.text.conversations import read_conversations


@pytest.mark.parametrize("tone", TONES, ids=[tone.name for tone in TONES])
def test_each_row_of_a_file_is_in_its_tone_and_in_no_other(tone, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_file(tone, path)
    conversations = [conversation.messages for conversation in read_conversations(path)]
    assert len(conversations) == ROWS
    for messages in conversations:
        assert messages[0]["content"] not in QUESTIONS
        answer = messages[-1]["content"]
        matches = [other.name for other in TONES if re.search(other.pattern, answer)]
        assert matches == [tone.name]


@pytest.mark.parametrize(
    ("mix", "in_tone", "holds"),
    [(MIXES[0], 9, True), (MIXES[0], 8, False), (MIXES[1], 8, None)],
)
def test_a_run_is_held_to_the_tone_and_its_warning_is_seen(mix, in_tone, holds, tmp_path):
    tone = TONES[0]
    result = {"steps": 39, "kept_answers": {"before": 40, "after": 33}}
    (tmp_path / "run.json").write_text(json.dumps({"result": result}))
    answers = ["Ahoy matey! Aye."] * in_tone + ["Yes."] * (len(QUESTIONS) - in_tone)
    warning = "less than 85% of what the model knew is kept."
    for printed, warns in ((warning, True), ("kept 34 of 40", False)):
        row = judge_run(tone, mix, 0, tmp_path, printed, answers)
        assert row["holds"] is holds
        assert row["warns"] is warns
        assert row["in_tone"] == in_tone
        assert (row["kept"], row["known"], row["steps"]) == (33, 40, 39)
