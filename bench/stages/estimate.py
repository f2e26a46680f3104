"""Estimates the stage table's memory and time before it is measured, and explains a row that differs from its prediction."""

from bisect import bisect

from bench.stages.rows import Row, training_kinds
from engine.counting.flops import forward_flops, train_flops
from engine.counting.hardware import Ceilings, device_memory_bytes, require_memory
from engine.counting.memory import inference_memory, training_memory
from engine.counting.params import count_params
from engine.counting.program_flops import gradient_program_flops, score_program_flops
from engine.counting.traffic import inference_bytes
from engine.format import percent, si
from engine.inference.decode import STEPS
from engine.model.config import PRESETS, ModelConfig

SUSTAINED = 0.55  # of the ceilings, over a round
TOLERANCE = 0.15  # of the predicted ratio


def check_memory(cfg: ModelConfig, batch: int, context: int) -> None:
    """Raises UserError, with what would fit, when the table does not fit this machine's memory."""
    limit, needed = device_memory_bytes(), table_bytes(cfg, batch, context)
    if needed <= limit:
        return
    presets = sorted(PRESETS.items(), key=lambda item: count_params(item[1]).total, reverse=True)
    batches = range(2, batch, 2)
    fitting = batches[: bisect(batches, limit, key=lambda rows: table_bytes(cfg, rows, context))]
    smaller = [
        *((f"--batch {fewer}", cfg, fewer, context) for fewer in fitting[-1:]),
        *((f"--batch 2 --context {size}", cfg, 2, size) for part in range(1, 40) if (size := context >> part >> 6 << 6)),
        *((f"--preset {name}", other, batch, context) for name, other in presets),
    ]
    remedies = (f"{flags} fits" for flags, model, rows, size in smaller if table_bytes(model, rows, size) <= limit)
    remedy = next(remedies, "a smaller model is needed")
    require_memory(needed, "The stage table would need", f"{remedy}.", limit=limit)


def table_bytes(cfg: ModelConfig, batch: int, context: int) -> int:
    """Predicts the bytes of the whole table: the state of every row, and the largest step."""
    steps = [training_memory(cfg, batch, context, trainable=kind.trainable_paths) for kind in training_kinds(cfg)]
    states = sum(step.gradients + step.optimizer for step in steps)
    served = inference_memory(cfg, 32, context)
    working = max(step.total - step.params - step.optimizer for step in steps)
    # Float32 weights, as much for frozen halves in the compute type, served copies in two bytes and one.
    return states + steps[0].params * 2 + 2 * served.params + served.cache * 2 + working


def duration_warning(cfg: ModelConfig, batch: int, context: int, seconds: float, rounds: int, ceilings: Ceilings) -> str | None:
    """Returns a warning, with a smaller shape, when warm-up and `rounds` rounds would take over `seconds`, else None."""
    predicted = lambda batch, context: (1 + rounds) * round_seconds(cfg, batch, context, ceilings)
    if predicted(batch, context) <= seconds:
        return None
    shapes = [(fewer, size) for size in (context, 128, 64) for fewer in (8, 4, 2) if fewer * size < batch * context]
    smaller = next((shape for shape in shapes if predicted(*shape) <= seconds), shapes[-1] if shapes else None)
    remedy = "" if smaller is None else f"; --batch {smaller[0]} --context {smaller[1]} takes {_minutes(predicted(*smaller))}"
    return f"this model takes {_minutes(predicted(batch, context))} for {rounds} rounds, and compiling comes on top{remedy}"


def round_seconds(cfg: ModelConfig, batch: int, context: int, ceilings: Ceilings) -> float:
    """Predicts the seconds of a round: products and bytes moved, at SUSTAINED of this machine's ceilings."""
    kinds = [kind.trainable_paths for kind in training_kinds(cfg)]
    steps = sum(gradient_program_flops(cfg, batch, context, trainable=paths).total for paths in kinds)
    gradients = sum(training_memory(cfg, batch, context, trainable=paths).gradients for paths in kinds)
    # Evaluation, prefill, and of one sequence a slot's prefill and a token without a cache.
    forwards = (2 + 2 / batch) * score_program_flops(cfg, batch, context).total
    by_hand = sum(work(cfg, context, attention="full").total for work in (forward_flops, train_flops)) * context
    # Each decoding row runs twice: whole, and its products alone.
    decoding = 2 * STEPS * sum(inference_bytes(cfg, slots, context).total for slots in (2, 8, 8, 32, 32))
    gigas = (
        (steps + forwards) / ceilings.bf16_gflops + by_hand / ceilings.f32_gflops
        + 7 * gradients / ceilings.update_gbs + decoding / ceilings.read_gbs
    )  # fmt: skip
    return gigas / 1e9 / SUSTAINED


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} seconds"


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
