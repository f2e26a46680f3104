"""A training run from flags to result, in the order in which it happens."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import format as words
from engine.device import Device, start_jax
from stages.cli import process, signals
from stages.cli.command import command_line, typed_arguments
from stages.cli.console import Console

if TYPE_CHECKING:
    from stages.train.flags import Train

# JAX is started, with its allocator and its device, before anything that imports it.


def run(given: "Train") -> int:
    """Prepares, trains, evaluates, reports. Returns the exit code."""
    return carry_out(given, Run)


def carry_out(given: "Train", kind: "type[Run]") -> int:
    """As `run`, by another kind of run."""
    signals.set_phase("before anything was trained.")
    device = start_jax(given.device)
    from stages.runs import folder as run_folder

    folder = given.folder.out_dir or run_folder.default_folder(given.preset, given.text.data)
    with Console() as console:
        if given.dry_run:
            kind(given, device, folder, console).show_plan()
            console.print("A dry run: nothing was trained.")
            return 0
        run_folder.holds_run(folder)  # a folder that cannot be used is said before minutes of preparation
        with run_folder.lock_folder(folder):
            return kind(given, device, folder, console).go()


class Run:
    """What the stages of one run hand on to each other."""

    def __init__(self, given: "Train", device: Device, folder: Path, console: Console) -> None:
        from engine.text.batches import TextBatches
        from stages.runs import estimate as plan
        from stages.runs import text_data

        self.given, self.device, self.folder, self.console = given, device, folder, console
        self.recipe = chosen_recipe(given)
        self.data = text_data.prepare_text(given.text.data, given.text.validation, self.recipe.tokenizer, console)
        length = given.length
        chosen = bool(length.max_time or length.steps)
        cfg = model_config(given, self.recipe, self.data.tokenizer.vocab)
        seconds = length.max_time if chosen else 180.0
        self.plan = plan.Plan(given.preset, cfg, self.recipe, given.seed, length.steps, seconds, chosen)
        self.batches = TextBatches(self.data.train.tokens, self.recipe.context, self.recipe.batch, given.seed)
        self.ceilings = plan.measured_ceilings(console)

    def rows(self) -> list[tuple[str, str]]:
        """The banner."""
        from stages.runs import estimate as plan

        return plan.rows(self.plan, self.device, self.data, self.ceilings, self.folder)

    def show_plan(self) -> None:
        self.console.print_rows(self.rows())

    def check_memory(self) -> None:
        """Raises UserError when there is not enough for this run."""
        from stages.runs import estimate as plan

        plan.check_memory(self.plan)

    def go(self) -> int:
        """Trains what is left to train, then evaluates."""
        from stages.runs import state as resume
        from stages.runs.loop import Loop
        from stages.train import report as closing

        self.check_memory()
        before = resume.find_previous_run(self.folder, self.facts(), self.plan.cfg, self.given.folder.overwrite)
        self.show_plan()
        if before and before.finished(self.plan) and before.run.get("result") and before.sound():
            return self.already_finished(before)
        state, past = self.restore(before)
        resume.begin(self.folder, self.plan.cfg, self.data.tokenizer, self.facts(), fresh=before is None)
        loop = Loop(self.job(), past, self.console)
        if self.plan.done(past.step, past.seconds) < 1:
            step_program = self.compile(state, past.step)
            state, signal = loop.run(step_program, state)
            self.console.close_live()
            if signal:
                return self.stopped(past, signal)
        return closing.close(self, state, loop)

    def restore(self, before: Any) -> tuple[Any, Any]:
        """The state to train from, and what the run remembers."""
        from engine.training.optimizer import make_optimizer
        from engine.training.step import init_state
        from stages.runs import state as resume

        tx = make_optimizer(self.recipe.optimizer)
        return resume.restore(before, self.plan, lambda params: init_state(tx, params), self.facts(), self.console)

    def facts(self) -> dict[str, Any]:
        """run.json: everything that says how this run is trained."""
        import jax

        from stages.runs import folder as run_folder

        given = self.given
        return {
            "command": self.same_command(),
            "preset": given.preset,
            "text": {
                "data": given.text.data,
                "validation": str(given.text.validation) if given.text.validation else None,
                "digest": self.data.digest,
                "bytes": self.data.train.bytes,
                "tokens": len(self.data.train.tokens),
            },
            "tokenizer": {"kind": self.recipe.tokenizer, "digest": self.data.tokenizer.digest},
            "recipe": run_folder.as_json(dataclasses.asdict(self.recipe)),
            "seed": given.seed,
            "steps": self.plan.steps,
            "max_seconds": self.plan.seconds,
            "device": str(self.device),
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
        }

    def same_command(self) -> str:
        """What to type to go on."""
        return command_line("train", *(word for word in typed_arguments() if word != "--overwrite"))

    def compile(self, state: Any, step: int) -> Any:
        """The step's program for these shapes; `compiled(state, frozen, batch, progress)`."""
        import numpy as np

        from engine.training.optimizer import make_optimizer
        from engine.training.step import train_step

        tx = make_optimizer(self.recipe.optimizer)
        kept = f"the run is saved up to step {step:,}" if step else "nothing was trained yet"
        signals.set_phase(f"while compiling; {kept}. To begin again: {self.same_command()}")
        with self.console.task("compiling", always=True):
            lowered = train_step.lower(
                self.plan.cfg, tx, state, {}, self.batches.at(0), np.float32(0), microbatches=self.recipe.accumulate
            )
            return lowered.compile()

    def job(self) -> Any:
        from stages.runs import estimate as plan
        from stages.runs import loop

        given = self.given.folder
        digests = {"text": self.data.digest, "tokenizer": self.data.tokenizer.digest}
        return loop.LoopConfig(
            plan=self.plan,
            folder=self.folder,
            batches=self.batches,
            quick=self.quick(),
            often=loop.Intervals(given.eval_every, given.save_every, given.log_every, given.keep),
            ceiling=plan.ceiling(self.plan.cfg, self.ceilings),
            started=process.process_start(),
            facts={"seed": self.given.seed, "digests": digests},
        )

    def quick(self, **how: Any) -> Any:
        """The quick evaluation."""
        from stages.runs.validation import TextEvaluator, rows_for

        cfg = self.plan.cfg
        return TextEvaluator(self.data.validation, self.data.tokenizer, cfg.context, rows_for(cfg, cfg.context), **how)

    def sample(self, state: Any) -> str:
        """What the trained model writes."""
        from stages.train import report as closing

        return closing.sample(self, state)

    def remarks(self, state: Any) -> list[tuple[str, str]]:
        """What else the last screen says."""
        return []

    def stopped(self, past: Any, signal: int) -> int:
        """What a signal is answered with once all is saved."""
        self.console.print(
            f"Stopped at step {past.step:,}, {words.duration(past.seconds)} into training; saved in "
            f"{self.folder / 'checkpoints' / str(past.step)}.\nTo go on: {self.same_command()}"
        )
        return 128 + signal

    def already_finished(self, before: Any) -> int:
        result = before.run["result"]
        self.console.print(
            f"This run is finished: {before.past.step:,} steps in {words.duration(before.past.seconds)}, "
            f"{result['val_bits_per_byte']:.3f} bits per byte. To train it further give more --steps or --max-time; "
            "to begin anew, --overwrite."
        )
        return 0


