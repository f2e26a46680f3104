"""A run of learning from rewards, from flags to result, in the order in which it happens."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import format as words
from engine.device import Device, start_jax
from engine.errors import UserError
from stages.cli import signals
from stages.cli.command import command_line, typed_arguments
from stages.cli.console import Console

if TYPE_CHECKING:
    from stages.reinforce.flags import Reinforce

TOKENS = 48  # of an answer, where the context has room for them
ROUNDED = 32  # places a row is a multiple of
PART = 1024  # places of the rows that a step reads at once: more hold more logits and are no faster

# JAX is started, with its allocator and its device, before anything that imports it.


def run(given: "Reinforce") -> int:
    """Prepares, plays rounds, measures what they changed. Returns the exit code."""
    signals.set_phase("before anything was learnt.")
    device = start_jax(given.device)
    from stages.runs import folder as run_folder

    task = given.asked.task.partition(":")[0]
    folder = given.folder.out_dir or run_folder.default_folder(Path(given.model).stem or "model", task)
    with Console() as console:
        if given.dry_run:
            console.print_rows(Reinforced(given, device, folder, console).rows())
            console.print("A dry run: nothing was learnt.")
            return 0
        run_folder.holds_run(folder)
        with run_folder.lock_folder(folder):
            return Reinforced(given, device, folder, console).go()


class Reinforced:
    """What the stages of one run hand on to each other."""

    def __init__(self, given: "Reinforce", device: Device, folder: Path, console: Console) -> None:
        from engine.storage.find import load_model
        from engine.text.chat import Chat
        from engine.training.optimizer import OptimizerConfig
        from engine.training.reinforce import grpo
        from engine.training.rewards import make_reward
        from stages.reinforce.data import prompts_for
        from stages.runs import trainable as learning
        from stages.runs.recipes import Recipe

        self.given, self.device, self.folder, self.console = given, device, folder, console
        asked, moves = given.asked, given.moves
        self.reward = make_reward(asked.task)
        self.prompts = prompts_for(asked.task, asked.data, given.seed)
        with console.task(f"loading {given.model}") as report:
            self.model = load_model(given.model, dtype=None if given.adapter else "float32", report=report)
        console.warn_damaged(self.model.damaged, self.model.checkpoint)
        cfg = self.model.cfg
        self.chat = Chat(self.model.tokenizer)
        self.ends = frozenset((*self.model.ends, *([] if self.chat.end is None else [self.chat.end])))
        self.longest = max(len(self.tokens(prompt)) for prompt in (*self.prompts.learnt, *self.prompts.held_out))
        self.max_tokens = self._room(cfg.context)
        self.objective = grpo(moves.clip, moves.kl)
        usual = 5e-4 if given.adapter else 2e-5
        # A constant rate, so that a run that goes on is the run that was not stopped.
        optimizer = OptimizerConfig(
            kind="adamw", learning_rate=moves.learning_rate or usual, schedule="wsd", warmup=0, decay=0, beta2=0.99,
            weight_decay=0,
        )  # fmt: skip
        seq = -(-(self.longest + self.max_tokens - 1) // ROUNDED) * ROUNDED
        parts = next(
            n for n in range(1, self.answers + 1) if self.answers % n == 0 and self.answers // n * seq <= max(PART, seq)
        )
        recipe = Recipe("the model's", seq, self.answers, optimizer, parts)
        length = given.length
        chosen = bool(length.max_time or length.rounds)
        trainable_paths, self.matched = learning.what_learns(given, cfg)
        self.plan = learning.TuningPlan(
            self.model.name,
            cfg,
            recipe,
            given.seed,
            length.rounds,
            length.max_time if chosen else 120.0,
            chosen,
            trainable_paths,
            given.learns.base,
        )
        self._check_memory()

    @property
    def answers(self) -> int:
        """Answers a round."""
        return self.given.asked.prompts * self.given.asked.group

    def tokens(self, prompt: Any) -> list[int]:
        """What the model reads of a prompt."""
        return self.chat.prompt([{"role": "user", "content": prompt.text}]).tolist()

    def _room(self, context: int) -> int:
        """Tokens of an answer. Raises UserError when the context has no room for them."""
        wanted, left = self.given.asked.max_tokens, context - self.longest
        if left < 1 or (wanted and wanted > left):
            raise UserError(
                f"The longest prompt has {self.longest:,} tokens, which leaves {max(0, left):,} of the model's context of "
                f"{context:,} for an answer; give {'a lower --max-tokens or ' if left > 0 else ''}shorter prompts."
            )
        return wanted or min(TOKENS, left)

    def _memory(self) -> int:
        """Predicted bytes: a step's, or the weights that are learnt beside those that answer and their cache."""
        from engine.counting.memory import inference_memory

        answering = inference_memory(self.plan.cfg, self.answers, self.longest + self.max_tokens)
        return self.plan.memory + answering.params + answering.cache

    def _check_memory(self) -> None:
        from stages.runs.estimate import memory_limit

        if self._memory() > memory_limit():
            raise UserError(
                f"A round would need about {words.size(self._memory())}, and {words.size(memory_limit())} are left for it; "
                "give fewer --prompts, a smaller --group, fewer --max-tokens, or a smaller model."
            )

    def flops(self) -> tuple[int, int]:
        """Of a round whose answers are as long as they may be: (what inference does, what training does)."""
        from engine.counting.flops import decode_flops, forward_flops, prefill_flops

        plan, cfg = self.plan, self.plan.cfg
        middle = self.longest + self.max_tokens // 2
        reading = prefill_flops(cfg, self.longest, attention="causal").total
        drawing = self.answers * (reading + (self.max_tokens - 1) * decode_flops(cfg, middle).total)
        looks = (self.given.moves.updates > 1) + (self.given.moves.kl > 0)
        looking = looks * plan.step_tokens * forward_flops(cfg, plan.recipe.context, attention="full").total
        return drawing, self.given.moves.updates * plan.step_flops + looking

    def rows(self) -> list[tuple[str, str]]:
        """The banner."""
        from engine.counting.params import count_params
        from engine.training.rewards import TASKS
        from stages.runs.estimate import memory_limit

        plan, cfg, asked, moves = self.plan, self.plan.cfg, self.given.asked, self.given.moves
        limits = [f"{plan.steps:,} rounds"] if plan.steps else []
        limits += [words.duration(plan.seconds)] if plan.seconds else []
        base = {"float": cfg.dtype, "int8": "int8"}[self.given.learns.base]
        drawing, training = self.flops()
        total = count_params(cfg).total
        return [
            ("device", str(self.device)),
            ("model", f"{self.model.name}: {cfg.layers} layers, width {cfg.width}, {total:,} numbers, {base}"),
            *self.matched,
            ("task", f"{asked.task} ({TASKS[asked.task.partition(':')[0]].partition(', ')[2]})"),
            ("prompts", f"{len(self.prompts.learnt):,} of {self.prompts.name}; {len(self.prompts.held_out):,} held out"),
            ("template", self.chat.template_name),
            ("a round", f"{asked.prompts} prompts, {asked.group} answers each, of at most {self.max_tokens} tokens, at "
                        f"temperature {asked.temperature:g}"),
            ("inference", f"draws them: up to {words.count(drawing)}FLOPs, forward only"),
            ("training", f"{moves.updates} step{'s' * (moves.updates > 1)} on them: up to {words.count(training)}FLOPs; clip "
                         f"{moves.clip:g}, KL {moves.kl:g}, adamw {plan.recipe.optimizer.learning_rate:g}"),
            ("memory", f"about {words.size(self._memory())} of {words.size(memory_limit())} that are left for a round"),
            ("length", " or ".join(limits)),
            ("folder", str(self.folder)),
        ]  # fmt: skip

    def go(self) -> int:
        """Plays what is left to play, then compares with what was there before."""
        from engine.storage.digest import digest
        from stages.reinforce import report as reinforced
        from stages.reinforce.rounds import Rounds
        from stages.runs import kept
        from stages.runs import state as resume
        from stages.runs import trainable as learning

        self.learner = learning.make_learner(self.given, self.plan.cfg, self.model.params, self.plan.trainable_paths)
        self.base = digest(self.model.params)
        before = resume.find_previous_run(self.folder, self.facts(), self.plan.cfg, self.given.folder.overwrite)
        self.console.print_rows(self.rows())
        if before and before.finished(self.plan) and before.run.get("result") and before.sound():
            self.console.print("This run is finished. To go on give more --rounds or --max-time; to begin anew, --overwrite.")
            return 0
        state, past = kept.restore(before, self.learner, self.plan, self.console)
        resume.begin(self.folder, self.plan.cfg, self.model.tokenizer, self.facts(), fresh=before is None)
        kept.keep_words(self.folder, self.model, self.chat)
        rounds = Rounds(self, past)
        was = rounds.look(self.learner.trainable, "measuring what it does, which compiles inference")
        if self.plan.done(past.step, past.seconds) < 1:
            signals.set_phase(f"while compiling; what was saved is in {self.folder}. To begin again: {self.same_command()}")
            rounds.compile(state)
            state, signal = rounds.play(state)
            if signal:
                self.console.print(
                    f"Stopped after round {past.step:,}; saved in {self.folder}.\nTo go on: {self.same_command()}"
                )
                return 128 + signal
        return reinforced.close(self, state, rounds, was)

    def facts(self) -> dict[str, Any]:
        """run.json: everything that says how this run learns, and from what."""
        import jax

        from stages.runs import folder as run_folder
        from stages.runs import kept

        given, model = self.given, self.model
        return {
            "command": self.same_command(),
            "stage": "reinforce",
            "base": {"model": kept.lasting(given.model), "digest": self.base, "name": model.name},
            "learns": kept.learns(given),
            "text": {
                "data": f"{given.asked.task} on {self.prompts.name}",
                "digest": f"{given.asked.task} {self.prompts.digest}",
            },
            "tokenizer": {"kind": "the model's", "digest": model.tokenizer.digest},
            "asked": run_folder.as_json(dataclasses.asdict(given.asked) | {"data": str(given.asked.data or "")}),
            "moves": dataclasses.asdict(given.moves),
            "recipe": run_folder.as_json(dataclasses.asdict(self.plan.recipe)),
            "seed": given.seed,
            "steps": self.plan.steps,
            "max_seconds": self.plan.seconds,
            "device": str(self.device),
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
        }

    def same_command(self) -> str:
        """What to type to go on."""
        return command_line("reinforce", *(word for word in typed_arguments() if word != "--overwrite"))
