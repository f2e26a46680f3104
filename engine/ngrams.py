"""NGrams: what a model says after the last one to three tokens, counted in its own answers.

    ngrams = count_ngrams(answers, vocab)
    ngrams.next_token([17, 4, 99])   # (312, 0.64): token 312 follows, as it did in 64 of 100 such places

They draft tokens for speculative decoding without a program of the device (as REST does, He et al. 2024, 2311.08252). An
entry's chance is no share of its counts, by which whatever was seen once is certain: entries with like counts and shares are
measured together, in answers that were left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LENGTHS = (1, 2, 3)  # of the context of an entry, in tokens
FOLDS = 4  # of the answers, each left out once
Answers = Sequence[tuple[Sequence[int], int]]  # token ids of a prompt and its answer, and the number of the prompt's
COUNTS, SHARES = 5, 4  # ranks of entries: by the logarithm of how often, and by the share of the commonest token


class NGrams(NamedTuple):
    """Entries in the order of `keys`, one for each context of 1 to 3 tokens.

    keys (E,) uint64: the context, as digits of base `vocab` + 1; tokens (E,) int32: what follows it most often; chances (E,)
    float32: how often that comes true. `answer_seconds`: what the answers took.
    """

    vocab: int
    keys: np.ndarray
    tokens: np.ndarray
    chances: np.ndarray
    answer_seconds: float | None = None

    @classmethod
    def from_contexts(
        cls, vocab: int, contexts: np.ndarray, tokens: np.ndarray, chances: np.ndarray, answer_seconds: float | None = None
    ) -> "NGrams":
        """Makes it of contexts (3, E), the last token first and -1 where there is none, and what follows each."""
        keys = sum(
            (context.astype(np.int64) + 1).astype(np.uint64) * np.uint64((vocab + 1) ** place)
            for place, context in enumerate(contexts)
        )
        order = np.argsort(keys)
        return cls(vocab, keys[order], tokens[order].astype(np.int32), chances[order].astype(np.float32), answer_seconds)

    def contexts(self) -> list[np.ndarray]:
        """Returns the contexts, (3, E), as `from_contexts` takes them."""
        base = np.uint64(self.vocab + 1)
        return [(self.keys // base ** np.uint64(place) % base).astype(np.int64) - 1 for place in range(len(LENGTHS))]

    def next_token(self, text: Sequence[int]) -> tuple[int, float] | None:
        """Returns the token that follows the end of a text, by the entry that comes true most often, and how often."""
        key, power, keys = 0, 1, []
        for token in text[: -len(LENGTHS) - 1 : -1]:
            key += (token + 1) * power
            power *= self.vocab + 1
            keys.append(key)
        wanted = np.array(keys, np.uint64)
        places = np.minimum(self.keys.searchsorted(wanted), len(self.keys) - 1)
        places = places[self.keys[places] == wanted]
        if not len(places):
            return None
        best = places[self.chances[places].argmax()]
        return int(self.tokens[best]), float(self.chances[best])


def count_ngrams(answers: Answers, vocab: int) -> NGrams:
    """Counts which token follows which in the answers, of at least 1 token, to prompts of at least 1, of a model with `vocab`
    tokens, fewer than 2 million. There must be at least FOLDS answers."""
    good, seen = (np.full((len(LENGTHS), COUNTS, SHARES + 1), prior) for prior in (0.1, 2.0))
    for fold in range(FOLDS):
        # In one piece: answers to the same question stand beside each other.
        begin, end = (len(answers) * edge // FOLDS for edge in (fold, fold + 1))
        entries = _most_common(*_places([*answers[:begin], *answers[end:]], vocab))
        keys, tokens, _ = _places(answers[begin:end], vocab)
        at = np.minimum(entries.keys.searchsorted(keys), len(entries.keys) - 1)
        known = entries.keys[at] == keys
        rank = tuple(side[at[known]] for side in entries.rank)
        np.add.at(seen, rank, 1)
        np.add.at(good, rank, entries.tokens[at[known]] == tokens[known])
    entries = _most_common(*_places(answers, vocab))
    return NGrams(vocab, entries.keys, entries.tokens, (good / seen)[entries.rank].astype(np.float32))


class _Entries(NamedTuple):
    keys: np.ndarray
    tokens: np.ndarray
    rank: tuple[np.ndarray, ...]  # (E,) of length, count and share


def _places(answers: Answers, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns every context in answers, of each length: its key, the token behind it, and which length it has."""
    keys, tokens, lengths = [], [], []
    for text, start in answers:
        ids = np.asarray(text, np.uint64)
        key = np.zeros(len(ids), np.uint64)
        for place, length in enumerate(LENGTHS):
            # key[i] is that of the `length` tokens before token i.
            key[length:] += (ids[: max(len(ids) - length, 0)] + np.uint64(1)) * np.uint64((vocab + 1) ** (length - 1))
            begin = min(max(start, length), len(ids))
            keys.append(key[begin:].copy())
            tokens.append(ids[begin:].astype(np.int32))
            lengths.append(np.full(len(ids) - begin, place))
    return np.concatenate(keys), np.concatenate(tokens), np.concatenate(lengths)


def _most_common(keys: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> _Entries:
    """Returns for each key the token that stands behind it most often; of several, the least."""
    order = np.lexsort((tokens, keys))
    keys, tokens, lengths = keys[order], tokens[order], lengths[order]
    first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]) | (tokens[1:] != tokens[:-1])])  # of each pair
    counts = np.diff(np.r_[first, len(keys)])
    keys, tokens, lengths = keys[first], tokens[first], lengths[first]
    begin = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])  # of each key, among the pairs
    total = np.add.reduceat(counts, begin)
    order = np.lexsort((-counts, keys))
    best = order[begin]
    share = SHARES * counts[best] // total
    rank = lengths[best], np.minimum(np.log2(counts[best]).astype(int), COUNTS - 1), share
    return _Entries(keys[best], tokens[best], rank)
