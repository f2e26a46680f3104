"""Rounds: inference draws answers and changes no weight, a rule rewards them, training reads them and does."""

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from engine import format as words
from engine.counting.hardware import peak_rss_bytes
from engine.errors import UserError
from engine.inference.decode import for_inference
from engine.inference.sampling_params import SamplingParams
from engine.model.paths import merge
from engine.storage import checkpoint
from engine.storage.digest import digest
from engine.text.order import EpochOrder
from engine.training.lora import merge_lora
from engine.training.optimizer import make_optimizer
from engine.training.reinforce import Rollouts, group_advantages, log_probabilities
from engine.training.step import TrainState, train_step
from stages.cli import signals
from stages.reinforce import rollouts as drawing
from stages.reinforce.data import Prompt
from stages.runs.folder import MetricsLog
from stages.runs.loop import REFUSED_IN_A_ROW, Interval, LoopState

if TYPE_CHECKING:
    from stages.reinforce.run import Reinforced

STAYS = 5.0  # seconds between lines that stay on a terminal


class Draw(NamedTuple):
    """Prompts as tokens, an answer to each, its text, its reward, and how long inference took."""

    prompts: list[list[int]]
    answers: list[drawing.Answer]
    texts: list[str]
    rewards: list[float]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens that were drawn."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def mean(self) -> float:
        """The mean reward."""
        return sum(self.rewards) / len(self.rewards)


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round did. `after` is the digest of the weights when it was over, `before` when it began."""

    number: int
    draw: Draw
    training: float  # seconds
    before: str
    after: str
    grad_norm: float
    kl: float | None

    def fields(self, total: int | None, seconds: float) -> list[str]:
        """The round's line."""
        pull = "" if self.kl is None else f", KL {self.kl:.4f}"
        learnt = f"weights {self.before[:8]} -> {self.after[:8]}" if self.after != self.before else "all alike, nothing learnt"
        return [
            f"round {self.number:,}" + (f"/{total:,}" if total else ""),
            f"reward {self.draw.mean:.3f}",
            f"| inference {self.draw.seconds:.2f} s, {self.draw.tokens:,} tokens, weights {self.before[:8]} unchanged",
            f"| training {self.training:.2f} s, {learnt}{pull}",
            f"| {words.size(peak_rss_bytes())}",
            f"{words.clock(seconds)} done",
        ]


