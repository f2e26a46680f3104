"""Explains why a row's time or peak memory differs from its prediction, with sentences from explanations.toml."""

from bench.table.row import Row
from bench.table.sentences import read_templates, render
from engine.counting.hardware import Ceilings

TOLERANCE = 0.15  # of the predicted ratio
TEXTS: dict[str, str] = read_templates("explanations")


def explain_time(
    row: Row, seconds: float, forward: Row, forward_seconds: float, ceilings: Ceilings, products_seconds: float | None = None
) -> str | None:
    """Explains a row's time over the forward pass's where it is off the ratio of FLOPs by more than 15%, else None.

    `seconds` are those of a token, `products_seconds` those of its products with weights alone.
    """
    flops, forward_flops = (_product_flops(each) / each.tokens for each in (row, forward))
    if not flops:
        return render(TEXTS["copies"], {"row": row})
    if abs(seconds / forward_seconds / (flops / forward_flops) - 1) <= TOLERANCE:
        return None
    if row.stage == "decode":
        return _explain_decode(row, seconds, ceilings, products_seconds or 0.0)
    own, other = (ceilings.peak_flops(each.dtype) for each in (row, forward))
    return render(
        TEXTS["passes" if row.walker else "by_hand"],
        {
            "row": row, "seconds": seconds, "ceiling": own, "share": flops / seconds / own,
            "forward": forward, "forward_ceiling": other, "forward_share": forward_flops / forward_seconds / other,
            "optimizer": 28 * (row.memory.get("gradients", 0) // 4) / (1e9 * ceilings.update_gbs),
        },
    )  # fmt: skip


def explain_peak(row: Row) -> str | None:
    """Explains a peak of memory that is off the prediction by more than 15%, else None."""
    predicted, peak = sum(row.memory.values()), row.peak_bytes
    if not predicted or peak is None or abs(peak / predicted - 1) <= TOLERANCE:
        return None
    return render(TEXTS["smaller_peak" if peak < predicted else "larger_peak"], {"off": abs(peak - predicted)})


def _explain_decode(row: Row, seconds: float, ceilings: Ceilings, products_seconds: float) -> str:
    slots = row.slots or 1
    steps, step, products = row.tokens // slots, seconds * slots, products_seconds * slots
    reading = row.traffic / steps / (1e9 * ceilings.read_gbs)
    bound = "products of few rows" if products >= step / 2 else "its caches and all that lies between products"
    return render(TEXTS["decode"], {
        "bound": "memory" if reading >= step / 2 else bound, "slots": slots, "step": step, "products": products,
        "step_bytes": row.traffic / steps, "reading": reading,
        "multiplying": _product_flops(row) / steps / ceilings.peak_flops(row.dtype),
    })  # fmt: skip


def _product_flops(row: Row) -> int:
    """Returns the operations of a call's products, as the program computes them where that is known."""
    return row.walker.matmul if row.walker else row.formula.total
