"""A claim's verdict follows from numbers: other numbers, another verdict."""

import dataclasses

from bench.table.claims import TEXTS, Evidence, InferenceChecks, claims

STATE = ("0x1p+0", "ab")
CHECKS = InferenceChecks(neighbours=7, same_bits=True, generated=100, before=STATE, after=STATE, int8_error=0.01)


def row(name, stage, weights, forward, dx, dw, seconds):
    total = forward + dx + dw
    return {
        "name": name, "stage": stage, "weights": weights, "seconds_per_token": seconds,
        "flops_per_token": {"formula": total, "forward": forward, "dx": dx, "dw": dw},
        "flop_ratio_to_forward": total / 100, "time_ratio_to_forward": seconds / 1e-5,
    }  # fmt: skip


ROWS = [
    row("pre-training step", "training", "changed", 100, 100, 100, 3e-5),
    row("full fine-tuning", "fine-tuning", "changed", 100, 100, 100, 3e-5),
    row("bottom half frozen", "fine-tuning", "partly", 100, 50, 50, 2e-5),
    row("top half frozen", "fine-tuning", "partly", 100, 100, 50, 2.5e-5),
    row("LoRA rank 8 on q and v", "fine-tuning", "partly", 101, 100, 1, 2e-5),
    row("evaluation forward", "inference", "identical", 100, 0, 0, 1e-5),
    row("chunked prefill into a slot", "inference", "identical", 90, 0, 0, 1e-5),
    row("prefix-cache hit", "inference", "identical", 0, 0, 0, 1e-7),
    row("decode alone", "decode", "identical", 200, 0, 0, 5e-5),
    row("decode with 8 slots", "decode", "identical", 100, 0, 0, 2e-5),
    row("decode with 32 slots", "decode", "identical", 100, 0, 0, 1e-5),
    row("decode with 8, int8 weights", "decode", "identical", 100, 0, 0, 1e-5),
]


def verdicts(rows=ROWS, checks=CHECKS, noisy=None, uncached=0.1):
    named = {row["name"]: row for row in rows}
    seconds = {name: row["seconds_per_token"] for name, row in named.items()} | {"uncached": uncached}
    over = lambda name, other: None if noisy in (name, other) else seconds[name] / seconds[other]
    evidence = Evidence(named, over, checks, params=10**6, price=0.1, uncached=(uncached, 64), bytes_per_weight=2)
    names = {text["claim"]: name for name, text in TEXTS.items()}
    return {names[claim["claim"]]: claim["verdict"] for claim in claims(evidence)}


def test_the_usual_numbers_give_the_usual_verdicts():
    result = verdicts()
    assert len(result) == 13
    usual = {
        "half": "false: a third",
        "generated_cheaper": "false for a lone request",
        "some_layers": "partly: it matters which",
    }
    usual |= {"money": "true: the data are fewer", "learns": "false"}
    assert result == dict.fromkeys(result, "true") | usual


def test_bits_that_differ_are_said_to_be_a_defect():
    result = verdicts(checks=dataclasses.replace(CHECKS, same_bits=False, after=("0x1p+0", "cd")))
    assert result["independent"].startswith("false here, which is a defect")
    assert result["learns"].startswith("true here, which is a defect")


def test_weights_that_moved_in_inference_are_said_to_be_a_defect():
    moved = [dict(entry, weights="partly") if entry["name"] == "decode with 8 slots" else entry for entry in ROWS]
    result = verdicts(moved)
    assert result["weights"].startswith("false")


def test_a_fast_lone_stream_and_a_useless_cache_turn_the_verdicts():
    quick = [dict(entry, seconds_per_token=1e-6) if entry["name"] == "decode alone" else entry for entry in ROWS]
    result = verdicts(quick, uncached=1e-6)
    assert result["generated_cheaper"] == "true here"
    assert result["caching"].startswith("false")
    assert result["batching"].startswith("false")


def test_a_time_that_is_lost_in_noise_decides_nothing():
    result = verdicts(noisy="decode alone")
    assert result["batching"].startswith("open")
    assert result["generated_cheaper"].startswith("open")
    assert result["quantisation"] == "true", "its rows are others"


def test_a_claim_whose_rows_are_missing_is_left_out():
    few = [entry for entry in ROWS if not entry["name"].startswith(("LoRA", "decode"))]
    result = verdicts(few)
    assert "batching" not in result
    assert "half_of_backward" in result