class Rounds:
    """One part of a run, from where it stands to its end or to a signal."""

    def __init__(self, run: "Reinforced", past: LoopState) -> None:
        self.run, self.past = run, past
        self.log = MetricsLog(run.folder, past.step)
        self.order = EpochOrder(len(run.prompts.learnt), run.given.asked.prompts, run.given.seed)
        self.done: list[Round] = []
        self.in_a_row = 0

    def weights(self, trainable: Any) -> Any:
        """What inference reads: adapters folded into their matrices, which decoding then reads once and not twice."""
        run = self.run
        params = merge(trainable, run.learner.frozen)
        return for_inference(run.plan.cfg, params if run.given.learns.base == "int8" else merge_lora(params))

    def draw(self, params: Any, prompts: list[Prompt], first_seed: int) -> Draw:
        """An answer to each prompt, the row of each with a seed of its own."""
        run, asked = self.run, self.run.given.asked
        tokens = [run.tokens(prompt) for prompt in prompts]
        sampling = SamplingParams(max_tokens=run.max_tokens, temperature=asked.temperature, seed=first_seed)
        begin = time.perf_counter()
        answers = drawing.draw(
            run.plan.cfg, params, tokens, sampling.per_row(len(prompts)), ends=run.ends, capacity=run.longest + run.max_tokens,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        texts = [run.model.tokenizer.decode(answer.tokens[: len(answer.tokens) - answer.ended]).strip() for answer in answers]
        rewards = drawing.rewarded(run.reward, texts, [prompt.answer for prompt in prompts])
        return Draw(tokens, answers, texts, rewards, seconds)

    def look(self, trainable: Any, label: str) -> Draw:
        """Answers to prompts that are never learnt from, as many as a round has, always with the same seeds."""
        held_out = self.run.prompts.held_out
        prompts = [held_out[row % len(held_out)] for row in range(self.run.answers)]
        with self.run.console.task(label, always=True):
            return self.draw(self.weights(trainable), prompts, self._seed(-1))

    def compile(self, state: TrainState) -> None:
        """The programs of training; those of inference were compiled by the first look."""
        run, plan = self.run, self.run.plan
        rows = [[0]] * run.answers
        batch = drawing.as_batch(rows, [drawing.Answer([0], False)] * run.answers, plan.recipe.context)
        advantage = np.asarray(group_advantages(np.zeros((run.given.asked.prompts, run.given.asked.group)))).reshape(-1)
        rollouts = self._rollouts(state, batch, advantage)
        with run.console.task("compiling training", always=True):
            self.program = train_step.lower(
                plan.cfg, make_optimizer(plan.recipe.optimizer), state, run.learner.frozen, rollouts, np.float32(0),
                microbatches=plan.recipe.accumulate, objective=run.objective,
            ).compile()  # fmt: skip

    def play(self, state: TrainState) -> tuple[TrainState, int | None]:
        """Rounds to the end of the plan, or until a signal. -> the last state, saved, and the signal's number if any.

        Raises UserError after too many refused steps in a row; the last checkpoint then stays as it is.
        """
        run, past, plan = self.run, self.past, self.run.plan
        save, stays = Interval(run.given.folder.save_every, past), Interval(STAYS, past)
        saved = past.step
        params = self.weights(state.trainable)
        before = digest(params)
        with signals.deferred("Finishing this round, then saving (once more: stop at once).", run.console.print) as watch:
            while plan.done(past.step, past.seconds) < 1 and not watch.received:
                begin = time.perf_counter()
                state, params, played = self._round(state, params, before)
                before = played.after
                past.step += 1
                past.seconds += time.perf_counter() - begin
                self._note(played)
                over = plan.done(past.step, past.seconds) >= 1
                important = stays.now(past) or len(self.done) == 1 or over
                run.console.show_live(lambda: self.done[-1].fields(plan.steps, past.seconds), important=important)
                if save.now(past):
                    self.save(state)
                    saved = past.step
            if saved != past.step:
                self.save(state)
            return state, watch.received

    def _round(self, state: TrainState, params: Any, before: str) -> tuple[TrainState, Any, Round]:
        run, asked, number = self.run, self.run.given.asked, self.past.step
        prompts = [run.prompts.learnt[index] for index in self.order.at(number) for _ in range(asked.group)]
        draw = self.draw(params, prompts, self._seed(number))
        if digest(params) != before:
            raise RuntimeError("Inference changed the weights.")
        begin = time.perf_counter()
        advantage = np.asarray(group_advantages(np.reshape(draw.rewards, (-1, asked.group)))).reshape(-1)
        norm, kl = 0.0, None
        if advantage.any() or run.given.moves.kl:
            batch = drawing.as_batch(draw.prompts, draw.answers, run.plan.recipe.context)
            rollouts = self._rollouts(state, batch, advantage)
            kl = _divergence(rollouts)
            for _ in range(run.given.moves.updates):
                state, metrics = self.program(state, run.learner.frozen, rollouts, np.float32(0))
                norm = float(metrics.grad_norm)
                self._refused(bool(metrics.refused))
        training = time.perf_counter() - begin
        params = self.weights(state.trainable)
        return state, params, Round(number + 1, draw, training, before, digest(params), norm, kl)

    def _rollouts(self, state: TrainState, batch: Any, advantage: np.ndarray) -> Rollouts:
        """With what the objective needs of the model as it answered, and as it was at first."""
        run, cfg, moves = self.run, self.run.plan.cfg, self.run.given.moves
        learner = run.learner
        old = reference = None
        if moves.updates > 1 or moves.kl:
            old = self._in_parts(cfg, merge(state.trainable, learner.frozen), batch)
        if moves.kl:
            # An adapter that has learnt nothing is no change, to the bit, and makes it the same program as above.
            base = merge(learner.trainable, learner.frozen)
            reference = self._in_parts(cfg, base, batch)
        return Rollouts(batch, advantage, old, reference)

    def _in_parts(self, cfg: Any, params: Any, batch: Any) -> np.ndarray:
        """Log-probabilities, of as many rows at once as a step reads."""
        rows = self.run.answers // self.run.plan.recipe.accumulate
        parts = [jax.tree.map(lambda x, at=at: x[at : at + rows], batch) for at in range(0, self.run.answers, rows)]
        return np.concatenate([np.asarray(log_probabilities(cfg, params, part)) for part in parts])

    def _refused(self, refused: bool) -> None:
        self.past.refused += refused
        self.in_a_row = self.in_a_row + 1 if refused else 0
        if self.in_a_row >= REFUSED_IN_A_ROW:
            there = checkpoint.steps(self.run.folder)
            kept = f"the checkpoint of round {there[-1]} is as it was" if there else "nothing had been saved yet"
            raise UserError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not a number; {kept}. Lower --learning-rate."
            )

    def _note(self, played: Round) -> None:
        self.done.append(played)
        draw, past = played.draw, self.past
        past.best = draw.mean if past.best is None else max(past.best, draw.mean)
        numbers = {
            "reward": draw.mean, "answer_tokens": draw.tokens, "inference_seconds": draw.seconds,
            "training_seconds": played.training, "grad_norm": played.grad_norm,
        }  # fmt: skip
        self.log.add(step=past.step, seconds=past.seconds, **numbers, **({} if played.kl is None else {"kl": played.kl}))

    def save(self, state: TrainState) -> None:
        """A checkpoint of now."""
        run, past = self.run, self.past
        record = dataclasses.asdict(past) | {"seed": run.given.seed, "base": run.base}
        kept = run.learner.kept(state.trainable)
        checkpoint.save(run.folder, past.step, kept, state.opt_state, record, keep=run.given.folder.keep)

    def _seed(self, number: int) -> int:
        """Of a round's first row, such that no two rows of a run have one; -1 is the look's."""
        return (self.run.given.seed * 1_000_003 + (number + 1) * self.run.answers) % 2**32


def _divergence(rollouts: Rollouts) -> float | None:
    """How far the model has come from what it was at first, nats a token, by what it drew; None without a reference."""
    if rollouts.reference is None or rollouts.old is None:
        return None
    behind = np.where(rollouts.batch.mask, rollouts.reference - rollouts.old, 0)
    return float((np.exp(behind) - behind - 1).sum() / max(rollouts.batch.mask.sum(), 1))


def mean_of(rounds: list[Round]) -> float:
    """The mean reward over rounds; NaN for none."""
    return sum(one.draw.mean for one in rounds) / len(rounds) if rounds else math.nan
