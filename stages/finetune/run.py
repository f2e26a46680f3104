"""Fine-tuning: what it begins with, its steps, and its scores; `plan.py` has what is known before."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from engine.allocator import return_freed_memory
from engine.device import Device
from engine.errors import UserError
from engine.format import quantity
from engine.mesh import processes
from engine.model.paths import merge
from engine.model.transformer import Params
from engine.storage import checkpoint
from engine.storage.model_loader import model_name
from engine.storage.run_folder import read_json
from engine.text.batch import EpochOrder
from engine.text.chat_tokenizer import Example
from engine.text.packing import PackedBatches
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
from stages.runs.model_stage import PreparedModel, Rows
from stages.runs.options import RunOptions
from stages.runs.run import execute
from stages.runs.stage import Finished, LoopState, RunReport
from stages.runs.step_program import compile_step
from stages.runs.text_evaluators import Evaluator, general_bits_per_byte

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
    advice = "--learning-rate, or warm up longer with --warmup"
    prepared = PreparedTuning.load(planned, console, advice)
    if planned.mixes_general:
        return mix_general_answers(prepared, console)
    return prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTuning(PreparedModel[TuningPlan]):
    """What a fine-tuning begins with."""

    mixed_in: int | None = None  # general questions; None where none was to be

    def rows(self, console: Console) -> Rows:
        return tuning_rows(self.planned, self._describe_mix(), self.count_trained_numbers())

    def _describe_mix(self) -> str:
        if self.mixed_in is None:
            return ""
        if not self.mixed_in:
            return "nothing: too few general questions were answered right in the tone of the data"
        count = quantity(self.mixed_in, "general question")
        return f"{count}, answered in the tone of the data before training (not with --no-mix)"

    def print_example(self, console: Console) -> None:
        print_first_example(self.planned, console)

    def prompt(self) -> tuple[str, list[int]]:
        question = self.planned.dataset.questions[0]
        return question[-1]["content"], self.opened.chat.prompt(question).tolist()

    def begin_steps(
        self, state: TrainState, loop_state: LoopState, compiling: Any, console: Console
    ) -> BatchSteps:
        # Measuring compiled programs that the compilation cache also holds: forget them, since the
        # step needs their memory.
        _clear_programs()
        batches = self._batches(console)
        with console.task("compiling", always=True):
            program = compile_step(self.plan, state, self.frozen, batches.at(0), self.objective)
        _clear_programs()
        evaluator = self._evaluator(QUICK_EXAMPLES)
        return BatchSteps(
            plan=self.plan,
            program=program,
            buffer_bytes=temporary_bytes(program),
            frozen=self.frozen,
            batches=batches,
            evaluator=evaluator,
            first_step=loop_state.step,
            peak_flops=self.planned.peak_flops,
        )

    def _batches(self, console: Console) -> MeshBatches:
        packed = self.planned.packed
        if packed:
            return MeshBatches(packed.order, packed.at)
        return self._preference_batches(console)

    def _preference_batches(self, console: Console) -> MeshBatches:
        pairs = self.planned.dataset.train
        seq = self.plan.recipe.context
        rows_a_step = self.planned.rows_a_step
        order = EpochOrder(len(pairs), rows_a_step, self.plan.seed)
        with console.task(
            "computing reference log-probabilities", always=self.planned.has_reference
        ) as report_progress:
            logprobs = reference_logprobs(
                self.plan.cfg, self._reference(), pairs, seq, rows_a_step, report_progress
            )

        def read(step: int, rows: slice) -> Preferences:
            items = [index for _, index in order.at(step, rows)]
            return preference_batch(pairs, items, seq, logprobs)

        return MeshBatches(order, read)

    def _evaluator(self, limit: int | None = None) -> Evaluator:
        examples = self.planned.dataset.held_out[:limit]
        seq = self.plan.recipe.context
        return held_out_evaluator(
            self.plan.cfg, self.frozen, self._reference(), examples, self.objective, seq
        )

    def _reference(self) -> Any:
        """Returns the params before training where the loss compares with them, else None."""
        if self.planned.has_reference:
            return self.initial_params()
        return None

    def measure(self, trainable: Any, console: Console) -> Measured:
        """Measures the model before training."""
        return self._measure(trainable, console, before=None)

    def _measure(self, trainable: Any, console: Console, before: Measured | None) -> Measured:
        """Measures the model. `before`: what was measured before training, when this is after it."""
        return_freed_memory()
        evaluator = self._evaluator()
        with console.task("evaluating", always=True) as report_progress:
            held_out = evaluator.evaluate(trainable, report_progress)
        assert held_out is not None
        params = merge(trainable, self.frozen)
        general = self._measure_general(params, console)
        _clear_programs()  # as large as a small model, and not run again soon
        scores = Scores(held_out, general, answers=())
        fits_device = before.fits_device if before else fits_one_device(params)
        if fits_device:
            knows_enough = before is None or tells_enough(before.scores.known or ())
            asks_general = self.planned.general != "none" and knows_enough
            scores = self._answer(scores, params, asks_general, console)
        return Measured(scores, evaluator.unit, fits_device)

    def _measure_general(self, params: Params, console: Console) -> float | None:
        """Returns the bits per byte of the general text, None where there is none."""
        text = self.planned.general
        if text == "none":
            return None
        return general_bits_per_byte(
            self.plan.cfg, params, self.tokenizer, text, self.plan.recipe.context, console
        )

    def _answer(self, scores: Scores, params: Params, asks_general: bool, console: Console) -> Scores:
        """Returns the scores with answers to held-out questions, their metrics, and the general
        questions that are answered right; in processes other than 0 without these."""
        cfg = self.plan.cfg
        dataset = self.planned.dataset
        chat = self.opened.chat
        stops = self.stop_token_ids
        with console.task("answering held-out questions") as report_progress, on_one_device(params) as whole:
            if not processes.is_first():
                return scores
            answers = ask(cfg, whole, chat, dataset.questions, stops, report_progress)
            references = dataset.references[:QUICK_EXAMPLES]
            metrics = self.planned.answer_metrics.score(cfg, whole, chat, references, stops, report_progress)
            known = None
            if asks_general:
                known = known_questions(cfg, whole, chat, stops, report_progress)
        return dataclasses.replace(scores, answers=answers, metrics=metrics, known=known)

    def report(self, finished: Finished, console: Console) -> RunReport:
        step = finished.loop_state.step
        best_step = finished.loop_state.best_step
        trainable = finished.state.trainable
        if not self.planned.keep_last and best_step is not None and best_step != step:
            step = best_step
            trainable = self.load_trained(step)
        try:
            after = self._measure(trainable, console, finished.before)
        except UserError as error:
            folder = self.opened.folder
            raise UserError(
                f"{error} The trained model is in {folder}, and the same command measures it."
            ) from error
        self.opened.chat.close()
        self.check_frozen()
        return tuning_report(self.planned, finished, after, step, self.checkpoint(step))


def mix_general_answers(prepared: PreparedTuning, console: Console) -> PreparedTuning:
    """Returns it with general questions among its examples, which the model answers in the tone of
    the data."""
    planned = prepared.planned
    chat = prepared.opened.chat
    answers = saved_general_answers(prepared.opened.folder, planned.overwrites)
    if answers is None:
        conversations = planned.dataset.train_references
        with console.task("answering general questions to mix in") as report_progress:
            params = prepared.initial_params()
            answers = write_general_answers(
                prepared.plan.cfg, params, chat, conversations, prepared.stop_token_ids, report_progress
            )
        _clear_programs()
    examples = general_examples(chat, answers, prepared.plan.recipe.context)
    packed = pack_more(planned.packed, examples)
    mixed = prepared.with_plan(with_length(dataclasses.replace(planned, packed=packed)))
    more = {"general_answers": answers, "mixed_in": len(examples) or None}
    return dataclasses.replace(mixed, metadata=prepared.metadata | more, mixed_in=len(examples))


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
