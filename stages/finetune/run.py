"""The Stage that fine-tunes a model, its run from flags, and its batches of preferences."""

import dataclasses
from typing import Any

import jax

from engine.counting.hardware import doubt_ceilings
from engine.counting.params import choose_rank, lora_bits
from engine.device import Device, return_freed_memory
from engine.errors import UserError
from engine.format import quantity
from engine.mesh import processes
from engine.mesh.shape import ONE_DEVICE, check_mesh
from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.storage import checkpoint
from engine.storage.model_loader import model_name
from engine.storage.run_folder import read_json
from engine.text.batch import EpochOrder
from engine.text.chat_tokenizer import Example
from engine.text.examples import PackedBatches, Pair, RatedPair, count_targets
from engine.text.template import read_template
from engine.training.optimizer import OptimizerConfig
from engine.training.preference import LOSSES, preference_batch, preference_objective
from engine.training.step import NEXT_TOKEN, TrainState
from stages.cli.console import Console
from stages.finetune.flags import FinetuneFlags
from stages.finetune.general_examples import general_examples, write_general_answers
from stages.runs.answers import Answer, Metrics, ask, compare, describe_faults, known_questions
from stages.runs.conversation_data import (
    held_out_evaluator,
    open_conversations,
    prepare_conversations,
    reference_logprobs,
)
from stages.runs.estimate import find_ceilings, memory_estimate, mesh_ceilings, require_room
from stages.runs.folder import default_folder
from stages.runs.general_questions import compare_known, tells_enough
from stages.runs.mesh import fits_one_device, on_one_device
from stages.runs.model_stage import ModelStage, choose_trainable
from stages.runs.plan import Recipe, RunPlan
from stages.runs.run import RunOptions, execute
from stages.runs.stage import BatchStage, LoopState, MeshBatches, RunReport, compile_step, temporary_bytes
from stages.runs.text_data import check_text_name, general_bits_per_byte

READINGS = 3  # of its data, after which a run ends when nobody asks for a length
SECONDS = 180.0  # after which such a run ends earlier
LEAST_STEPS = 100  # that such a run makes however long they take, if READINGS of its data have as many
MOST_STEPS_TO_MIX = 300  # of READINGS of its data; at 212, those of `voice`, the mix kept 36 of 40 answers instead of 29
MANY_READINGS = 6  # that somebody asks for, from which on the plan says what they do
MANY_READINGS_NOTE = f"By default it would be {READINGS} times: read more often, a small file is learned by heart."
EVALUATIONS = 5
CONTEXT = 256  # tokens of a row when nobody asks for a context
EXPECTED_MFU = 0.4
QUICK_EXAMPLES = 64  # of a quick evaluation


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
    return execute(options, lambda console: FineTuning(flags, options, console))


def choose_length(steps_a_reading: float) -> tuple[int, float | None, int]:
    """Returns the steps, the seconds and the least steps of a run when nobody asks for a length.

    It ends after READINGS readings of its data, or earlier after SECONDS, but makes LEAST_STEPS, if the readings have as many.
    """
    steps = max(1, round(READINGS * steps_a_reading))
    if steps <= LEAST_STEPS:
        return steps, None, 0
    return steps, SECONDS, LEAST_STEPS


@dataclasses.dataclass(frozen=True)
class Scores:
    """A model's score on the held-out set and on general text (bits per byte, None without one); its answers.

    `known`: the general questions that it answers right, None where they were not asked.
    """

    held_out: float
    general: float | None
    answers: tuple[Answer, ...]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    known: tuple[str, ...] | None = None


