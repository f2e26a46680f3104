"""A made-up stage table with every kind of row: the shape of what `python -m bench` measures, not a measurement."""

from typing import Any

WEIGHTS = 3_700_000  # that take part in a product
READ = 26e9  # bytes a second
RATE = 415e9  # bfloat16 operations a second
FORWARD = 2 * WEIGHTS + 4 * 4 * 256 * 128  # the attention of 4 layers, 256 wide, over 128 tokens at the median

# name, stage, weights, (dX, dW, optimizer) in forward passes, the time in forward passes, its spread, memory in MB, why
STEPS: list[tuple[str, str, str, tuple[float, float, float], float, tuple[float, float, float, float, float], str | None]] = [
    ("pre-training step", "training", "changed", (1, 1, 0.004), 3.12, (14.8, 14.8, 29.6, 141, 0), None),
    ("full fine-tuning", "fine-tuning", "changed", (1, 1, 0.004), 3.10, (14.8, 14.8, 29.6, 141, 0), None),
    ("bottom half frozen", "fine-tuning", "partly", (0.5, 0.5, 0.002), 2.02, (14.8, 8.1, 16.2, 77, 0), None),
    ("top half frozen", "fine-tuning", "partly", (0.98, 0.5, 0.002), 2.61, (14.8, 6.7, 13.4, 139, 0), None),
    ("last layer", "fine-tuning", "partly", (0.21, 0.21, 0.001), 1.49, (14.8, 3.0, 6.0, 44, 0), None),
    ("head only", "fine-tuning", "partly", (0, 0.14, 0.0006), 1.17, (14.8, 2.1, 4.2, 9.4, 0), None),
    (
        "LoRA, rank 8", "fine-tuning", "partly", (1, 0.06, 0.0002), 2.48, (14.8, 0.4, 0.8, 146, 0),
        "The adapters' products are 8 wide: each costs a call of its own and keeps the multiplier idle.",
    ),
    ("preference pairs", "fine-tuning", "changed", (1, 1, 0.004), 4.21, (29.6, 14.8, 29.6, 152, 0),
     "The frozen reference runs too."),
    ("evaluation forward", "inference", "identical", (0, 0, 0), 1.0, (7.4, 0, 0, 21, 0), None),
    ("prefill", "inference", "identical", (0, 0, 0), 1.04, (7.4, 0, 0, 12, 2.1), None),
]  # fmt: skip


FORWARD_SECONDS = 31.4e-6
HOLDS = ("params", "gradients", "optimizer", "activations", "cache")


def _row(
    name: str,
    stage: str,
    weights: str,
    backward: tuple[float, float, float],
    ratio: float,
    memory: tuple[float, ...],
    why: str | None,
) -> dict[str, Any]:
    dx, dw, optimizer = (part * FORWARD for part in backward)
    total, seconds = FORWARD + dx + dw, FORWARD_SECONDS * ratio
    return {
        "name": name, "stage": stage, "weights": weights,
        "flops_per_token": {
            "formula": total, "walker": total, "walker_elementwise": 0.06 * total, "xla": 1.043 * total,
            "forward": FORWARD, "dx": dx, "dw": dw, "optimizer": optimizer,
        },
        "flop_ratio_to_forward": total / FORWARD,
        "seconds_per_token": seconds, "spread": 0.03 * seconds,
        "predicted_seconds_per_token": FORWARD_SECONDS * total / FORWARD,
        "time_ratio_to_forward": ratio, "time_ratio_spread": None if ratio == 1 else 0.03 * ratio,
        "peak_bytes": int(1.06e6 * sum(memory)), "memory": {name: int(1e6 * size) for name, size in zip(HOLDS, memory)},
        "bytes_per_token": 1e6 * sum(memory) / 4096, "tokens_per_call": 4096, "slots": None, "series": None,
        "utilisation": total / seconds / RATE, "utilisation_of": "MFU",
        "usd_per_million_tokens": seconds * 1e6 / 3600, "explanation": why,
    }  # fmt: skip


def _decode(slots: int, seconds: float, why: str | None, series: str | None = None) -> dict[str, Any]:
    shared = WEIGHTS if series else 2 * WEIGHTS
    moved = shared / slots + 260_000
    return {
        "name": f"decode, {slots}, int8 weights" if series else f"decode, {slots} slot{'s' * (slots > 1)}",
        "stage": "decode", "weights": "identical",
        "flops_per_token": {
            "formula": FORWARD, "walker": FORWARD, "walker_elementwise": 0.09 * FORWARD, "xla": None,
            "forward": FORWARD, "dx": 0, "dw": 0, "optimizer": 0,
        },
        "flop_ratio_to_forward": 1.0, "seconds_per_token": seconds, "spread": 0.05 * seconds,
        "predicted_seconds_per_token": FORWARD_SECONDS,
        "time_ratio_to_forward": seconds / FORWARD_SECONDS, "time_ratio_spread": 0.06 * seconds / FORWARD_SECONDS,
        "peak_bytes": int(8.1e6 + 0.55e6 * slots),
        "memory": {"params": shared, "cache": 520_000 * slots, "activations": 200_000},
        "bytes_per_token": moved, "tokens_per_call": 32 * slots, "slots": slots, "series": series,
        "utilisation": moved / seconds / READ, "utilisation_of": "MBU",
        "usd_per_million_tokens": seconds * 1e6 / 3600, "explanation": why,
    }  # fmt: skip


