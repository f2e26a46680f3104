"""Fine-tuning: what it begins with, its steps, and its scores; `plan.py` has what is known before."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from engine.device import Device, return_freed_memory
from engine.errors import UserError
from engine.format import quantity
from engine.mesh import processes
from engine.model.paths import merge
from engine.storage import checkpoint
from engine.storage.model_loader import model_name
from engine.storage.run_folder import read_json
from engine.text.batch import EpochOrder
from engine.text.chat_tokenizer import Example
from engine.text.examples import PackedBatches
from engine.text.template import Message
from engine.training.preference import Preferences, preference_batch
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.finetune.flags import FinetuneFlags
from stages.finetune.general_examples import general_examples, write_general_answers
from stages.finetune.plan import TuningPlan, plan_tuning, print_first_example, tuning_rows, with_length
from stages.finetune.report import QUICK_EXAMPLES, Measured, Scores, tuning_report
from stages.runs.answers import ask, known_questions
from stages.runs.batch_steps import BatchSteps, MeshBatches, temporary_bytes
from stages.runs.conversation_data import held_out_evaluator, reference_logprobs
from stages.runs.folder import default_folder
from stages.runs.general_questions import tells_enough
from stages.runs.mesh import fits_one_device, on_one_device
from stages.runs.model_stage import PreparedModel, Rows, load_weights
from stages.runs.options import RunOptions
from stages.runs.run import execute
from stages.runs.stage import Finished, LoopState, RunReport, compile_step
from stages.runs.text_data import Evaluator, general_bits_per_byte

EVALUATIONS = 5


def run(flags: FinetuneFlags, device: Device) -> int:
    options = RunOptions(
        **dataclasses.asdict(flags.folder),
        stage="finetune",
        device=device,
        folder=flags.folder.out_dir or default_folder(model_name(flags.model), flags.examples.data),
        dry_run=flags.dry_run,
        eval_every=flags.tuning.eval_every,
        evaluations=EVALUATIONS,
        mesh=flags.mesh.shape(),
        patience=flags.tuning.patience,
    )
    return execute(options, lambda console: plan_tuning(flags, options, console), prepare_tuning)


def prepare_tuning(planned: TuningPlan, console: Console) -> "PreparedTuning":
    weights = load_weights(planned.opened, planned.plan, console)
    prepared = PreparedTuning(
        plan=planned.plan,
        metadata={**weights.metadata, **planned.metadata},
        advice="--learning-rate, or warm up longer with --warmup",
        tokenizer=planned.opened.tokenizer,
        stop_token_ids=planned.opened.stop_token_ids,
        sampling=planned.opened.model.sampling,
        trainable=weights.trainable,
        frozen=weights.frozen,
        frozen_as_loaded=weights.frozen_as_loaded,
        objective=planned.objective,
        opened=planned.opened,
        params=weights.params,
        tuning=planned,
    )
    if planned.mixes_general:
        return mix_general_answers(prepared, console)
    return prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTuning(PreparedModel):
    """What a fine-tuning begins with."""

    tuning: TuningPlan
    mixed_in: int | None = None  # general questions; None where none was to be

    def rows(self, console: Console) -> Rows:
        numbers = sum(leaf.size for leaf in jax.tree.leaves(self.trainable))
        return tuning_rows(self.tuning, self._describe_mix(), numbers)

    def _describe_mix(self) -> str:
        if self.mixed_in is None:
            return ""
        if not self.mixed_in:
            return "nothing: too few general questions were answered right in the tone of the data"
        count = quantity(self.mixed_in, "general question")
        return f"{count}, answered in the tone of the data before training (not with --no-mix)"

    def print_example(self, console: Console) -> None:
        print_first_example(self.tuning, console)

    def prompt(self) -> tuple[str, list[int]]:
        question = self.tuning.dataset.questions[0]
        return question[-1]["content"], self.opened.chat.prompt(question).tolist()

    def begin_steps(
        self, state: TrainState, loop_state: LoopState, compiling: Any, console: Console
    ) -> BatchSteps:
        # Programs that measured are read from the cache when they run again; the step needs their
        # memory.
        _clear_programs()
        batches = self._batches(console)
        with console.task("compiling", always=True):
            program = compile_step(self.plan, state, self.frozen, batches.at(0), self.objective)
        _clear_programs()
        evaluator = self._evaluator(QUICK_EXAMPLES)
        buffer_bytes = temporary_bytes(program)
        peak_flops = self.tuning.peak_flops
        return BatchSteps(
            self.plan, program, buffer_bytes, self.frozen, batches, evaluator, loop_state.step, peak_flops
        )

    def _batches(self, console: Console) -> MeshBatches:
        packed = self.tuning.packed
        if packed:
            return MeshBatches(packed.order, packed.at)
        pairs = self.tuning.dataset.train
        plan = self.plan
        seq = plan.recipe.context
        rows = self.tuning.rows_a_step
        order = EpochOrder(len(pairs), rows, plan.seed)
        with console.task(
            "computing reference log-probabilities", always=self.tuning.has_reference
        ) as report:
            logprobs = reference_logprobs(plan.cfg, self._reference(), pairs, seq, rows, report)

        def read(step: int, part: slice) -> Preferences:
            items = [index for _, index in order.at(step, part)]
            return preference_batch(pairs, items, seq, logprobs)

        return MeshBatches(order, read)

    def _evaluator(self, limit: int | None = None) -> Evaluator:
        examples = self.tuning.dataset.held_out[:limit]
        seq = self.plan.recipe.context
        return held_out_evaluator(
            self.plan.cfg, self.frozen, self._reference(), examples, self.objective, seq
        )

    def _reference(self) -> Any:
        """Returns the params before training where the loss compares with them, else None."""
        if self.tuning.has_reference:
            return self.initial_params()
        return None

    def measure(self, trainable: Any, console: Console, before: Measured | None = None) -> Measured:
        """Measures the model. `before`: what was measured before training, when this is after it."""
        return_freed_memory()
        cfg = self.plan.cfg
        tuning = self.tuning
        evaluator = self._evaluator()
        with console.task("evaluating", always=True) as report:
            held_out = evaluator.evaluate(trainable, report)
        assert held_out is not None
        params = merge(trainable, self.frozen)
        general = None
        if tuning.general != "none":
            general = general_bits_per_byte(
                cfg, params, self.tokenizer, tuning.general, self.plan.recipe.context, console
            )
        _clear_programs()  # as large as a small model, and not run again soon
        fits_device = before.fits_device if before else fits_one_device(params)
        if not fits_device:
            return Measured(Scores(held_out, general, ()), evaluator.unit, fits_device)
        asks_general = tuning.general != "none" and (
            before is None or tells_enough(before.scores.known or ())
        )
        questions: Sequence[Sequence[Message]] = ()
        if processes.is_first():
            questions = tuning.dataset.questions
        references = tuning.dataset.references[:QUICK_EXAMPLES]
        chat = self.opened.chat
        stops = self.stop_token_ids
        metrics: dict[str, float] = {}
        known = None
        with console.task("answering held-out questions") as report, on_one_device(params) as whole:
            answers = ask(cfg, whole, chat, questions, stops, report)
            if processes.is_first():
                metrics = tuning.answer_metrics.score(cfg, whole, chat, references, stops, report)
            if asks_general and processes.is_first():
                known = known_questions(cfg, whole, chat, stops, report)
        return Measured(Scores(held_out, general, answers, metrics, known), evaluator.unit, fits_device)

    def report(self, finished: Finished, console: Console) -> RunReport:
        step = finished.loop_state.step
        best_step = finished.loop_state.best_step
        trainable = finished.state.trainable
        if not self.tuning.keep_last and best_step is not None and best_step != step:
            step = best_step
            trainable = self.load_trained(step)
        try:
            after = self.measure(trainable, console, finished.before)
        except UserError as error:
            folder = self.opened.folder
            raise UserError(
                f"{error} The trained model is in {folder}, and the same command measures it."
            ) from error
        path = self.check_frozen(step)
        return tuning_report(self.tuning, finished, after, step, path)


def mix_general_answers(prepared: PreparedTuning, console: Console) -> PreparedTuning:
    """Returns it with general questions among its examples, which the model answers in the tone of
    the data."""
    tuning = prepared.tuning
    chat = prepared.opened.chat
    answers = saved_general_answers(prepared.opened.folder, tuning.overwrites)
    if answers is None:
        conversations = tuning.dataset.train_references
        with console.task("answering general questions to mix in") as report:
            params = prepared.initial_params()
            answers = write_general_answers(
                prepared.plan.cfg, params, chat, conversations, prepared.stop_token_ids, report
            )
        _clear_programs()
    examples = general_examples(chat, answers, prepared.plan.recipe.context)
    tuning = with_length(dataclasses.replace(tuning, packed=pack_more(tuning.packed, examples)))
    more = {"general_answers": answers, "mixed_in": len(examples) or None}
    return dataclasses.replace(
        prepared, plan=tuning.plan, metadata=prepared.metadata | more, tuning=tuning, mixed_in=len(examples)
    )


def pack_more(packed: PackedBatches | None, examples: Sequence[Example]) -> PackedBatches:
    assert packed is not None
    return dataclasses.replace(packed, examples=[*packed.examples, *examples])


def saved_general_answers(folder: Path, overwrites: bool) -> list[tuple[str, str]] | None:
    """Returns the answers that the run in the folder has mixed in, to go on with the same; None
    where there is none."""
    if overwrites or not checkpoint.steps(folder):
        return None
    answers = read_json(folder / "run.json").get("general_answers") or []  # [] of an earlier version's run
    return [(str(question), str(answer)) for question, answer in answers]


def _clear_programs() -> None:
    jax.clear_caches()
    return_freed_memory()
