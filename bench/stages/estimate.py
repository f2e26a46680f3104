"""Estimates the memory and time of the stage table before it is measured."""

from bisect import bisect

from bench.stages.training_rows import training_kinds
from engine.counting.flops import forward_flops, train_flops
from engine.counting.hardware import Ceilings, device_memory_bytes, require_memory
from engine.counting.memory import inference_memory, training_memory
from engine.counting.params import count_params
from engine.counting.program_flops import gradient_program_flops, score_program_flops
from engine.counting.traffic import inference_bytes
from engine.inference.decode import STEPS
from engine.model.config import PRESETS, ModelConfig

SUSTAINED = 0.55  # of the ceilings, over a round


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