def _by_hand(name: str, backward: float, seconds: float) -> dict[str, Any]:
    return {
        "name": name, "stage": "by hand", "weights": "changed" if backward else "identical",
        "flops_per_token": {
            "formula": FORWARD * (1 + backward), "walker": None, "walker_elementwise": None, "xla": None,
            "forward": FORWARD, "dx": FORWARD * backward / 2, "dw": FORWARD * backward / 2, "optimizer": 0,
        },
        "flop_ratio_to_forward": 1 + backward, "seconds_per_token": seconds, "spread": 0.02 * seconds,
        "predicted_seconds_per_token": FORWARD_SECONDS * (1 + backward), "time_ratio_to_forward": seconds / FORWARD_SECONDS,
        "time_ratio_spread": None, "peak_bytes": None, "memory": {}, "bytes_per_token": None, "tokens_per_call": 256,
        "slots": None, "utilisation": FORWARD * (1 + backward) / seconds / 209e9, "utilisation_of": "MFU",
        "usd_per_million_tokens": seconds * 1e6 / 3600, "explanation": "NumPy multiplies in float32, at half the rate.",
    }  # fmt: skip


def document() -> dict[str, Any]:
    """A new document each time, so that a test may change it."""
    alone = "Too small to be memory-bound: 140 calls of a kernel for each token cost more than reading 7.4 MB of weights."
    rows = [_row(*step) for step in STEPS]
    rows += [
        _decode(1, 612e-6, alone),
        _decode(8, 96e-6, "The same calls, shared by 8 requests: still above what the bytes alone would take."),
        _decode(32, 41.5e-6, "Reading the cache of 32 requests."),
        _decode(8, 71e-6, "The same calls, on half the bytes.", "int8 weights"),
    ]
    rows += [_by_hand("by hand, forward", 0, 96e-6), _by_hand("by hand, forward and backward", 2.0, 318e-6)]
    return {
        "machine": {"device": "AMD EPYC 9R14", "backend": "cpu", "cores": 2, "jax": "0.12.0"},
        "model": {
            "name": "demo", "params": 4_224_000, "layers": 4, "width": 256, "batch": 16, "context": 256, "dtype": "bfloat16",
        },
        "ceilings": {"bf16_gflops": 415.0, "f32_gflops": 209.0, "int8_gflops": 290.0, "read_gbs": 26.0, "update_gbs": 17.5},
        "rows": rows,
        "claims": [
            {
                "claim": "Inference is half the computation.", "verdict": "false, a third",
                "value": "A training step is 3.00 forward passes of products. Half is right for the backward pass alone (0.50) "
                "and about right for a LoRA step (0.49).",
            },
            {
                "claim": "A token is cheaper to generate than to train on.", "verdict": "false for a lone request",
                "numbers": {"time": 6.3},
                "value": "612 µs decoded alone, 98 µs trained, 41.5 µs decoded among 32: 6.2 and 0.42 times.",
            },
            {
                "claim": "Fine-tuning is cheaper because only some layers are updated.", "verdict": "true from the top",
                "value": "Freezing the bottom half leaves 2.00 forward passes; freezing the top half 2.48: the gradient must "
                "still pass through it.",
            },
            {
                "claim": "Weights change in training, partly in fine-tuning, never in inference.", "verdict": "true",
                "value": "SHA-256 of every leaf before and after each row: 2 changed, 6 partly, 6 identical.",
            },
            {"claim": "Requests are independent.", "verdict": "true", "value": "0 of 9 outputs differ, alone or in any slot."},
            {"claim": "The model improves as you use it.", "verdict": "false", "value": 0},
            {"claim": "Caching, batching and quantisation decide the price of serving.", "verdict": "true", "value": None},
        ],
        "price_per_hour": 1.0, "rounds": 9, "seconds": 118.3,
        "command": "python -m bench --preset demo --price 1.00 --out report",
        "noise": "The middle half of 9 interleaved rounds spans 6% of the median at worst: some noise: trust the ratios first.",
    }  # fmt: skip