class FineTuning(ModelStage, BatchStage):
    """Fine-tunes a model. Only the constructor reads the flags."""

    advice = "--learning-rate, or warm up longer with --warmup"

    fits_device: bool | None = None  # whether one device holds the model, to answer; known after the first measurement

    def __init__(self, flags: FinetuneFlags, options: RunOptions, console: Console) -> None:
        examples, tuning, trainable = flags.examples, flags.tuning, flags.trainable
        self.answer_metrics = Metrics(examples.metric)
        self.general, self.pack, self.batch = examples.general, not examples.no_pack, tuning.rows
        self.keep_last = tuning.keep_last
        self.overwrites = options.overwrite
        self.general_examples: list[Example] = []
        is_preference = tuning.objective == "preference"
        self.objective = preference_objective(tuning.loss, tuning.beta) if is_preference else NEXT_TOKEN
        self.has_reference, self.is_rating = is_preference and LOSSES[tuning.loss].has_reference, tuning.examples == "kto"
        rate = (2e-3 if trainable.adapter else 2e-4) / (10 if is_preference else 1)
        optimizer = OptimizerConfig(
            learning_rate=tuning.learning_rate or rate,
            warmup=tuning.warmup,
            beta2=0.99,
            weight_decay=tuning.weight_decay,
            clip=tuning.clip,
        )
        rows = tuning.rows * (2 if is_preference else 1)  # of tokens
        mesh, steps, seconds = options.mesh or ONE_DEVICE, flags.length.steps, flags.length.max_time
        self.has_chosen_length = bool(steps or seconds)

        def make_plan(cfg: ModelConfig) -> None:
            """Plans the run by the architecture. Raises UserError for one that cannot be."""
            context = tuning.context or min(CONTEXT, cfg.context)
            if context > cfg.context:
                raise UserError(f"--context {context:,} is more than the {cfg.context:,} tokens {flags.model} was made for.")
            recipe = Recipe("the model's", context, rows, optimizer, flags.microbatches, tuning.scan, tuning.remat)
            cfg = dataclasses.replace(cfg, scan=tuning.scan, remat="block" if tuning.remat else "none")
            paths, self.matches = choose_trainable(cfg, self.lora, trainable.train, trainable.freeze)
            run = flags.seed, steps, seconds, paths, trainable.base
            self.plan = RunPlan(flags.model, cfg, recipe, *run, mesh=mesh, blocks=self.blocks)
            check_mesh(mesh, cfg, tuning.rows, flags.microbatches)
            parts = tuning.rows // mesh.row_shards
            lighter = "--base int8" if self.lora else "a LoRA (no --train, no --freeze)"
            remedy = f"what takes less: --accumulate {parts}, --remat, {lighter}, or a smaller model."
            require_room(self.plan, self.plan.memory.total, "A step would need about", remedy)

        if examples.general != "none":
            check_text_name(examples.general)
        for data in filter(None, (examples.data, examples.validation)):
            open_conversations(data, tuning.examples)  # raises before a model is loaded
        template, on_mesh = read_template(examples.template), options.mesh is not None
        super().__init__(flags.model, trainable, options.folder, console, template, make_plan, on_mesh)  # plans before it reads
        self.dataset = prepare_conversations(
            examples.data,
            examples.validation,
            tuning.examples,
            self.plan.recipe.context,
            flags.seed,
            self.chat,
            console,
            examples.full_loss,
        )
        self.answer_metrics.check(self.dataset.references)
        if self.lora and not (self.continued_base or trainable.lora):
            # A bit for each token, or for each preference, which says no more than yes or no.
            bits = len(self.dataset.train) if is_preference else count_targets(self.dataset.train)
            self.lora = choose_rank(self.model.cfg, self.lora, bits)
            make_plan(self.model.cfg)
            holds = f"an adapter that can hold {lora_bits(self.model.cfg, self.lora):,} bits, for data of about {bits:,}"
            self.matches += (("rank", f"{self.lora.rank}, chosen: {holds}"),)
        self.plan = dataclasses.replace(self.plan, name=self.model.name)
        self.pack_examples()
        is_small = READINGS * self._steps_a_reading() <= MOST_STEPS_TO_MIX
        has_answers = not is_preference and self.dataset.kind != "text"
        self.mixes_general = is_small and has_answers and not (examples.no_mix or on_mesh)
        self.metadata = {
            "learns": trainable.describe(self.lora),
            "objective": tuning.objective,
            "full_loss": examples.full_loss,
            "metric": examples.metric,
            "loss": tuning.loss,
            "beta": tuning.beta or LOSSES[tuning.loss].beta,
            "pack": None if is_preference else self.pack,
            "keep_last": self.keep_last,
            "general": examples.general,
            "no_mix": examples.no_mix,
            "template": self.chat.template_name,
            "text": {
                "data": examples.data,
                "validation": examples.validation,
                "digest": self.dataset.digest,
                "validation_digest": self.dataset.held_out_digest,
            },
        }
        self.peak_flops = mesh_ceilings(find_ceilings(console), self.plan.mesh).peak_flops(self.plan.cfg.dtype)

    def pack_examples(self) -> None:
        """Packs the examples that are trained on, and sets the length of the run by them where nobody asked for one."""
        if self.objective is NEXT_TOKEN:
            examples = [*self.dataset.train, *self.general_examples]
            self.packed = PackedBatches(examples, self.plan.recipe.context, self.batch, self.plan.seed, self.pack)
        if not self.has_chosen_length:
            steps, seconds, least_steps = choose_length(self._steps_a_reading())
            self.plan = dataclasses.replace(self.plan, steps=steps, seconds=seconds, least_steps=least_steps)

    def load_weights(self) -> None:
        super().load_weights()
        if not self.mixes_general:
            return
        answers = self._saved_general_answers()
        if answers is None:
            cfg, conversations = self.plan.cfg, self.dataset.train_references
            with self.console.task("answering general questions to mix in") as report:
                params = self.initial_params()
                answers = write_general_answers(cfg, params, self.chat, conversations, self.stop_token_ids, report)
            _clear_programs()
        self.general_examples = general_examples(self.chat, answers, self.plan.recipe.context)
        self.metadata["general_answers"] = answers
        self.metadata["mixed_in"] = len(self.general_examples) or None
        self.pack_examples()

    def _saved_general_answers(self) -> list[tuple[str, str]] | None:
        """Returns the answers that the run in the folder has mixed in, to go on with the same; None where there is none."""
        if self.overwrites or not checkpoint.steps(self.folder):
            return None
        answers = read_json(self.folder / "run.json").get("general_answers") or []  # [] of an earlier version's run
        return [(str(question), str(answer)) for question, answer in answers]

    def plan_rows(self) -> list[tuple[str, str]]:
        plan, recipe, dataset = self.plan, self.plan.recipe, self.dataset
        steps, long = plan.predict(plan.step_flops / (EXPECTED_MFU * self.peak_flops))
        readings = steps / self._steps_a_reading()
        counted = f"{quantity(steps, plan.step_name)}, " if plan.seconds else ""  # else they are said already
        rows, *problems = dataset.summary
        examples = "answer" if self.is_rating else {"text": "piece", "preference": "pair"}.get(dataset.kind, "example")
        return [
            *self.model_rows(),
            *self.matches,
            ("predicted", plan.cost_relative_to_full()),
            ("memory", memory_estimate(plan, plan.memory.total)),
            ("data", f"{dataset.name} ({dataset.kind}): {rows}; {quantity(len(dataset.train), examples)} to train on"),
            *(("", line) for line in problems),
            ("validation", f"{dataset.held_out_name}: {quantity(len(dataset.held_out), examples)}"),
            ("", dataset.overlap),
            ("mixed in", self._describe_mix()),
            ("template", self.chat.template_name),
            ("packing", self.packed.describe() if self.objective is NEXT_TOKEN else ""),
            ("step", f"{recipe.batch} x {recipe.context} tokens, adamw, learning rate {recipe.optimizer.learning_rate:g}"),
            ("length", f"{plan.length()}; about {counted}{long}, {readings:,.1f} times the data"),
            ("", MANY_READINGS_NOTE if readings >= MANY_READINGS else ""),
        ]

    def _describe_mix(self) -> str:
        if not self.mixes_general:
            return ""
        if "general_answers" not in self.metadata:  # a dry run
            return "general questions, answered in the tone of the data before training (not with --no-mix)"
        count = len(self.general_examples)
        if not count:
            return "nothing: too few general questions were answered right in the tone of the data"
        return f"{quantity(count, 'general question')}, answered in the tone of the data before training (not with --no-mix)"

    def _steps_a_reading(self) -> float:
        """Returns how many steps read all of the data once."""
        count = self.packed.order.count if self.objective is NEXT_TOKEN else len(self.dataset.train)
        return count / self.batch

    def print_example(self) -> None:
        """Prints the first example, or both answers of the first pair, marking the tokens that are trained on."""
        first = self.dataset.train[0]
        answers = {"the first example": first}
        if isinstance(first, RatedPair):
            answers = {f"the first answer, a {'good' if first.is_good else 'bad'} one": first.answer}
        elif isinstance(first, Pair):
            answers = {"the chosen answer": first.answer, "the rejected answer": first.other}
        for name, example in answers.items():
            self.console.print(f"\n{name}; what is trained on is marked", style="bold")
            self.console.print_marked(list(self.chat.marked_pieces(example)))
        self.console.print()

    def prompt(self) -> tuple[str, list[int]]:
        question = self.dataset.questions[0]
        return question[-1]["content"], self.chat.prompt(question).tolist()

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> None:
        plan, frozen = self.plan, self.frozen
        # Programs that measured are read from the cache when they run again; the step needs their memory.
        _clear_programs()
        batches = self._batches()
        with self.console.task("compiling", always=True):
            program = compile_step(plan, state, frozen, batches.at(0), self.objective)
        _clear_programs()
        self.begin_steps(program, temporary_bytes(program), batches, self._evaluator(QUICK_EXAMPLES), loop_state.step)

    def finish(self, state: TrainState, loop_state: LoopState, warm_rate: float | None, before: Scores) -> RunReport:
        trainable, step, plan, seconds = state.trainable, loop_state.step, self.plan, loop_state.seconds
        if not self.keep_last and loop_state.best_step is not None and loop_state.best_step != step:
            step = loop_state.best_step
            trainable = self.load_trained(step)
        try:
            after = self.measure(trainable, before)
        except UserError as error:
            raise UserError(f"{error} The trained model is in {self.folder}, and the same command measures it.") from error
        path = self.save_trained(step, trainable)
        rate = loop_state.step / max(seconds, 1e-9)
        speed, share_of_ceiling = rate * plan.step_tokens, (warm_rate or rate) * plan.step_flops / self.peak_flops
        doubt_ceilings(share_of_ceiling)
        trained_count = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
        unit = self.unit
        result = {
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "unit": unit,
            "train_seconds": seconds,
            "tokens_per_second": speed,
            "flops_share_of_ceiling": share_of_ceiling,
            "general": self.general,
            "kept_step": step if step != loop_state.step else None,
        }
        chosen = f"step {step:,}, the best evaluated; the last, {loop_state.step:,}, is still there to train on from"
        forgotten = "not measured"
        if before.general is not None:
            forgotten = f"{before.general:.3f} -> {after.general:.3f} bits per byte on {self.general}"
        scored = f"of {quantity(len(self.dataset.references[:QUICK_EXAMPLES]), 'held-out answer')}"
        kept_answers = None if before.known is None else compare_known(before.known, after.known)
        if kept_answers:
            result["kept_answers"] = dataclasses.asdict(kept_answers)
        rows = [
            ("held out", f"{before.held_out:.3f} -> {after.held_out:.3f} {unit} on {self.dataset.held_out_name}"),
            *((name, f"{before.metrics[name]:.3f} -> {value:.3f} {scored}") for name, value in after.metrics.items()),
            ("forgotten", forgotten),
            *(kept_answers.rows() if kept_answers else ()),
            ("speed", f"{speed:,.0f} tokens/s, {share_of_ceiling:.0%} of the ceiling"),
            ("answers", describe_faults(after.answers) if after.answers else ""),
            ("chosen", chosen if step != loop_state.step else ""),
        ]
        noted = ([(answer.text, answer.faults) for answer in scores.answers] for scores in (before, after))
        texts = compare([answer.question for answer in after.answers], *noted)
        saved, as_trained = f"{path} ({trained_count:,} parameters)", " --weights q4" * self.in_blocks
        return RunReport(result, texts, rows, saved, ["chat", f"serve{as_trained}", f"evaluate{as_trained}", "export"])

    def _batches(self) -> MeshBatches:
        pairs, plan, seq = self.dataset.train, self.plan, self.plan.recipe.context
        if self.objective is NEXT_TOKEN:
            return MeshBatches(self.packed.order, self.packed.at)
        order = EpochOrder(len(pairs), self.batch, plan.seed)
        with self.console.task("computing reference log-probabilities", always=self.has_reference) as report:
            logprobs = reference_logprobs(plan.cfg, self._reference(), pairs, seq, self.batch, report)
        items = lambda step, rows: [index for _, index in order.at(step, rows)]
        return MeshBatches(order, lambda step, rows: preference_batch(pairs, items(step, rows), seq, logprobs))

    def _evaluator(self, limit: int | None = None) -> Any:
        plan, examples = self.plan, self.dataset.held_out[:limit]
        return held_out_evaluator(plan.cfg, self.frozen, self._reference(), examples, self.objective, plan.recipe.context)

    def _reference(self) -> Any:
        """Returns the params before training where the loss compares with them, else None."""
        return self.initial_params() if self.has_reference else None

    def measure(self, trainable: Any, before: Scores | None = None) -> Scores:
        """Measures the model. `before`: what was measured before training, when this is after it."""
        return_freed_memory()
        cfg, seq, general, evaluator = self.plan.cfg, self.plan.recipe.context, None, self._evaluator()
        self.unit = evaluator.unit
        with self.console.task("evaluating", always=True) as report:
            held_out = evaluator.evaluate(trainable, report)
        params = merge(trainable, self.frozen)
        if self.general != "none":
            general = general_bits_per_byte(cfg, params, self.tokenizer, self.general, seq, self.console)
        _clear_programs()  # as large as a small model, and not run again soon
        questions = self.dataset.questions if processes.is_first() else ()
        if self.fits_device is None:
            self.fits_device = fits_one_device(params)
        if not self.fits_device:
            return Scores(held_out, general, ())
        known = None
        measures_general = self.general != "none" and (before is None or tells_enough(before.known or ()))
        with self.console.task("answering held-out questions") as report, on_one_device(params) as whole:
            answers = ask(cfg, whole, self.chat, questions, self.stop_token_ids, report)
            references, metrics = self.dataset.references[:QUICK_EXAMPLES], dict[str, float]()
            if processes.is_first():
                metrics = self.answer_metrics.score(cfg, whole, self.chat, references, self.stop_token_ids, report)
            if measures_general and processes.is_first():
                known = known_questions(cfg, whole, self.chat, self.stop_token_ids, report)
        return Scores(held_out, general, answers, metrics, known)


def _clear_programs() -> None:
    jax.clear_caches()
    return_freed_memory()
