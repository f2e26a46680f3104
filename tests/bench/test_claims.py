"""A claim's verdict follows from numbers: other numbers, another verdict."""

import dataclasses

from bench.table.claims import Evidence, Invariants, claims

CHECKS = Invariants(
    neighbours=7, same_bits=True, generated=100, bits_before="0x1p+0", bits_after="0x1p+0", digest_before="ab",
    digest_after="ab", int8_error=0.01,
)  # fmt: skip


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
    evidence = Evidence(named, over, checks, params=10**6, price=0.1, uncached=(uncached, 64), weight_bytes=2)
    return {claim["claim"]: claim["verdict"] for claim in claims(evidence)}


def test_the_usual_numbers_give_the_usual_verdicts():
    result = verdicts()
    assert len(result) == 13
    assert result["Inference is only half the computation of training."] == "false: a third"
    assert result["The backward pass costs about twice the forward pass."] == "true"
    assert result["Half is right for one kind of training: a LoRA step."] == "true"
    assert result["A token is cheaper to generate than to train on."] == "false for a lone request"
    assert result["The KV cache decides what serving costs."] == "true"
    assert result["The prefix cache decides what serving costs."] == "true"
    assert result["Quantisation decides what serving costs."] == "true"


def test_bits_that_differ_are_said_to_be_a_defect():
    result = verdicts(checks=dataclasses.replace(CHECKS, same_bits=False, digest_after="cd"))
    assert result["Requests do not affect one another."].startswith("false here, which is a defect")
    assert result["The model improves as you use it."].startswith("true here, which is a defect")


def test_weights_that_moved_in_inference_are_said_to_be_a_defect():
    moved = [dict(entry, weights="partly") if entry["name"] == "decode with 8 slots" else entry for entry in ROWS]
    result = verdicts(moved)
    assert result["Weights change in training, partly in fine-tuning, never in inference."].startswith("false")


def test_a_fast_lone_stream_and_a_useless_cache_turn_the_verdicts():
    quick = [dict(entry, seconds_per_token=1e-6) if entry["name"] == "decode alone" else entry for entry in ROWS]
    result = verdicts(quick, uncached=1e-6)
    assert result["A token is cheaper to generate than to train on."] == "true here"
    assert result["The KV cache decides what serving costs."].startswith("false")
    assert result["Batching decides what serving costs."].startswith("false")


def test_a_time_that_is_lost_in_noise_decides_nothing():
    result = verdicts(noisy="decode alone")
    assert result["Batching decides what serving costs."].startswith("open")
    assert result["A token is cheaper to generate than to train on."].startswith("open")
    assert result["Quantisation decides what serving costs."] == "true", "its rows are others"


def test_a_claim_whose_rows_are_missing_is_left_out():
    few = [entry for entry in ROWS if not entry["name"].startswith(("LoRA", "decode"))]
    result = verdicts(few)
    assert "Batching decides what serving costs." not in result
    assert "The backward pass costs about twice the forward pass." in result
