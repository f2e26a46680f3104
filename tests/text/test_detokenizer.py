"""CompletionText: the text up to the first complete stop string, whatever tokens it comes in, no later than it is certain."""

import codecs

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import CompletionText, Detokenizer

LETTERS = "abé😀"
PIECES = ["a", "b", "ab", "ba", "aab", "é", "😀", "bé"]
# Whole characters, and the single bytes that some of them are made of.
TABLE = dict(
    enumerate([piece.encode() for piece in PIECES] + [bytes([byte]) for byte in "é😀".encode()] + [b""])
)

tokens_ = st.lists(st.integers(0, len(TABLE) - 1), max_size=25)
stops_ = st.lists(st.text(LETTERS + "\ufffd", max_size=4), max_size=3)


def plainly(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete after the fewest characters, and which (the
    longest of several).
    """
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


def undecided(text: str, stops: list[str]) -> int:
    """How many characters at the end may yet turn out to be a stop string's first ones."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


@settings(max_examples=300)
@given(tokens_, stops_, st.integers(1, 5))
def test_the_text_ends_before_the_first_stop_string(tokens, stops, together):
    full_text = codecs.getincrementaldecoder("utf-8")("replace").decode(
        b"".join(TABLE[token] for token in tokens)
    )
    completion, output = CompletionText(Detokenizer(TABLE), stops), ""
    for start in range(0, len(tokens), together):
        output += completion.push(tokens[start : start + together])
    count = completion.tokens
    output += completion.push([], last=True)
    assert (output, completion.stopped) == plainly(full_text, stops)
    assert completion.push([], last=True) == "" or completion.stopped is None
    if completion.stopped is None:
        assert count == len(tokens)
    else:
        decoded = b"".join(TABLE[token] for token in tokens[:count]).decode("utf-8", "replace")
        assert completion.stopped in decoded
        assert completion.push([0, 1]) == ""
        assert completion.tokens == count


@settings(max_examples=200)
@given(tokens_, stops_)
def test_text_leaves_as_soon_as_it_is_certain(tokens, stops):
    stream, completion, text, output = Detokenizer(TABLE), CompletionText(Detokenizer(TABLE), stops), "", ""
    for token in tokens:
        text += stream.push(token)
        output += completion.push([token])
        if completion.stopped is not None:
            return
        assert output == text[: len(text) - undecided(text, stops)]
