"""Explains why a row's time or peak memory differs from its prediction."""

from bench.stages.row import Row
from engine.counting.hardware import Ceilings
from engine.format import percent, si

TOLERANCE = 0.15  # of the predicted ratio


def explain_time(
    row: Row, seconds: float, forward: Row, forward_seconds: float, ceilings: Ceilings, products_seconds: float | None = None
) -> str | None:
    """Explains a row's time over the forward pass's where it is off the ratio of FLOPs by more than 15%, else None.

    `seconds` are those of a token, `products_seconds` those of its products with weights alone.
    """
    flops, forward_flops = (_product_flops(each) / each.tokens for each in (row, forward))
    if not flops:
        return f"nothing is multiplied: {si(row.traffic / row.tokens, 'B')} a token that were computed before are copied."
    if abs(seconds / forward_seconds / (flops / forward_flops) - 1) <= TOLERANCE:
        return None
    if row.stage == "decode":
        return _explain_decode(row, seconds, ceilings, products_seconds or 0.0)
    own, other = (ceilings.peak_flops(each.dtype) for each in (row, forward))
    share, forward_share = (percent(number) for number in (flops / seconds / own, forward_flops / forward_seconds / other))
    if not row.walker:
        return (
            f"NumPy multiplies in {row.dtype}, at {own / 1e9:.0f} GFLOP/s at most here against {other / 1e9:.0f} in "
            f"{forward.dtype}, and reaches {share} of that (the forward pass {forward_share} of its own)."
        )
    text = f"its products run at {share} of what this machine multiplies, the forward pass's at {forward_share}"
    if row.xla and forward.xla:
        moved, forward_moved = (si(each.xla.bytes_accessed / each.tokens, "B") for each in (row, forward) if each.xla)
        text += f"; as compiled it moves {moved} a token, the forward pass {forward_moved}"
    if row.update:
        optimizer = 28 * (row.memory.get("gradients", 0) // 4) / (1e9 * ceilings.update_gbs)
        text += f"; the optimizer moves 28 bytes a trainable weight, {si(optimizer, 's')} of {si(seconds * row.tokens, 's')}"
    return f"{text}."


def explain_peak(row: Row) -> str | None:
    """Explains a peak of memory that is off the prediction by more than 15%, else None."""
    predicted, peak = sum(row.memory.values()), row.peak_bytes
    if not predicted or peak is None or abs(peak / predicted - 1) <= TOLERANCE:
        return None
    off = si(abs(peak - predicted), "B")
    if peak > predicted:
        return f"{off} more than predicted: copies and intermediate results that the formula does not know."
    return (
        f"{off} less than predicted. The prediction adds the largest arrays of each part; they need not be alive at one "
        "moment, and then take one another's place."
    )


def _explain_decode(row: Row, seconds: float, ceilings: Ceilings, products_seconds: float) -> str:
    slots = row.slots or 1
    steps, step, products = row.tokens // slots, seconds * slots, products_seconds * slots
    reading = row.traffic / steps / (1e9 * ceilings.read_gbs)
    bound = "products of few rows" if products >= step / 2 else "its caches and all that lies between products"
    bound = "memory" if reading >= step / 2 else bound
    multiplying = si(_product_flops(row) / steps / ceilings.peak_flops(row.dtype), "s")
    alone = f"take as long: {si(products, 's')} against {si(step, 's')}."
    if products < step:
        alone = f"take {si(products, 's')} of {si(step, 's')}, the rest {si(step - products, 's')}."
    return (
        f"bound by {bound}: a step has to read {si(row.traffic / steps, 'B')} for "
        f"{'one token' if slots == 1 else f'{slots} tokens'}, {si(reading, 's')} at the speed of memory, and would multiply "
        f"for {multiplying} at the best rate{' (twice, for a lone row is padded to two)' if slots == 1 else ''}; its products "
        f"with weights, alone, {alone}"
    )


def _product_flops(row: Row) -> int:
    """Returns the operations of a call's products, as the program computes them where that is known."""
    return row.walker.matmul if row.walker else row.formula.total
