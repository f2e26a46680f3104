"""Flags of fine-tuning: the examples, what is trainable, the step, the length and the folder."""

import dataclasses
from typing import Annotated

from engine.errors import UserError
from stages.cli.flags import (
    BATCH,
    COUNT,
    MeshFlags,
    MetricFlag,
    TemplateFlag,
    default,
    integer,
    interval,
    number,
    one_of,
    parser,
    positive,
)
from stages.runs.flags import FolderFlags, LengthFlags, ModelRunFlags, TrainableFlags

DATA = (
    "A .jsonl or .json of messages, prompt/completion, Alpaca, ShareGPT or text, or a .txt or .md; "
    "for --objective preference, of prompt, chosen and rejected, "
    "or for --loss kto of prompt, completion and label. "
    "`voice` and `voice-preferences` come with this project."
)


@dataclasses.dataclass(frozen=True)
class ExampleFlags:
    """The training data."""

    data: Annotated[str, parser(str, "DATA"), default("voice", DATA)] = "voice"
    validation: Annotated[
        str | None, parser(str, "DATA"), default("the named data's own, else a tenth by the seed")
    ] = None
    """Conversations that are never trained on; those that are in --data too are left out."""
    metric: MetricFlag = ()
    general: Annotated[str, parser(str, "TEXT")] = "python"
    """A text to measure before and after, to see what was forgotten: shakespeare, python, a file, or none.
    With none no general questions are asked either."""
    no_mix: Annotated[bool, default("off")] = False
    """Train on the data alone. Else general questions, which the model answers in its tone before, are mixed in."""
    template: TemplateFlag = None
    full_loss: Annotated[bool, default("off")] = False
    """Train on all of a conversation, not on what the assistant says alone."""
    no_pack: Annotated[bool, default("off")] = False
    """One example a row. Packed, several short ones share a row and do not see one another."""


@dataclasses.dataclass(frozen=True)
class TuningFlags:
    """The objective, the batch of a step, and the optimizer."""

    objective: Annotated[str, one_of("answers", "preference")] = "answers"
    """`answers`: what the assistant says. `preference`: the chosen answer over the rejected one, by --loss."""
    loss: Annotated[str, one_of("dpo", "kto", "orpo", "simpo")] = "dpo"
    """Of preference. dpo, and kto for answers that are good or bad: beside the model before training. orpo, simpo: alone."""
    beta: Annotated[float | None, positive(100), default("0.1; 2 for simpo")] = None
    """Of preference. dpo, kto: the larger, the nearer the model stays to its start. orpo, simpo: weight of the comparison."""
    batch: Annotated[int | None, BATCH, default("2; 4 for --loss kto")] = None
    """Rows a step (pairs, for preference)."""
    accumulate: Annotated[
        int | None,
        COUNT,
        default("1; with --base int8 as many as the batch has rows"),
    ] = None
    """Parts the batch is read in, one after another: less memory, the same step."""
    context: Annotated[
        int | None, parser(integer(16), "N"), default("256, or the model's where that is less")
    ] = None
    """Tokens a row."""
    learning_rate: Annotated[float | None, positive(1), default("2e-3, or 2e-4 without LoRA")] = None
    """The learning rate of AdamW. The default for preference is a tenth of these."""
    warmup: Annotated[float, parser(number(0, 1), "SHARE")] = 0.05
    """Share of the run in which the learning rate rises; then it falls by a cosine."""
    weight_decay: Annotated[float, parser(number(0, 10), "X")] = 0.0
    """Pull of what is trained towards zero."""
    clip: Annotated[float, positive()] = 1.0
    """Largest norm of the gradient."""
    scan: Annotated[bool, default("off")] = False
    """Compile one layer and loop over it: sooner compiled, slower steps."""
    remat: Annotated[bool, default("off")] = False
    """Gradient checkpointing: recompute each layer in the backward pass. Less memory, more work."""
    eval_every: Annotated[
        int | float | None,
        parser(interval, "N|TIME"),
        default("a fifth of the run"),
    ] = None
    """Steps or training time between evaluations on the validation conversations."""
    patience: Annotated[int | None, COUNT, default("the whole length")] = None
    """End after this many evaluations without a lower validation loss."""
    keep_last: Annotated[bool, default("off")] = False
    """Let the run stand for its last checkpoint, not for that of the lowest validation loss."""

    @property
    def examples(self) -> str:
        """The kind of examples that the objective trains on: answers, preference, or kto."""
        if self.objective == "preference" and self.loss == "kto":
            return "kto"
        return self.objective

    @property
    def rows(self) -> int:
        """Rows a step. KTO estimates KL by a batch's rows."""
        if self.batch:
            return self.batch
        if self.examples == "kto":
            return 4
        return 2


@dataclasses.dataclass(frozen=True)
class FinetuneFlags(ModelRunFlags):
    examples: ExampleFlags
    trainable: TrainableFlags
    tuning: TuningFlags
    length: LengthFlags
    folder: FolderFlags
    mesh: MeshFlags

    def check_together(self) -> None:
        if self.tuning.scan and self.trainable.adapter is None:
            raise UserError(
                "--scan runs all layers as one program, which would undo the saving of --train and --freeze."
            )
        is_preference = self.tuning.objective == "preference"
        if not is_preference and (self.tuning.loss != "dpo" or self.tuning.beta):
            raise UserError(
                "--loss and --beta are of --objective preference: give it too, or leave them out."
            )
        if is_preference and self.examples.full_loss:
            raise UserError(
                "--full-loss is of --objective answers: a preference compares the answers alone. "
                "Leave it out."
            )
        if self.tuning.rows % self.microbatches:
            raise UserError(
                f"A batch of {self.tuning.rows} cannot be read in {self.microbatches} equal parts: "
                "give another --batch or --accumulate."
            )

    @property
    def microbatches(self) -> int:
        """Parts the batch is read in: over an int8 base a row each, which takes least memory."""
        if self.tuning.accumulate:
            return self.tuning.accumulate
        if self.trainable.base == "int8":
            return self.tuning.rows
        return 1
