"""Why a row takes another time than its FLOPs say: the parts of its cost that are not products, in words with numbers."""

from bench.table.row import Row
from engine.counting.hardware import Ceilings
from engine.format import si

TOLERATED = 0.15  # of the predicted ratio


def ceiling(row: Row, ceilings: Ceilings) -> float:
    """FLOP/s this machine reached in the type the row multiplies."""
    rates = {"bfloat16": ceilings.bf16_gflops, "float32": ceilings.f32_gflops, "int8": ceilings.int8_gflops}
    return 1e9 * rates[row.dtype]


def products(row: Row) -> int:
    """The operations of a call's products, as the program does them where that is known."""
    return row.walker.matmul if row.walker else row.formula.total


def why(
    row: Row, seconds: float, forward: Row, forward_seconds: float, ceilings: Ceilings, alone: float | None = None
) -> str | None:
    """Words for a row whose time, as a multiple of the forward pass's, is off its FLOPs by more than 15%, else None.

    `seconds` are those of a token, `alone` what a token's products with weights take by themselves. What is said follows
    from the row's own numbers.
    """
    flops = products(row) / row.tokens / (products(forward) / forward.tokens)
    if not flops:
        return f"nothing is multiplied: {si(row.moved / row.tokens, 'B')} a token that were computed before are copied."
    off = seconds / forward_seconds / flops - 1
    if abs(off) <= TOLERATED:
        return None
    if row.stage == "decode":
        return _decode(row, seconds, ceilings, alone or 0.0)
    return _passes(row, seconds, forward, forward_seconds, ceilings)


def why_peak(row: Row) -> str | None:
    """Words for a peak of memory that is off what was predicted by more than 15%, else None."""
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
    steps, taken, multiplying = row.tokens // slots, seconds * slots, alone * slots
    least = row.moved / steps
    reading, ideal = least / (1e9 * ceilings.read_gbs), products(row) / steps / ceiling(row, ceilings)
    bound = "its caches and all that lies between products"
    if reading >= taken / 2:
        bound = "memory"
    elif multiplying >= taken / 2:
        bound = "products of few rows"
    share = f"take {si(multiplying, 's')} of {si(taken, 's')}, the rest {si(taken - multiplying, 's')}"
    if multiplying >= taken:
        share = f"take as long: {si(multiplying, 's')} against {si(taken, 's')}"
    return (
        f"bound by {bound}: a step has to read {si(least, 'B')} for {'one token' if slots == 1 else f'{slots} tokens'}, "
        f"{si(reading, 's')} at the speed of memory, and would multiply for {si(ideal, 's')} at the best rate"
        f"{' (twice, for a lone row is padded to two)' if slots == 1 else ''}; its products with weights, alone, {share}."
    )


def _passes(row: Row, seconds: float, forward: Row, forward_seconds: float, ceilings: Ceilings) -> str:
    share = lambda row, seconds: f"{100 * products(row) / row.tokens / seconds / ceiling(row, ceilings):.0f}%"
    ahead = share(forward, forward_seconds)
    if row.walker is None:
        own, other = ceiling(row, ceilings), ceiling(forward, ceilings)
        return (
            f"NumPy multiplies in {row.dtype}, at {own / 1e9:.0f} GFLOP/s at most here against {other / 1e9:.0f} in "
            f"{forward.dtype}, and reaches {share(row, seconds)} of that (the forward pass {ahead} of its own)."
        )
    parts = [f"its products run at {share(row, seconds)} of what this machine multiplies, the forward pass's at {ahead}"]
    if row.xla and forward.xla:
        moved, ahead_moved = (si(each.xla.bytes_accessed / each.tokens, "B") for each in (row, forward) if each.xla)
        parts.append(f"as compiled it moves {moved} a token, the forward pass {ahead_moved}")
    if row.update:
        learning = row.memory.get("gradients", 0) // 4
        moving = 28 * learning / (1e9 * ceilings.update_gbs)
        parts.append(f"the optimizer moves 28 bytes a weight that learns, {si(moving, 's')} of {si(seconds * row.tokens, 's')}")
    return "; ".join(parts) + "."
