"""`stages.train --by-hand`: the same run with another step, in NumPy, whose backward pass is written out in engine/by_hand.

Text, batches, first weights, loop and checkpoints are those of any run, so what is learnt can be read by every other
command. JAX draws the first weights, gives the schedule's factor, and at the end scores the whole validation text; forward,
backward and update are NumPy's.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import by_hand
from engine import format as words
from engine.by_hand import adamw
from engine.by_hand.generate import generate
from engine.by_hand.model import residual_count
from engine.errors import UserError
from stages.cli import signals
from stages.cli.command import command_line
from stages.train.run import Run, carry_out

if TYPE_CHECKING:
    from stages.train.flags import Train

SECONDS = 60.0
SAMPLE = 160  # tokens
FLOAT32 = 4  # bytes
EXPECTED = 0.15  # of the float32 ceiling, as measured with the tiny preset, whose products are small


def run(given: "Train") -> int:
    """As `stages.train.run.run`. Raises UserError for flags that only the JAX step knows."""
    return carry_out(settled(given), ByHand)


def settled(given: "Train") -> "Train":
    """The flags with what --by-hand decides. Raises UserError where they say otherwise."""
    from stages.runs.folder import default_folder

    step, moves, length = given.step, given.optimizer, given.length
    cannot = [
        (step.scan, "--scan", "there is no compiler, and so nothing to lay out for it"),
        (step.remat, "--remat", "it keeps what the backward pass needs, to show what that is"),
        (step.accumulate not in (None, 1), "--accumulate", "it reads a batch as a whole"),
        (step.dtype == "bfloat16", "--dtype bfloat16", "NumPy has no such type; it is float32"),
        (moves.optimizer == "muon", "--optimizer muon", "its optimizer is AdamW"),
        (moves.matrix_learning_rate is not None, "--matrix-learning-rate", "its optimizer is AdamW, not Muon"),
        (given.device not in ("auto", "cpu"), f"--device {given.device}", "NumPy computes on the CPU"),
    ]
    for wrong, flag, why in cannot:
        if wrong:
            raise UserError(f"--by-hand does not go with {flag}: {why}. Leave one of them out.")
    limited = length.max_time or length.steps
    return dataclasses.replace(
        given,
        step=dataclasses.replace(step, dtype="float32", accumulate=1),
        optimizer=dataclasses.replace(moves, optimizer="adamw"),
        length=length if limited else dataclasses.replace(length, max_time=SECONDS),
        folder=dataclasses.replace(
            given.folder, out_dir=given.folder.out_dir or default_folder(f"{given.preset}-by-hand", given.text.data)
        ),
        device="cpu",
    )


class ByHand(Run):
    """A run whose step, quick evaluation and sample are NumPy's."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.device = dataclasses.replace(self.device, name=f"{self.device.name}, by NumPy {np.__version__}")

    def check_memory(self) -> None:
        """Raises UserError when a step would need more than there is: all it keeps is predicted by formula."""
        from stages.runs.estimate import memory_limit

        if self.memory() > memory_limit():
            raise UserError(
                f"Training {self.plan.preset} by hand needs about {words.size(self.memory())}, of which "
                f"{words.size(self.kept())} are kept by the forward pass for the backward pass, and "
                f"{words.size(memory_limit())} are left for it. Give a smaller --batch or --context, or a smaller preset."
            )

    def kept(self) -> int:
        """Bytes that a forward pass keeps for its backward pass."""
        return FLOAT32 * residual_count(self.plan.cfg, self.recipe.batch, self.recipe.context)

    def memory(self) -> int:
        """Predicted bytes at the fullest moment of a step: weights and moments, old and new, gradient, logits three times."""
        from engine.counting.params import count_params

        logits = self.plan.step_tokens * self.plan.cfg.vocab
        return self.kept() + FLOAT32 * (7 * count_params(self.plan.cfg).total + 3 * logits)

    def rows(self) -> list[tuple[str, str]]:
        """The banner, with what differs by hand."""
        from stages.runs.estimate import ceiling, memory_limit, predict

        rows = dict(super().rows())
        seconds = self.plan.step_flops / (EXPECTED * ceiling(self.plan.cfg, self.ceilings))
        steps, long = predict(self.plan, seconds)
        rows["memory"] = (
            f"about {words.size(self.memory())} of {words.size(memory_limit())} that are left for a step; each forward pass "
            f"keeps {words.size(self.kept())} for its backward pass"
        )
        rows["predicted"] = f"{steps:,} steps, {long}, at {EXPECTED:.0%} of what this machine multiplies in float32"
        return list(rows.items())

    def facts(self) -> dict[str, Any]:
        """run.json; its optimizer has a name of its own, so that no run of JAX's tries to go on from its state."""
        facts = super().facts()
        facts["recipe"]["optimizer"]["kind"] = "adamw by hand"
        return facts

    def restore(self, before: Any) -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        from engine.training.step import TrainState
        from stages.runs import state as resume

        def begin(params: Any) -> TrainState:
            none: Any = jnp.int32(0)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return TrainState(none, params, adamw.Moments(none, zeros, zeros))

        state, past = resume.restore(before, self.plan, begin, self.facts(), self.console)
        return jax.tree.map(np.array, state), past

    def compile(self, state: Any, step: int) -> Any:
        """The step itself: nothing has to be compiled."""
        import jax

        from engine.training.optimizer import make_schedule
        from engine.training.step import Metrics, TrainState

        cfg, moves = self.plan.cfg, self.recipe.optimizer
        schedule = jax.jit(make_schedule(moves))
        settings = adamw.Settings(
            moves.learning_rate, moves.beta1, moves.beta2, weight_decay=moves.weight_decay, clip=moves.clip
        )
        kept = f"the run is saved up to step {step:,}" if step else "nothing was trained yet"
        signals.set_phase(f"before the first step; {kept}. To begin again: {self.same_command()}")

        def train_step(state: Any, frozen: Any, batch: Any, progress: Any) -> tuple[Any, Any]:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below, and counted
                loss, gradient = by_hand.loss_and_gradient(
                    cfg, state.trainable, batch.tokens, batch.targets, batch.mask, batch.positions, batch.segments
                )
                length = adamw.norm(gradient)
                params, moments = adamw.step(settings, state.trainable, gradient, state.opt_state, float(schedule(progress)))
            sound = math.isfinite(loss) and math.isfinite(length)
            measured: Any = (loss, batch.mask.sum(), length, int(not sound))
            trainable, opt_state = (params, moments) if sound else (state.trainable, state.opt_state)
            return TrainState(state.step + 1, trainable, opt_state), Metrics(*measured)

        return train_step

    def quick(self, **how: Any) -> Any:
        return super().quick(**{"nats_of": nats_by_hand, **how})

    def sample(self, state: Any) -> str:
        """The beginning of the validation text, and how it goes on with the most probable token each time."""
        cfg, tokenizer = self.plan.cfg, self.data.tokenizer
        prompt = self.data.validation.tokens[: self.prompt_tokens()].tolist()
        new = list(generate(cfg, state.trainable, prompt, max_tokens=SAMPLE, end=tokenizer.end))
        return tokenizer.decode(prompt + new)

    def prompt_tokens(self) -> int:
        return max(1, self.plan.cfg.context // 4)

    def remarks(self, state: Any) -> list[tuple[str, str]]:
        """The same weights in both models, and how the same steps are taken in JAX."""
        from engine.inference.score import score

        cfg, params = self.plan.cfg, state.trainable
        ours, theirs = (self.quick(nats_of=nats).measure(cfg, params) for nats in (nats_by_hand, score))
        begun = f"the first {self.prompt_tokens()} tokens are {self.data.validation_name}'s, each after that the most probable"
        shown = [("sample", begun)]
        shown.append(("one model", f"{ours:.4f} bits per byte (quick) by NumPy, {theirs:.4f} by JAX with the same weights"))
        if self.plan.steps and not self.plan.seconds:  # by time, the schedule would follow each one's own speed
            same = command_line("train", self.given.preset, "--optimizer", "adamw", "--dtype", "float32")
            shown.append(("in JAX", f"{same}, with the same other flags, takes the same steps"))
        return shown


def nats_by_hand(cfg: Any, params: Any, batch: Any) -> float:
    """The summed nats of a batch's targets, in NumPy."""
    mean = by_hand.loss(cfg, params, batch.tokens, batch.targets, batch.mask, batch.positions, batch.segments)
    return mean * int(batch.mask.sum())
