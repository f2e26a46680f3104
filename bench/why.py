"""Why a row takes another time than its FLOPs say: the parts of its cost that are not products, in words with numbers."""

from bench.quantities import si
from bench.rows import Row
from engine.counting.hardware import Ceilings

TOLERATED = 0.15  # of the predicted ratio


def ceiling(row: Row, ceilings: Ceilings) -> float:
    """FLOP/s this machine reached in the type the row multiplies."""
    rates = {"bfloat16": ceilings.bf16_gflops, "float32": ceilings.f32_gflops, "int8": ceilings.int8_gflops}
    return 1e9 * rates[row.dtype]


def products(row: Row) -> int:
    """The operations of a call's products, as the program does them where that is known."""
    return row.walker.matmul if row.walker else row.formula.total


def why(row: Row, seconds: float, forward: Row, forward_seconds: float, ceilings: Ceilings) -> str | None:
    """Words for a row whose time, as a multiple of the forward pass's, is off its FLOPs by more than 15%, else None.

    `seconds` are those of a call. What is said follows from the row's own numbers.
    """
    flops = products(row) / row.tokens / (products(forward) / forward.tokens)
    time = seconds / row.tokens / (forward_seconds / forward.tokens)
    off = time / flops - 1
    if abs(off) <= TOLERATED:
        return None
    return _decode(row, seconds, ceilings) if row.stage == "decode" else _passes(row, seconds, forward, ceilings)


def _decode(row: Row, seconds: float, ceilings: Ceilings) -> str:
    reading, multiplying = row.moved / (1e9 * ceilings.read_gbs), products(row) / ceiling(row, ceilings)
    tokens = "one token" if row.slots == 1 else f"{row.slots} tokens"
    steps = row.tokens // (row.slots or 1)
    parts = f"a step reads {si(row.moved / steps, 'B')} for {tokens}, {si(reading / steps, 's')} at the speed of memory, "
    parts += f"and multiplies for {si(multiplying / steps, 's')}"
    if row.slots == 1:
        parts += " (twice, for a lone row is padded to two)"
    rest = seconds - max(reading, multiplying)
    if reading > multiplying and rest < reading:
        return f"bound by memory; {parts}."
    if rest > max(reading, multiplying):
        return f"bound by neither; {parts}: most of its {si(seconds / steps, 's')} is the cost of many small operations."
    return f"{parts}, of {si(seconds / steps, 's')} in all."


def _passes(row: Row, seconds: float, forward: Row, ceilings: Ceilings) -> str:
    if row.walker is None or forward.walker is None:
        rate, best = products(row) / seconds, ceiling(row, ceilings)
        share = f"{100 * rate / best:.1f}%"
        return f"NumPy reaches {share} of what this machine multiplies in float32, and every step is a pass over memory."
    others = lambda work: (work.elementwise + work.transcendental) / max(work.matmul, 1)
    parts = [f"beside each 100 operations in products it does {100 * others(row.walker):.1f} others"]
    parts[0] += f" (the forward pass {100 * others(forward.walker):.1f})"
    if row.update:
        learning = row.memory.get("gradients", 0) // 4
        moving = 28 * learning / (1e9 * ceilings.update_gbs)
        parts.append(f"and the optimizer moves 28 bytes a weight that learns, {si(moving, 's')} of {si(seconds, 's')}")
    if row.stage == "inference":
        parts.append("and its products come in chunks, against a whole cache")
    return ", ".join(parts) + "."
