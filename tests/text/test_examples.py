"""Rows that fit are used, others cut or dropped, each accounted for; a packed row is worth what its examples are alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.text.chat_tokenizer import CHATML, ChatTokenizer, Example
from engine.text.conversations import Conversation, Text
from engine.text.examples import Pair, RatedPair, make_examples, make_pairs, make_ratings, mismatch
from engine.text.packing import PackedBatches, evaluation_batches, pack_rows
from engine.training.preference import preference_batch
from tests.text.chat_models import BRACKETS, chat_tokenizer, talk

TOKENIZER = chat_tokenizer()


def preference(prompt: list[dict[str, str]], chosen: str, rejected: str, where: str) -> Conversation:
    return Conversation((*prompt, {"role": "assistant", "content": chosen}), where, rejected=rejected)


CONTROL = next(token for token, added in TOKENIZER.controls.items() if added.content == "<s>")


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(TOKENIZER, CHATML)


def test_an_account_of_every_row(chat):
    long = "how are you? " * 20
    rows = [
        Conversation(talk("Hello", "I am well."), "f:1"),
        Conversation(talk("Hello", "I am well.", long, "I am."), "f:2"),
        Conversation(talk(long, "I am well."), "f:3"),
        Conversation(talk("Hello"), "f:4"),
        Conversation(talk("Hello", "  \n"), "f:5"),
        Conversation((), "f:6"),
    ]
    reports: list[tuple[int, int]] = []
    dataset = make_examples(rows, chat, 40, report=lambda *pair: reports.append(pair))
    examples = dataset.examples
    assert [example.where for example in examples] == ["f:1", "f:2"]
    assert [row for row, _ in dataset.used] == rows[:2]
    assert [where for where, _ in dataset.truncated] == ["f:2"]
    assert [where for where, _ in dataset.dropped] == ["f:3", "f:4", "f:5", "f:6"]
    assert len(examples[1].tokens) == 41
    assert reports[-1] == (2, 6)
    said_of = "\n".join(dataset.describe())
    for words in (
        "2 of 6 rows kept, 1 of them truncated; 4 dropped",
        "1 truncated: longer than 40 tokens",
        "(f:2 first)",
        "its first 40 tokens hold nothing to train on (f:3 first)",
        "no turn of the assistant (f:4",
        "says nothing in one of its turns (f:5",
    ):
        assert words in said_of


def test_what_the_template_refuses_is_left_out():
    chat = ChatTokenizer(TOKENIZER, BRACKETS)
    rows = [Conversation(talk("a", "b", system="s"), "f:1"), Conversation(talk("a", "b"), "f:2")]
    dataset = make_examples(rows, chat, 40)
    examples = dataset.examples
    assert [example.where for example in examples] == ["f:2"]
    assert "Only user and assistant" in dataset.dropped[0][1]
    with pytest.raises(
        UserError, match=r"None of 1 rows can be trained on; the first, f:1: The chat template refuses"
    ):
        make_examples(rows[:1], chat, 40)


def test_all_of_a_text_is_a_target_once(chat, monkeypatch):
    text = "The assistant answers. " * 9
    monkeypatch.setattr(TOKENIZER, "bos_ids", (CONTROL,))
    dataset = make_examples([Text(text, "f:1"), Text("", "f:2")], chat, 10)
    examples = dataset.examples
    tokens = [CONTROL, *TOKENIZER.encode(text), TOKENIZER.eos_id]
    here = [example for example in examples if example.where == "f:1"]
    assert all(len(example.tokens) <= 11 and example.mask.all() for example in examples)
    targets = np.concatenate([example.tokens[1:] for example in here])
    assert targets.tolist() == tokens[1:]
    assert dataset.truncated == dataset.dropped == []
    assert examples[-1].tokens.tolist() == [CONTROL, TOKENIZER.eos_id]


def test_pairs(chat):
    history = talk("Hello", "I am well.", "how are you?")
    rows = [
        preference(history, "I am.", "The user.", "f:1"),
        preference(talk("a"), "same", "same", "f:2"),
        preference(talk("a"), "b", "how are you? " * 20, "f:3"),
        preference(talk("a"), "b", "", "f:4"),
    ]
    dataset = make_pairs(rows, chat, 60)
    pairs = dataset.examples
    assert [row for row, _ in dataset.used] == rows[:1]
    assert len(pairs) == 1
    assert [where for where, _ in dataset.dropped] == ["f:2", "f:3", "f:4"]
    for example, answer in ((pairs[0].answer, "I am."), (pairs[0].other, "The user.")):
        # not what was said in turns before
        assert TOKENIZER.decode(example.tokens[example.mask]) == answer
        assert example.tokens[example.mask][-1] in chat.eot_ids
    trimming = ChatTokenizer(TOKENIZER, CHATML.replace("message.content", "message.content | trim"))
    spaced = preference(talk("a"), "b", "b ", "f:5")
    with pytest.raises(UserError, match="f:5: both answers are the same"):
        make_pairs([spaced], trimming, 60)
    assert [row for row, _ in make_pairs([spaced], chat, 60).used] == [spaced]


def test_ratings_and_other_prompts_answers(chat):
    """A good or bad answer of its own row, or both of a preference; a prompt's other answers are
    not mismatched with it.
    """
    rated = lambda prompt, answer, label, **more: Conversation(
        talk(prompt, answer), f"f:{answer}", label=label, **more
    )
    rows = [
        rated("p", "a", True),
        rated("p", "b", False, weight=2.0),
        preference(talk("q"), "c", "d", "f:c"),
        rated("r", "e", True),
        rated("r", "f", True, weight=0.0),
        rated("r", "how are you? " * 20, True),
    ]
    dataset = make_ratings(rows, chat, 60)
    ratings = dataset.examples
    assert [rating.value for rating in ratings] == [1, -2, 1, -1, 1]
    assert [reason for _, reason in dataset.dropped] == ["its weight is 0", "longer than 60 tokens"]
    matched = mismatch(ratings, 60)
    texts = lambda side: [TOKENIZER.decode(rating[side].tokens[rating[side].mask]) for rating in matched]
    assert texts(0) == ["a", "b", "c", "d", "e"]
    assert texts(1) == ["c", "c", "e", "e", "a"]
    for rating in matched:
        prompt = ~rating.answer.mask.cumsum().astype(bool)
        assert np.array_equal(rating.other.tokens[: prompt.sum()], rating.answer.tokens[prompt])
    short = mismatch(ratings, len(ratings[0].answer.tokens) - 2)
    assert {len(rating.other.tokens) for rating in short} == {len(ratings[0].answer.tokens) - 1}
    assert texts(1) == ["c", "c", "e", "e", "a"]
    assert mismatch(ratings[:1], 60)[0].other.mask.any()
    with pytest.raises(UserError, match="f:1: `label` should be true for a good answer"):
        make_ratings([Conversation(talk("a", "b"), "f:1")], chat, 60)
    with pytest.raises(UserError, match="f:b: `label` is false, an answer not to give"):
        make_examples(rows[:2], chat, 60)


def test_no_data_is_refused(chat):
    with pytest.raises(UserError, match="nothing in it"):
        make_examples([], chat, 60)


def test_weights_of_rows_and_of_turns(chat):
    rows = [
        Conversation(talk("a", "b"), "f:1", weight=0.0),
        Conversation(talk("a", " ", "c", "d"), "f:2", frozenset({1}), 2.0),
        Text("a", "f:3", 0.5),
        Conversation(talk("a", "b"), "f:4", frozenset({1})),
    ]
    dataset = make_examples(rows, chat, 60)
    examples = dataset.examples
    assert [(example.where, example.weight) for example in examples] == [("f:2", 2.0), ("f:3", 0.5)]
    assert dataset.dropped == [("f:1", "its weight is 0"), ("f:4", "no turn of the assistant is trained on")]


def example(*tokens: int, counts: bool = True) -> Example:
    return Example(
        np.array(tokens, np.int32), np.array([False] + [counts] * (len(tokens) - 1)), f"f:{tokens[0]}"
    )


EXAMPLES = [example(*range(start, start + 2 + start % 5)) for start in range(1, 34)]


def examples_of(sizes: list[int], seed: int = 0) -> list[Example]:
    """Examples of sizes + 1 tokens, of which about half count."""
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(1, 41, size + 1, np.int32), rng.random(size + 1) < 0.5, f"f:{place}")
        for place, size in enumerate(sizes)
    ]


def tokens_in(batch: Any) -> list[tuple[int, ...]]:
    """The tokens of each example in a batch, by its segments."""
    examples = []
    for row, segments in enumerate(batch.segments):
        for segment in sorted({*segments.tolist()} - {0}):
            here = segments == segment
            np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
            examples.append((*batch.tokens[row][here].tolist(), int(batch.targets[row][here][-1])))
    return examples


def test_a_row_by_hand():
    packed = PackedBatches(
        [example(1, 2, 3), example(4, 5, 6, 7), example(8, 9, counts=False)], seq=7, batch=1, seed=0
    )
    batch = packed.at(0)
    assert batch.tokens.tolist() == [[4, 5, 6, 1, 2, 8, 0]]
    assert batch.targets.tolist() == [[5, 6, 7, 2, 3, 9, 0]]
    assert batch.mask.tolist() == [[True] * 5 + [False] * 2]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3, 0]]
    assert [field.dtype for field in batch] == [np.int32, np.int32, np.bool, np.int32, np.int32]


def test_weights_are_in_the_mask_of_training_alone():
    examples = [example(1, 2, 3), example(4, 5, 6, 7)._replace(weight=0.25)]
    (mask,) = PackedBatches(examples, seq=7, batch=1, seed=0).at(0).mask
    assert mask.dtype == np.float32
    assert mask.tolist() == [0.25] * 3 + [1] * 2 + [0] * 2
    (batch,) = evaluation_batches(examples, 7, 1)
    assert batch.mask.tolist() == [[True] * 5 + [False] * 2]


def test_each_goes_where_it_leaves_least_room():
    assert pack_rows(examples_of([3, 5, 7, 2]), 10) == [[2, 0], [1, 3]]


@settings(max_examples=80)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_every_example_lies_whole_in_one_row(sizes):
    rows = pack_rows(examples_of(sizes), 12)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in row) <= 12 for row in rows)
    if len(rows) > 1:
        # Best fit leaves no two rows that would go into one, and so never twice the rows there
        # could be.
        filled = sorted(sum(sizes[index] for index in row) for row in rows)
        assert filled[0] + filled[1] > 12


def test_an_epoch_sees_every_example_once():
    packed, rows = PackedBatches(EXAMPLES, seq=8, batch=1, seed=5), len(pack_rows(EXAMPLES, 8))
    firsts = [first for step in range(rows) for first, *_ in tokens_in(packed.at(step))]
    assert sorted(firsts) == [example.tokens[0] for example in EXAMPLES]
    assert firsts != [first for step in range(rows, 2 * rows) for first, *_ in tokens_in(packed.at(step))]


def test_once_is_once():
    examples = EXAMPLES[:23]
    batches = list(evaluation_batches(examples, 8, 4))
    assert {batch.tokens.shape for batch in batches} == {(4, 8)}
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(len(e.tokens) - 1 for e in examples)
    actual = sorted(tokens for batch in batches for tokens in tokens_in(batch))
    assert actual == sorted(tuple(e.tokens.tolist()) for e in examples)
    alone = PackedBatches(examples, 8, 23, 0, pack=False).at(0)
    assert alone.segments is None
    targets = sorted(row[mask].tolist() for row, mask in zip(alone.targets, alone.mask))
    assert targets == sorted(example.tokens[1:].tolist() for example in examples)


def test_preferences_stand_row_by_row():
    """Of pairs and of ratings; what is behind the last is padding, with a value of 0."""
    pairs = [Pair(example(n, n + 1, n + 2), example(n, n + 3)) for n in range(1, 8)]
    logprobs = np.arange(14, dtype=np.float32).reshape(7, 2)
    for items in (pairs, [RatedPair(*pair, is_good=False) for pair in pairs]):
        batch = preference_batch(items, [5, 0, 7], 4, logprobs)
        assert batch[0].tokens.tolist() == [[6, 7, 0, 0], [1, 2, 0, 0], [0] * 4]
        assert batch[1].tokens.tolist() == [[6, 0, 0, 0], [1, 0, 0, 0], [0] * 4]
        assert batch[1].targets.tolist() == [[9, 0, 0, 0], [4, 0, 0, 0], [0] * 4]
        assert batch[0].segments is None
        assert not batch[0].mask[2].any()
        assert batch.reference[:2].tolist() == [[10, 11], [0, 1]]
    assert batch.value.tolist() == [-1, -1, 0]
