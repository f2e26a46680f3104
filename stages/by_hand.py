"""Train the transformer of engine/by_hand: in NumPy, with every gradient written out.

    python -m stages.by_hand                                a tiny model of Shakespeare, in a minute or two
    python -m stages.by_hand --data book.txt --steps 2000 --out by-hand-model

The losses are those of `python -m stages.train tiny --optimizer adamw --dtype float32`, with the
same other flags. Nothing is saved on the way, and a signal ends it; `stages.train` is for runs that
are worth saving.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from engine.device import start_jax
from engine.errors import UserError
from engine.format import format_bytes
from engine.mesh.processes import refuse_cluster
from engine.model.config import ModelConfig, preset
from stages.cli import signals
from stages.cli.command import command_line, leave, run_command
from stages.cli.console import Console
from stages.cli.flags import BATCH, COUNT, VerboseFlag, default, integer, parser, path, positive

if TYPE_CHECKING:
    from engine.text.batch import TextBatches
    from stages.runs.text_data import TextData

FLOAT_BYTES = 4
SAMPLE = 160  # tokens of a completion that shows what was learned


@dataclasses.dataclass(frozen=True)
class ByHandFlags:
    """The text, the steps, and where to save the model."""

    data: Annotated[str, parser(str, "TEXT")] = "shakespeare"
    """A named text (shakespeare, python), a text file, .jsonl, .parquet or .bin, or a folder of them."""
    steps: Annotated[int, COUNT] = 400
    """Batches to train on."""
    batch: Annotated[int, BATCH] = 8
    """Windows of text a step."""
    context: Annotated[int, parser(integer(2), "N")] = 64
    """Tokens a window; a byte is a token."""
    learning_rate: Annotated[float, positive(10)] = 0.003
    """The learning rate of AdamW."""
    seed: Annotated[int, parser(integer(0, 2**31 - 1), "N")] = 0
    """The seed of the random first weights and of the order of the text."""
    log_every: Annotated[int, COUNT] = 20
    """Steps between lines."""
    out: Annotated[Path | None, parser(path, "FOLDER"), default("not saved")] = None
    """A folder for the trained model, as Hugging Face has it; --model of the other commands takes it."""
    verbose: VerboseFlag = False


def train(flags: ByHandFlags) -> None:
    signals.set_phase("before anything was saved.")
    # Products of so narrow a model are over before a second thread has woken up. NumPy reads this
    # when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # JAX makes the first weights, and nothing else. It must be started before it is imported, as
    # the functions below do.
    start_jax("cpu", connect=lambda: refuse_cluster("Training by hand"))
    from engine.text.batch import TextBatches
    from stages.runs.text_data import prepare_text

    if flags.out and flags.out.exists():
        raise UserError(f"{flags.out} is there already; give another --out.")
    with Console() as console:
        text = prepare_text(flags.data, None, "bytes", console)
        cfg = dataclasses.replace(
            preset("tiny"), vocab=text.tokenizer.vocab, context=flags.context, dtype="float32"
        )
        batches = TextBatches(text.train.tokens, flags.context, flags.batch, flags.seed)
        console.print_rows(plan_rows(flags, cfg, text))
        params = train_steps(flags, cfg, batches, console)
        evaluate(cfg, params, text, console)
        if flags.out:
            save(flags.out, cfg, params, text, console)


def plan_rows(flags: ByHandFlags, cfg: ModelConfig, text: "TextData") -> list[tuple[str, str]]:
    """Returns the banner's rows. Raises UserError when a step takes more memory than there is."""
    import numpy as np

    from engine.by_hand.model import residual_count
    from engine.counting.hardware import require_memory
    from engine.counting.params import count_params

    parameters = count_params(cfg).total
    logits = flags.batch * flags.context * cfg.vocab
    residuals = FLOAT_BYTES * residual_count(cfg, flags.batch, flags.context)
    # The peak of a step: weights and moments, old and new, gradient, logits three times.
    memory = residuals + FLOAT_BYTES * (7 * parameters + 3 * logits)
    detail = f", of which {format_bytes(residuals)} are kept by the forward pass for the backward pass"
    require_memory(
        memory, "A step by hand needs about", "give a smaller --batch or --context.", detail=detail
    )
    return [
        ("device", f"NumPy {np.__version__}, float32"),
        ("text", f"{text.name}: {len(text.train.tokens):,} tokens"),
        ("model", f"tiny: {cfg.layers} layers, width {cfg.width}, {parameters:,} parameters"),
        ("memory", f"about {format_bytes(memory)}{detail}"),
        ("length", f"{flags.steps:,} steps of {flags.batch} x {flags.context} tokens"),
    ]


