"""PrefixCache: within its bound the last used stay, and of a prompt the last chunk leaves first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.inference.prefix_cache import PrefixCache, chunk_key, root_key

SIZE = 24  # bytes of every chunk here


def chunk(value: float) -> dict[str, np.ndarray]:
    return {"k": np.full(4, value, np.float32), "v": np.full(2, value, np.float32)}


def names(prompt: str) -> list[bytes]:
    """The names of a prompt's chunks, a letter each."""
    keys = [root_key("")]
    for letter in prompt:
        keys.append(chunk_key(keys[-1], (ord(letter),)))
    return keys[1:]


def prefill(cache: PrefixCache, prompt: str) -> str:
    """Prefills a prompt as slots do, puts what was not in the cache there, and returns the letters
    that were.
    """
    hits, before = "", None
    for letter, key in zip(prompt, names(prompt)):
        cached = cache.get(key)
        if cached is None:
            cache.put(key, chunk(ord(letter)), before)
        else:
            assert cached["v"].tolist() == [ord(letter)] * 2
            hits += letter
        before = key
    return hits


def test_a_prompt_is_found_as_far_as_it_is_the_same_from_its_start():
    cache = PrefixCache(100 * SIZE)
    assert [prefill(cache, prompt) for prompt in ("abc", "abc", "abd", "bc", "abdx")] == [
        "",
        "abc",
        "ab",
        "",
        "abd",
    ]


def test_the_name_of_a_chunk_says_everything_before_it_and_where_chunks_end():
    keys = {
        "ab|c": chunk_key(chunk_key(root_key(""), (1, 2)), (3,)),
        "a|bc": chunk_key(chunk_key(root_key(""), (1,)), (2, 3)),
        "abc": chunk_key(root_key(""), (1, 2, 3)),
        "abc of k": chunk_key(root_key("k"), (1, 2, 3)),
        "0abc": chunk_key(root_key(""), (0, 1, 2, 3)),
        "none": root_key(""),
        "none of k": root_key("k"),
        "half a character": root_key("\ud800"),
    }
    assert len(set(keys.values())) == len(keys)


@given(st.lists(st.text("abc", min_size=1, max_size=6), max_size=40), st.integers(0, 7 * SIZE))
def test_it_never_holds_more_than_it_may_and_nothing_that_cannot_be_found(prompts, limit):
    cache = PrefixCache(limit)
    for prompt in prompts:
        prefill(cache, prompt)
        assert cache.bytes <= limit
        again = len(prefill(cache, prompt))
        assert again == min(len(prompt), limit // SIZE), (
            "what was read last is kept, as much of it as there is room for"
        )
    size = cache.bytes
    cache.put(b"larger than all there is room for", np.zeros(100), None)
    assert cache.bytes == size, "it is not kept, and drives no other out"
    for before, key in ((None, names("z")[0]), (b"unknown", names("zz")[1])):
        cache.put(key, chunk(0), before)
    assert cache.get(names("zz")[1]) is None
    reachable = {key for prompt in prompts for key in names(prompt)} | set(names("z"))
    assert SIZE * sum(cache.get(key) is not None for key in reachable) == cache.bytes


def test_a_chunk_is_found_by_its_beginnings_as_long_as_it_is_there():
    cache = PrefixCache(2 * SIZE)
    cache.put(b"abc", chunk(1), None, [b"ab", b"a"])
    cache.put(b"abd", chunk(2), None, [b"ab"])
    assert [cache.get(key)["v"][0] for key in (b"abd", b"ab", b"abc", b"a")] == [2, 2, 1, 1]
    cache.put(b"x", chunk(3), None)
    assert [cache.get(key) is not None for key in (b"abc", b"a", b"abd", b"ab", b"x")] == [
        True,
        True,
        False,
        False,
        True,
    ]
    for key in (b"y", b"z"):  # drives the other chunk that began with "ab" out too
        cache.put(key, chunk(4), None)
    assert [cache.get(key) is not None for key in (b"abc", b"a", b"ab", b"x", b"y", b"z")] == [False] * 4 + [
        True
    ] * 2


def test_what_was_used_longest_ago_leaves_first():
    cache = PrefixCache(4 * SIZE)
    assert [prefill(cache, prompt) for prompt in ("ab", "xy", "ab", "q", "ab", "xy")] == [
        "",
        "",
        "ab",
        "",
        "ab",
        "x",
    ]
    assert cache.bytes == 4 * SIZE
