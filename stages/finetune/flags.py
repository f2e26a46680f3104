"""Flags of `python -m stages.finetune`: fine-tuning a model."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from engine.errors import UserError
from engine.model.config import LoraConfig
from stages.cli.flags import DeviceFlag, VerboseFlag, default, integer, interval, number, one_of, parser, path
from stages.train.flags import Length

TARGETS = "q, k, v, out, gate, up, down, or all"


def adapter_size(text: str) -> LoraConfig:
    """'rank=8,alpha=16,targets=q,v' -> LoraConfig; each of the three may be left out. Raises ValueError for anything else."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in filter(None, text.replace(" ", "").split(",")):
        begun, equals, value = word.partition("=")
        name, value = (begun, value) if equals else (name, word)
        found.setdefault(name, []).append(value)
    if not found.keys() <= {"rank", "alpha", "targets"}:
        raise ValueError(f"wanted rank=8,alpha=16,targets=q,v (targets: {TARGETS}), got {text!r}")
    for known in ("rank", "alpha"):
        if len(found.get(known, ())) > 1:
            raise ValueError(f"wanted one {known}, got {text!r}")
    rank = integer(1, 4096)(found["rank"][0]) if "rank" in found else 8
    alpha = number(0, above=True)(found["alpha"][0]) if "alpha" in found else 2.0 * rank
    return LoraConfig(rank, alpha, tuple(found.get("targets", ("all",))))


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is learnt."""

    data: Annotated[str, parser(str, "DATA")] = "voice"
    """A .jsonl of messages, prompt/completion, Alpaca, ShareGPT or text; or `voice`, which comes with this project."""
    validation: Annotated[str | None, parser(str, "DATA"), default("the named data's own, else the last tenth")] = None
    """Conversations that are never learnt from."""
    general: Annotated[str, parser(str, "TEXT")] = "python"
    """A text to measure before and after, to see what was forgotten: shakespeare, python, a file, or none."""
    template: Annotated[Path | None, parser(path, "FILE"), default("the model's own")] = None
    """A chat template (Jinja) to use in place of the model's."""
    pack: Annotated[bool, default("on")] = True
    """Several short examples a row; they do not see one another."""


@dataclasses.dataclass(frozen=True)
class Learns:
    """What of the model learns; without any of these, a LoRA of all matrices."""

    train: Annotated[tuple[str, ...], default("nothing but the adapter")] = ()
    """Patterns of paths ('blocks/(28|29)/.*'), `head`, or `all`."""
    freeze: Annotated[tuple[str, ...], default("nothing")] = ()
    """`bottom:N`, `top:N`, or patterns: all else learns."""
    lora: Annotated[LoraConfig | None, parser(adapter_size, "SIZE"), default("rank=8,alpha=16,targets=all")] = None
    """rank=8,alpha=16,targets=q,v: an adapter beside a frozen model."""
    base: Annotated[Literal["float", "int8"], parser(one_of("float", "int8"), "TYPE")] = "float"
    """What the frozen model under an adapter is kept in: `int8` takes half the memory."""

    def __post_init__(self) -> None:
        if self.lora and (self.train or self.freeze):
            raise UserError("--lora leaves the whole model frozen: it does not go with --train or --freeze.")
        if self.base == "int8" and (self.train or self.freeze):
            raise UserError("--base int8 is for what stays frozen under a LoRA: it does not go with --train or --freeze.")

    @property
    def adapter(self) -> LoraConfig | None:
        """The LoRA to train; None when weights of the model themselves learn."""
        return None if self.train or self.freeze else self.lora or LoraConfig()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How it learns."""

    objective: Annotated[str, parser(one_of("answers", "preference"), "NAME")] = "answers"
    """`answers`: what the assistant says. `preference`: the chosen answer over the rejected one (DPO)."""
    beta: Annotated[float, parser(number(0, 10, above=True), "X")] = 0.1
    """Of preference: how far the model may move away from where it began."""
    batch: Annotated[int, parser(integer(1), "N")] = 2
    """Rows a step (pairs, for preference)."""
    accumulate: Annotated[int | None, parser(integer(1), "N"), default("1; with --base int8 as many as the batch has rows")] = (
        None
    )
    """Parts the batch is read in, one after another: less memory, the same step."""
    context: Annotated[int, parser(integer(16), "N")] = 256
    """Tokens a row."""
    learning_rate: Annotated[float | None, parser(number(0, 1, above=True), "X"), default("2e-3, or 2e-5 without LoRA")] = None
    """AdamW's."""
    warmup: Annotated[float, parser(number(0, 1), "SHARE")] = 0.05
    """Share of the run in which the learning rate rises; then it falls by a cosine."""
    weight_decay: Annotated[float, parser(number(0, 10), "X")] = 0.0
    """Pull of what learns towards zero."""
    clip: Annotated[float, parser(number(0, above=True), "X")] = 1.0
    """Largest norm of the gradient."""
    scan: Annotated[bool, default("off")] = False
    """Compile one layer and loop over it: sooner compiled, slower steps."""
    remat: Annotated[bool, default("off")] = False
    """Recompute each layer in the backward pass instead of keeping it: less memory, more work."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept, and how often."""

    out_dir: Annotated[Path | None, parser(path, "FOLDER"), default("runs/MODEL-DATA")] = None
    """The run folder. A run that is already there is continued."""
    overwrite: Annotated[bool, default("off")] = False
    """Begin anew in a folder that holds a run."""
    eval_every: Annotated[int | float | None, parser(interval, "N|TIME"), default("a fifth of the run")] = None
    """Steps or training time between looks at the validation conversations."""
    save_every: Annotated[int | float, parser(interval, "N|TIME"), default("60s")] = 60.0
    """Steps or training time between checkpoints."""
    keep: Annotated[int, parser(integer(1), "N")] = 2
    """Checkpoints to keep."""


@dataclasses.dataclass(frozen=True)
class Finetune:
    """A model, what it learns from, what of it learns, and how."""

    examples: Examples
    learns: Learns
    tuning: Tuning
    length: Length
    folder: Kept
    model: Annotated[str, parser(str, "MODEL")] = "smollm2-135m-instruct"
    """A run or step folder, a Hugging Face folder, a .gguf file, or a named model."""
    seed: Annotated[int, parser(integer(0, 2**31 - 1), "N")] = 0
    """Of the adapter's first weights and of the order of the examples."""
    device: DeviceFlag = "auto"
    """auto, cpu, gpu or tpu."""
    dry_run: Annotated[bool, default("off")] = False
    """Print what matches and what it would cost, and stop."""
    verbose: VerboseFlag = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        learns = self.learns
        if self.tuning.scan and (learns.train or learns.freeze):
            raise UserError("--scan runs all layers as one program, which would undo the saving of --train and --freeze.")
        if self.tuning.batch % self.parts:
            raise UserError(
                f"A batch of {self.tuning.batch} cannot be read in {self.parts} equal parts: give another --batch or "
                "--accumulate."
            )

    @property
    def adapter(self) -> LoraConfig | None:
        """The LoRA to train; None when weights of the model themselves learn."""
        return self.learns.adapter

    @property
    def parts(self) -> int:
        """Parts the batch is read in. Who keeps the base in int8 wants memory, and a row at a time takes least."""
        return self.tuning.accumulate or (self.tuning.batch if self.learns.base == "int8" else 1)
