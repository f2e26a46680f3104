"""A claim's verdict follows from numbers: other numbers, another verdict; and none where they do not decide it."""

from hypothesis import given
from hypothesis import strategies as st

from bench.stages.claims import CLAIMS, MANY, Evidence, claims
from bench.timing import Timing
from engine.format import times

STATE = ("0x1p+0", "ab")
LEARNING = {
    "letters": 12000,
    "pretrained": 300000,
    "readings": [1, 4, 16],
    "text": [2.1, 1.8, 0.8],
    "other": [2.3, 2.1, 2.6],
    "over": {"ratio": 1.25, "low": 1.22, "high": 1.28, "rounds": 75},
    "moved": {
        stage: {"all weights": share} for stage, share in {"pre-training": 0.2, "1": 0.03, "16": 0.15}.items()
    },
}
CHECKS = {
    "learning": LEARNING,
    "changed_answers": 0,
    "generated": 100,
    "before": STATE,
    "after": STATE,
    "int8_error": 0.01,
}


def row(name, stage, weights, forward, dx, dw, seconds):
    total = forward + dx + dw
    return {
        "name": name,
        "stage": stage,
        "weights": weights,
        "seconds_per_token": seconds,
        "flops_per_token": {
            "formula": total,
            "forward": forward,
            "dx": dx,
            "dw": dw,
            "optimizer": total / 500,
        },
        "peak_bytes": 3 * dw + 150,
        "flop_ratio_to_forward": total / 100,
        "time_ratio_to_forward": seconds / 1e-5,
    }


ROWS = [
    row("pre-training step", "training", "changed", 100, 100, 100, 3e-5),
    row("full fine-tuning", "fine-tuning", "changed", 100, 100, 100, 3e-5),
    row("bottom half frozen", "fine-tuning", "partly", 100, 50, 50, 2e-5),
    row("top half frozen", "fine-tuning", "partly", 100, 100, 50, 2.5e-5),
    row("last layer", "fine-tuning", "partly", 100, 20, 20, 1.3e-5),
    row("LoRA rank 8 on q and v", "fine-tuning", "partly", 101, 100, 1, 2e-5),
    row("evaluation forward", "inference", "identical", 100, 0, 0, 1e-5),
    row("chunked prefill into a slot", "inference", "identical", 90, 0, 0, 1e-5),
    row("prefix-cache hit", "inference", "identical", 0, 0, 0, 1e-7),
    row("decode alone", "decode", "identical", 200, 0, 0, 5e-5),
    row("decode with 8 slots", "decode", "identical", 100, 0, 0, 2e-5),
    row("decode with 32 slots", "decode", "identical", 100, 0, 0, 1e-5),
    row("decode with 8, int8 weights", "decode", "identical", 100, 0, 0, 1e-5),
    row("decode with 32, int8 weights", "decode", "identical", 100, 0, 0, 5e-6),
]
NAMES = [entry["name"] for entry in ROWS] + ["uncached"]


def judged(rows, timings, checks):
    """The claims by the names of their functions."""
    named = {row["name"]: row for row in rows}
    evidence = Evidence(
        "bench",
        named,
        timings,
        params=10**6,
        price=0.1,
        uncached_tokens=64,
        bytes_per_weight=2,
        **CHECKS | checks,
    )
    return {CLAIMS[claim["claim"]].__name__: claim for claim in claims(evidence)}


def verdicts(rows=ROWS, noisy=None, **checks):
    """The verdicts, where all rounds of a row are alike, but for `noisy`, whose rounds are
    anything.
    """
    seconds = {row["name"]: row["seconds_per_token"] for row in rows} | {"uncached": 0.1}
    noise = lambda name: [10.0 ** (place % 7 - 3) if name == noisy else 1.0 for place in range(7)]
    timings = {name: Timing(tuple(each * factor for factor in noise(name))) for name, each in seconds.items()}
    return {name: claim["verdict"] for name, claim in judged(rows, timings, checks).items()}


def with_seconds(**changes):
    """The rows, of which those whose names begin so take other seconds."""
    of = lambda entry: next(
        (value for name, value in changes.items() if entry["name"].startswith(name.replace("_", " "))), None
    )
    return [entry if of(entry) is None else dict(entry, seconds_per_token=of(entry)) for entry in ROWS]