def train_steps(flags: ByHandFlags, cfg: ModelConfig, batches: "TextBatches", console: Console) -> Any:
    """Trains random first weights by all steps, with a line every --log-every; returns the params.

    Raises UserError for a loss or gradient that is not finite.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from engine import by_hand
    from engine.by_hand import adamw
    from engine.by_hand.model import to_numpy, tree_map
    from engine.model.transformer import init_params
    from engine.training.optimizer import OptimizerConfig, make_schedule

    params = to_numpy(jax.device_get(init_params(cfg, jax.random.key(flags.seed))))
    zeros = tree_map(np.zeros_like, params)
    moments = adamw.Moments(np.array(0, np.int32), zeros, zeros)
    optimizer = adamw.AdamWConfig(flags.learning_rate)
    schedule = make_schedule(OptimizerConfig(kind="adamw", schedule="wsd", warmup=0.02, decay=0.5))
    losses = []
    for step in range(flags.steps):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            loss, gradient = by_hand.loss_and_gradient(cfg, params, *batches.at(step))
            norm = adamw.global_norm(gradient)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"The loss or gradient of step {step + 1:,} is not a number: lower --learning-rate."
                )
            factor = float(schedule(jnp.float32(step / flags.steps)))
            params, moments = adamw.step(optimizer, params, gradient, moments, factor)
        losses.append(loss)
        if (step + 1) % flags.log_every == 0 or step + 1 == flags.steps:
            mean = sum(losses) / len(losses)
            losses = []
            console.print(
                f"step {step + 1:,}/{flags.steps:,}  loss {mean:.4f}  lr {factor:.0%}  gradient {norm:.2f}"
            )
    return params


def evaluate(cfg: ModelConfig, params: Any, text: "TextData", console: Console) -> None:
    """Prints the loss on the validation text, and a completion of its beginning."""
    from engine import by_hand
    from engine.by_hand.model import generate
    from stages.runs.text_evaluators import quick_evaluator

    def summed_nats(cfg: ModelConfig, params: Any, batch: Any) -> float:
        return by_hand.loss(cfg, params, *batch) * int(batch.mask.sum())

    bits = quick_evaluator(cfg, text.validation, text.tokenizer, summed_nats).evaluate(params)
    prompt = text.validation.tokens[: max(1, cfg.context // 4)].tolist()
    completion = generate(cfg, params, prompt, max_tokens=SAMPLE, eos_id=text.tokenizer.eos_id)
    console.print(f"\n{text.tokenizer.decode([*prompt, *completion])}\n")
    console.print_rows(
        [
            ("validation", f"{bits:.4f} bits per byte (quick) on {text.validation_name}"),
            (
                "sample",
                f"the first {len(prompt)} tokens are {text.validation_name}'s, "
                "each after that the most probable",
            ),
        ]
    )


def save(out: Path, cfg: ModelConfig, params: Any, text: "TextData", console: Console) -> None:
    """Writes the model as a Hugging Face folder."""
    from engine.files import atomic_folder
    from engine.storage.huggingface import save_folder
    from engine.text.tokenizer import ModelTokenizer

    with atomic_folder(out) as building:
        tokenizer = ModelTokenizer(text.tokenizer, (text.tokenizer.eos_id,), {})
        save_folder(building, cfg, params, tokenizer, dtype="float32")
    console.print_rows([("saved", str(out)), ("next", command_line("generate", "--model", out))])


main = functools.partial(run_command, "by_hand", __doc__, ByHandFlags, train)


if __name__ == "__main__":
    leave(main())
