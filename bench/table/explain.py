"""Explains in words with numbers why a row takes another time than its FLOPs say, and other memory than predicted."""

from bench.table.row import Row
from engine.counting.hardware import Ceilings
from engine.format import si

TOLERATED = 0.15  # of the predicted ratio


def ceiling(row: Row, ceilings: Ceilings) -> float:
    """Returns the FLOP/s this machine reached in the type the row multiplies."""
    rates = {"bfloat16": ceilings.bf16_gflops, "float32": ceilings.f32_gflops, "int8": ceilings.int8_gflops}
    return 1e9 * rates[row.dtype]


def product_flops(row: Row) -> int:
    """Returns the operations of a call's products, as the program does them where that is known."""
    return row.walker.matmul if row.walker else row.formula.total


def explain_time(
    row: Row, seconds: float, forward: Row, forward_seconds: float, ceilings: Ceilings, alone: float | None = None
) -> str | None:
    """Explains a row's time where, as a multiple of the forward pass's, it is off its FLOPs by more than 15%, else None.

    `seconds` are those of a token, `alone` those of a token's products with weights by themselves. The words follow from
    the row's own numbers.
    """
    flops = product_flops(row) / row.tokens / (product_flops(forward) / forward.tokens)
    if not flops:
        return f"nothing is multiplied: {si(row.moved / row.tokens, 'B')} a token that were computed before are copied."
    if abs(seconds / forward_seconds / flops - 1) <= TOLERATED:
        return None
    if row.stage == "decode":
        return _decode(row, seconds, ceilings, alone or 0.0)
    return _passes(row, seconds, forward, forward_seconds, ceilings)


def explain_peak(row: Row) -> str | None:
    """Explains a peak of memory that is off the prediction by more than 15%, else None."""
    predicted, peak = sum(row.memory.values()), row.peak_bytes
    if not predicted or peak is None or abs(peak / predicted - 1) <= TOLERATED:
        return None
    if peak < predicted:
        return (
            f"{si(predicted - peak, 'B')} less than predicted. The prediction adds the largest arrays of each part; they need "
            "not be alive at one moment, and then take one another's place."
        )
    return f"{si(peak - predicted, 'B')} more than predicted: copies and intermediate results that the formula does not know."


def _decode(row: Row, seconds: float, ceilings: Ceilings, alone: float) -> str:
    slots = row.slots or 1
    steps, step, multiplying = row.tokens // slots, seconds * slots, alone * slots
    least = row.moved / steps
    reading, ideal = least / (1e9 * ceilings.read_gbs), product_flops(row) / steps / ceiling(row, ceilings)
    bound = "products of few rows" if multiplying >= step / 2 else "its caches and all that lies between products"
    if reading >= step / 2:
        bound = "memory"
    share = f"take {si(multiplying, 's')} of {si(step, 's')}, the rest {si(step - multiplying, 's')}"
    if multiplying >= step:
        share = f"take as long: {si(multiplying, 's')} against {si(step, 's')}"
    return (
        f"bound by {bound}: a step has to read {si(least, 'B')} for {'one token' if slots == 1 else f'{slots} tokens'}, "
        f"{si(reading, 's')} at the speed of memory, and would multiply for {si(ideal, 's')} at the best rate"
        f"{' (twice, for a lone row is padded to two)' if slots == 1 else ''}; its products with weights, alone, {share}."
    )


def _passes(row: Row, seconds: float, forward: Row, forward_seconds: float, ceilings: Ceilings) -> str:
    share = lambda row, seconds: f"{100 * product_flops(row) / row.tokens / seconds / ceiling(row, ceilings):.0f}%"
    forward_share = share(forward, forward_seconds)
    if row.walker is None:
        own, other = ceiling(row, ceilings), ceiling(forward, ceilings)
        return (
            f"NumPy multiplies in {row.dtype}, at {own / 1e9:.0f} GFLOP/s at most here against {other / 1e9:.0f} in "
            f"{forward.dtype}, and reaches {share(row, seconds)} of that (the forward pass {forward_share} of its own)."
        )
    parts = [
        f"its products run at {share(row, seconds)} of what this machine multiplies, the forward pass's at {forward_share}"
    ]
    if row.xla and forward.xla:
        moved, forward_moved = (si(each.xla.bytes_accessed / each.tokens, "B") for each in (row, forward) if each.xla)
        parts.append(f"as compiled it moves {moved} a token, the forward pass {forward_moved}")
    if row.update:
        trainable = row.memory.get("gradients", 0) // 4
        moving = 28 * trainable / (1e9 * ceilings.update_gbs)
        parts.append(f"the optimizer moves 28 bytes a trainable weight, {si(moving, 's')} of {si(seconds * row.tokens, 's')}")
    return "; ".join(parts) + "."