def test_the_usual_numbers_give_the_usual_verdicts():
    result = verdicts()
    assert len(result) == 24
    usual = {
        "half": "false: a third",
        "generated_cheaper": "false for a lone request",
        "some_layers": "partly: it matters which",
        "six": "false",
        "updates": "false",
        "request": "true for one",
        "fortune": "true here, for a model like GPT-2",
        "readings": "false: it learns it by heart",
        "moved": "partly: if it reads its text once",
        "life": "partly: after 60.0 million tokens served",
        "last_layers": "false",
        "more_slots": "false: less",
    }
    usual |= {"costs": "true: the data are fewer", "learns": "false"}
    assert result == dict.fromkeys(result, "true") | usual


def test_bits_that_differ_and_weights_that_move_in_inference_are_a_defect():
    changed = verdicts(changed_answers=1, after=("0x1p+0", "cd"))
    assert changed["independent"].startswith("false")
    assert changed["learns"].startswith("true")
    moved = [
        dict(entry, weights="partly") if entry["name"] == "decode with 8 slots" else entry for entry in ROWS
    ]
    result = verdicts(moved)
    assert result["weights"].startswith("false")


def test_a_time_that_varies_widely_decides_nothing():
    result = verdicts(noisy="decode alone")
    assert result["batching"].startswith("undecided on this machine: ")
    assert result["batching"].endswith("may lie on either side of 1.25")
    assert result["generated_cheaper"].startswith("undecided")
    assert verdicts(noisy="decode with 8 slots")["request"].startswith("undecided")
    assert result["quantisation"] == "true", "its rows are others"


def test_what_is_learned_is_judged_by_errors_and_by_distances():
    over = {"ratio": 1.01, "low": 0.98, "high": 1.04, "rounds": 75}
    assert verdicts(learning=LEARNING | {"over": over})["readings"].startswith("undecided")
    for once, many, verdict in ((0.01, 0.05, "true"), (0.15, 0.3, "false here")):
        shares = {"1": {"all weights": once}, "16": {"all weights": many}}
        assert verdicts(learning=LEARNING | {"moved": LEARNING["moved"] | shares})["moved"] == verdict


def test_of_two_gains_none_is_the_one_that_counts():
    assert verdicts(with_seconds(decode_with_32_slots=5.5e-6))["quantisation"] == (
        "partly: among 8 true; among 32 partly: little for this model here"
    )
    one_noisy = verdicts(noisy="decode with 32, int8 weights")["quantisation"]
    assert one_noisy.startswith("undecided on this machine: ")
    assert one_noisy.endswith("(among 32)")


@given(st.dictionaries(st.sampled_from(NAMES), st.lists(st.floats(1e-6, 1e-3), min_size=7, max_size=7)))
def test_no_verdict_lies_within_an_interval_and_every_ratio_printed_is_the_one_that_was_judged(rounds):
    steady = {entry["name"]: [entry["seconds_per_token"]] * 7 for entry in ROWS} | {"uncached": [0.1] * 7}
    timings = {name: Timing(tuple(each)) for name, each in (steady | rounds).items()}
    rows = [dict(entry, seconds_per_token=timings[entry["name"]].median) for entry in ROWS]
    result = judged(rows, timings, {})
    for name, numbers, thresholds in (
        ("generated_cheaper", "time", [1]),
        ("caching", "off_over_on", [1.25, 1.02]),
        ("batching", "off_over_on", [1.25, 1.02]),
        ("prefix_cache", "off_over_on", [1.25, 1.02]),
        ("costs", "share", [0.1]),
        ("request", "requests", [MANY]),
    ):
        claim = result[name]
        assert claim["verdict"].startswith("undecided") != is_decided(
            claim["numbers"][numbers], thresholds
        ), claim
    for name, numbers in (
        ("generated_cheaper", "time"),
        ("caching", "off_over_on"),
        ("batching", "off_over_on"),
    ):
        of = result[name]["numbers"][numbers]
        assert f"{times(of['ratio'])} ({times(of['low'])} to {times(of['high'])})" in result[name]["value"]


def is_decided(over: dict[str, float], thresholds: list[float]) -> bool:
    """Whether a ratio lies clearly on one side of the first threshold, or clearly below it and so
    of the next.
    """
    for threshold in thresholds:
        if over["low"] <= threshold <= over["high"]:
            return False
        if over["ratio"] > threshold:
            return True
    return True


def test_a_claim_whose_rows_are_missing_is_left_out():
    result = verdicts(
        [entry for entry in ROWS if not entry["name"].startswith(("LoRA", "decode"))], learning={}
    )
    assert result.keys().isdisjoint({"batching", "readings", "moved"})
    assert "half_of_backward" in result
