"""A fine-tuning run from flags to result, in the order in which it happens."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import format as words
from engine.device import Device, start_jax
from engine.errors import UserError
from stages.cli import process, signals
from stages.cli.command import command_line, typed_arguments
from stages.cli.console import Console

if TYPE_CHECKING:
    from engine.model.config import ModelConfig
    from stages.finetune.flags import Finetune
    from stages.runs.trainable import TuningPlan

# JAX is started, with its allocator and its device, before anything that imports it.


def run(given: "Finetune") -> int:
    """Prepares, trains, measures what was learnt and what was forgotten. Returns the exit code."""
    signals.set_phase("before anything was trained.")
    device = start_jax(given.device)
    from stages.runs import folder as run_folder

    data = Path(given.examples.data).stem
    folder = given.folder.out_dir or run_folder.default_folder(Path(given.model).stem or "model", data)
    with Console() as console:
        if given.dry_run:
            Tuned(given, device, folder, console).show_plan()
            console.print("A dry run: nothing was trained.")
            return 0
        run_folder.holds_run(folder)
        with run_folder.lock_folder(folder):
            return Tuned(given, device, folder, console).go()


class Tuned:
    """What the stages of one run hand on to each other."""

    plan: "TuningPlan"

    def __init__(self, given: "Finetune", device: Device, folder: Path, console: Console) -> None:
        from engine.storage.find import load_model
        from engine.text.chat import Chat
        from engine.text.template import read_template
        from stages.runs import conversation_data, text_data
        from stages.runs import estimate as plan

        self.given, self.device, self.folder, self.console = given, device, folder, console
        source = read_template(given.examples.template)
        dtype = None if given.adapter else "float32"
        with console.task(f"loading {given.model}") as report:
            self.model = load_model(given.model, dtype=dtype, report=report, on_config=self.foresee)
        console.warn_damaged(self.model.damaged, self.model.checkpoint)
        self.plan = dataclasses.replace(self.plan, preset=self.model.name)
        if given.examples.general != "none":
            text_data.check_text_name(given.examples.general)
        self.chat = Chat(self.model.tokenizer, source)
        examples = given.examples
        self.lessons = conversation_data.prepare_conversations(
            examples.data, examples.validation, given.tuning.objective, given.tuning.context, self.model, self.chat, console
        )
        self.ceilings = plan.measured_ceilings(console)

    def foresee(self, cfg: "ModelConfig") -> None:
        """The plan, from the architecture alone. Raises UserError, before a weight is read, for what cannot be done."""
        from stages.runs import trainable as learning
        from stages.runs.recipes import Recipe

        given, tuning, length = self.given, self.given.tuning, self.given.length
        if tuning.context > cfg.context:
            raise UserError(f"--context {tuning.context:,} is more than the {cfg.context:,} tokens {given.model} was made for.")
        cfg = dataclasses.replace(cfg, scan=tuning.scan, remat="block" if tuning.remat else "none")
        paths, self.matched = learning.what_learns(given, cfg)
        moves = learning.optimizer(given)
        recipe = Recipe("the model's", tuning.context, tuning.batch * self.sides, moves, given.parts, tuning.scan, tuning.remat)
        chosen = bool(length.max_time or length.steps)
        seconds = length.max_time if chosen else 180.0
        base = given.learns.base
        self.plan = learning.TuningPlan(given.model, cfg, recipe, given.seed, length.steps, seconds, chosen, paths, base)
        self.check_memory()

    @property
    def sides(self) -> int:
        """Rows of tokens for each of the batch: a pair has two."""
        return 2 if self.given.tuning.objective == "preference" else 1

    def check_memory(self) -> None:
        """Raises UserError when a step would not fit, naming a flag with which it would."""
        from stages.runs.estimate import memory_limit

        limit, plan = memory_limit(), self.plan
        if plan.memory <= limit:
            return
        rows = self.given.tuning.batch
        by_rows = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, accumulate=rows))
        again = dataclasses.replace(by_rows, cfg=dataclasses.replace(by_rows.cfg, remat="block"))
        remedies = [(f"--accumulate {rows}, a row at a time,", by_rows), (f"--accumulate {rows} --remat", again)]
        if self.given.adapter:
            narrow = dataclasses.replace(again, base="int8")
            remedies.append((f"--base int8 --accumulate {rows} --remat", narrow))
        else:
            remedies += [
                (f"a LoRA (no --train, no --freeze) with {flags}", self._as_lora(lighter)) for flags, lighter in remedies
            ]
        remedy = next((flags for flags, lighter in remedies if lighter.memory <= limit), "only a smaller model")
        raise UserError(
            f"A step would need about {words.size(plan.memory)}, and {words.size(limit)} are left for it; {remedy} would fit."
        )

    @staticmethod
    def _as_lora(plan: "TuningPlan") -> "TuningPlan":
        """The same with the usual adapter in place of weights that learn."""
        from engine.counting.trainable import lora_only
        from engine.model.config import LoraConfig

        return dataclasses.replace(plan, trainable_paths=lora_only(plan.cfg, LoraConfig()))

    def rows(self) -> list[tuple[str, str]]:
        """The banner."""
        from engine.counting.params import count_params
        from stages.runs import trainable as learning
        from stages.runs.estimate import ceiling, memory_limit, predict

        plan, lessons, cfg = self.plan, self.lessons, self.plan.cfg
        top = ceiling(cfg, self.ceilings)
        steps, long = predict(plan, plan.step_flops / (0.4 * top))
        limit = f"{plan.steps:,} steps" if plan.steps else f"{words.duration(plan.seconds or 0)} of training time"
        base = {"float": cfg.dtype, "int8": "int8"}[self.given.learns.base]
        total = count_params(cfg).total
        return [
            ("device", str(self.device)),
            ("model", f"{self.model.name}: {cfg.layers} layers, width {cfg.width}, {total:,} numbers, {base}"),
            *self.matched,
            ("predicted", learning.shares(plan)),
            ("memory", f"about {words.size(plan.memory)} of {words.size(memory_limit())} that are left for a step"),
            ("data", f"{lessons.name} ({lessons.kind}): {lessons.summary.describe()[0]}"),
            *(("", line) for line in lessons.summary.describe()[1:]),
            ("validation", f"{lessons.held_out_name}: {len(lessons.held_out):,} examples"),
            ("template", self.chat.template_name),
            ("step", f"{plan.recipe.batch} x {plan.recipe.context} tokens, adamw, {plan.recipe.optimizer.learning_rate:g}"),
            ("length", f"{limit}; about {steps:,} steps, {long}"),
            ("folder", str(self.folder)),
        ]  # fmt: skip

    def show_plan(self) -> None:
        """The banner, and the first example with what is learnt of it set apart."""
        self.console.print_rows(self.rows())
        self.console.print()
        self.console.print("the first example; what is learnt of it is marked", style="bold")
        self.console.print_marked(list(self.chat.marked_pieces(self.lessons.first)))
        self.console.print()

    def go(self) -> int:
        """Trains what is left to train, then compares with what was there before."""
        from engine.storage.digest import digest
        from stages.finetune import report as tuned
        from stages.runs import kept
        from stages.runs import state as resume
        from stages.runs import trainable as learning
        from stages.runs.loop import Loop

        self.learner = learning.make_learner(self.given, self.plan.cfg, self.model.params, self.plan.trainable_paths)
        self.base = digest(self.model.params)
        if self.learner.trainable_paths.adapted and self.given.learns.base == "int8":
            self.model = dataclasses.replace(self.model, params=None)  # the wide weights need not stay in memory
        before = resume.find_previous_run(self.folder, self.facts(), self.plan.cfg, self.given.folder.overwrite)
        self.show_plan()
        if before and before.finished(self.plan) and before.run.get("result") and before.sound():
            self.console.print(
                "This run is finished. To train it further give more --steps or --max-time; to begin anew, --overwrite."
            )
            return 0
        state, past = kept.restore(before, self.learner, self.plan, self.console)
        resume.begin(self.folder, self.plan.cfg, self.model.tokenizer, self.facts(), fresh=before is None)
        kept.keep_words(self.folder, self.model, self.chat)
        was = tuned.look(self, self.learner.trainable)
        program, buffer = self.compile(state) if self.plan.done(past.step, past.seconds) < 1 else (None, 0)
        loop = Loop(self.job(buffer), past, self.console)
        if program:
            state, signal = loop.run(program, state)
            program = None  # its memory is needed for what is measured now
            self.console.close_live()
            if signal:
                self.console.print(f"Stopped at step {past.step:,}; saved in {self.folder}.\nTo go on: {self.same_command()}")
                return 128 + signal
        return tuned.close(self, state, loop, was)

    def objective(self) -> Any:
        """What a step makes small."""
        from engine.training.preference import dpo
        from engine.training.step import NEXT_TOKEN

        return dpo(self.given.tuning.beta) if self.sides == 2 else NEXT_TOKEN

    def compile(self, state: Any) -> Any:
        """The step's program, and the bytes it takes while it runs; the frozen tree is its own, whatever it is handed."""
        import jax
        import numpy as np

        from engine.allocator import return_freed_memory
        from engine.training.optimizer import make_optimizer
        from engine.training.step import NARROW, train_step

        signals.set_phase(f"while compiling; what was saved is in {self.folder}. To begin again: {self.same_command()}")
        frozen = self.learner.frozen
        # Programs that measured are read from the cache when they are wanted again; until then their memory is the step's.
        jax.clear_caches()
        return_freed_memory()
        with self.console.task("compiling", always=True):
            program = train_step.lower(
                self.plan.cfg, make_optimizer(self.plan.recipe.optimizer), state, frozen, self.batches().at(0), np.float32(0),
                microbatches=self.plan.recipe.accumulate, objective=self.objective(),
            ).compile(NARROW if self.plan.base == "int8" else None)  # fmt: skip
        jax.clear_caches()
        return_freed_memory()
        laid = program.memory_analysis()
        return lambda state, _, batch, progress: program(state, frozen, batch, progress), laid.temp_size_in_bytes if laid else 0

    def batches(self) -> Any:
        """What is learnt, step by step; made once, for a preference needs what the model said before."""
        from stages.runs import conversation_data

        if not hasattr(self, "_batches"):
            given, tuning = self.given, self.given.tuning
            if self.sides == 1:
                self._batches = conversation_data.packed(given, self.lessons)
            else:
                with self.console.task("asking the model what it prefers now", always=True):
                    self._batches = self._preferred(self.lessons.learnt, tuning.batch)
        return self._batches

    def _preferred(self, pairs: Any, batch: int) -> Any:
        from engine.model.paths import merge
        from stages.runs import conversation_data

        learner = self.learner
        base = learner.frozen if learner.trainable_paths.adapted else merge(learner.trainable, learner.frozen)
        return conversation_data.PreferenceBatches(self.plan.cfg, base, pairs, self.plan.recipe.context, batch, self.given.seed)

    def held_out(self, most: int | None = None) -> Any:
        """The looks at what is held out; `most` bounds the examples of a quick one."""
        from stages.runs import conversation_data

        chosen = self.lessons.held_out[:most]
        objective = self.objective()
        if self.sides == 1:
            batches = conversation_data.batch_examples(chosen, self.plan.recipe.context)
            return conversation_data.HeldOutEvaluator(batches, self.learner.frozen)
        batches = list(self._preferred(chosen, min(conversation_data.ROWS, len(chosen))).once())
        return conversation_data.HeldOutEvaluator(batches, self.learner.frozen, objective, "preference loss")

    def job(self, buffer: int) -> Any:
        from stages.runs import conversation_data, loop
        from stages.runs import estimate as plan

        given = self.given.folder
        return loop.LoopConfig(
            plan=self.plan, folder=self.folder, batches=self.batches(), quick=self.held_out(conversation_data.MOST),
            often=loop.Intervals(given.eval_every or self._fifth(), given.save_every, 1, given.keep),
            ceiling=plan.ceiling(self.plan.cfg, self.ceilings), started=process.process_start(),
            facts={"seed": self.given.seed, "base": self.base}, kept=self.learner.kept, buffer=buffer,
        )  # fmt: skip

    def _fifth(self) -> int | float:
        plan = self.plan
        return plan.seconds / 5 if plan.seconds else max(1, (plan.steps or 5) // 5)

    def facts(self) -> dict[str, Any]:
        """run.json: everything that says how this run is trained, and on what."""
        import jax

        from stages.runs import folder as run_folder
        from stages.runs import kept

        given, model = self.given, self.model
        return {
            "command": self.same_command(),
            "stage": "finetune",
            "base": {"model": kept.lasting(given.model), "digest": self.base, "name": model.name},
            "learns": kept.learns(given),
            "objective": given.tuning.objective,
            "text": {"data": given.examples.data, "validation": given.examples.validation, "digest": self.lessons.digest},
            "tokenizer": {"kind": "the model's", "digest": model.tokenizer.digest},
            "recipe": run_folder.as_json(dataclasses.asdict(self.plan.recipe)),
            "seed": given.seed,
            "steps": self.plan.steps,
            "max_seconds": self.plan.seconds,
            "device": str(self.device),
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
        }

    def same_command(self) -> str:
        """What to type to go on."""
        return command_line("finetune", *(word for word in typed_arguments() if word != "--overwrite"))