def chosen_recipe(given: "Train") -> Any:
    """The preset's recipe with what the flags say instead."""
    from engine.model.config import preset
    from stages.runs.recipes import recipe

    base = recipe(given.preset, preset(given.preset).vocab)
    step, moves = given.step, given.optimizer
    optimizer = _changed(
        base.optimizer, kind=moves.optimizer, learning_rate=moves.learning_rate,
        matrix_learning_rate=moves.matrix_learning_rate, schedule=moves.schedule, warmup=moves.warmup,
        decay=moves.decay, weight_decay=moves.weight_decay, clip=moves.clip,
    )  # fmt: skip
    changed = _changed(
        base, tokenizer=given.text.tokenizer, context=step.context, batch=step.batch, accumulate=step.accumulate,
        scan=step.scan or None, remat=step.remat or None,
    )  # fmt: skip
    return dataclasses.replace(changed, optimizer=optimizer)


def _changed(config: Any, **values: Any) -> Any:
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


def model_config(given: "Train", recipe: Any, vocab: int) -> Any:
    """The preset with this vocabulary and context."""
    from engine.model.config import preset

    return _changed(
        preset(given.preset), vocab=vocab, context=recipe.context, dtype=given.step.dtype, scan=recipe.scan,
        remat="block" if recipe.remat else "none",
    )  # fmt: skip
