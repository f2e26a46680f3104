"""Fine-tuning: its plan from flags and data, what it begins with, its steps, and its report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from engine.counting.hardware import doubt_ceilings
from engine.device import Device, return_freed_memory
from engine.errors import UserError
from engine.format import quantity
from engine.mesh import processes
from engine.mesh.shape import ONE_DEVICE, check_mesh
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import merge
from engine.storage import checkpoint
from engine.storage.model_loader import model_name
from engine.storage.run_folder import read_json
from engine.text.batch import EpochOrder
from engine.text.chat_tokenizer import Example
from engine.text.examples import PackedBatches, Pair, RatedPair, count_targets
from engine.text.template import Message, read_template
from engine.training.lora_rank import choose_rank, lora_bits
from engine.training.optimizer import OptimizerConfig
from engine.training.preference import LOSSES, Preferences, preference_batch, preference_objective
from engine.training.step import NEXT_TOKEN, Objective, TrainState
from stages.cli.console import Console
from stages.finetune.flags import FinetuneFlags
from stages.finetune.general_examples import general_examples, write_general_answers
from stages.runs.answers import AnswerMetrics, JudgedAnswer, ask, compare, describe_faults, known_questions
from stages.runs.batch_steps import BatchSteps, MeshBatches, temporary_bytes
from stages.runs.conversation_data import (
    ConversationData,
    held_out_evaluator,
    open_conversations,
    prepare_conversations,
    reference_logprobs,
)
from stages.runs.estimate import find_ceilings, memory_estimate, mesh_ceilings, require_room
from stages.runs.folder import default_folder
from stages.runs.general_questions import compare_known, tells_enough
from stages.runs.mesh import fits_one_device, on_one_device
from stages.runs.model_stage import (
    OpenedModel,
    PreparedModel,
    Rows,
    choose_trainable,
    load_weights,
    model_rows,
    open_model,
)
from stages.runs.options import RunOptions
from stages.runs.plan import Recipe, RunPlan
from stages.runs.run import execute
from stages.runs.stage import Finished, LoopState, RunReport, compile_step
from stages.runs.text_data import Evaluator, check_text_name, general_bits_per_byte

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
    return execute(options, lambda console: plan_tuning(flags, options, console))


# The plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """What a fine-tuning will do: the opened model, the data, and how it is trained on."""

    plan: RunPlan
    opened: OpenedModel
    dataset: ConversationData
    metadata: dict[str, Any]  # of run.json, but for what the weights tell
    matches: Rows  # what each rule of --train and --freeze matched
    objective: Objective
    has_reference: bool  # whether the loss compares with the model before training
    packed: PackedBatches | None  # the examples in rows; None for preferences
    rows_a_step: int  # or pairs
    has_chosen_length: bool  # by --steps or --max-time
    mixes_general: bool  # whether general questions are mixed in
    keep_last: bool
    overwrites: bool  # a run in the folder
    general: str  # the text that shows what was forgotten, or none
    answer_metrics: AnswerMetrics
    peak_flops: float

    def rows(self, console: Console) -> Rows:
        mix = ""
        if self.mixes_general:
            mix = "general questions, answered in the tone of the data before training (not with --no-mix)"
        return tuning_rows(self, mix)

    def print_example(self, console: Console) -> None:
        print_first_example(self, console)

    def steps_a_reading(self) -> float:
        """Returns how many steps read all of the data once."""
        if self.packed:
            return self.packed.order.count / self.rows_a_step
        return len(self.dataset.train) / self.rows_a_step

    def prepare(self, console: Console) -> "PreparedTuning":
        weights = load_weights(self.opened, self.plan)
        prepared = PreparedTuning(
            plan=self.plan,
            metadata={**weights.metadata, **self.metadata},
            advice="--learning-rate, or warm up longer with --warmup",
            tokenizer=self.opened.tokenizer,
            stop_token_ids=self.opened.stop_token_ids,
            sampling=self.opened.model.sampling,
            trainable=weights.trainable,
            frozen=weights.frozen,
            frozen_as_loaded=weights.frozen_as_loaded,
            objective=self.objective,
            opened=self.opened,
            params=weights.params,
            tuning=self,
        )
        if self.mixes_general:
            return mix_general_answers(prepared, console)
        return prepared


def plan_tuning(flags: FinetuneFlags, options: RunOptions, console: Console) -> TuningPlan:
    """Plans a fine-tuning, of which only this reads the flags. Raises UserError for flags, data and
    a model that do not fit."""
    examples = flags.examples
    tuning = flags.tuning
    answer_metrics = AnswerMetrics(examples.metric)
    if examples.general != "none":
        check_text_name(examples.general)
    for data in filter(None, (examples.data, examples.validation)):
        open_conversations(data, tuning.examples)  # raises before a model is loaded

    def check_room(cfg: ModelConfig, lora: LoraConfig | None, blocks: Any) -> None:
        plan, _ = plan_for_model(flags, options, cfg, lora, blocks)
        require_room_for_step(plan, flags, is_adapter=lora is not None)

    template = read_template(examples.template)
    on_mesh = options.mesh is not None
    opened = open_model(flags.model, flags.trainable, options.folder, console, template, check_room, on_mesh)
    context = choose_context(flags, opened.model.cfg)
    dataset = prepare_conversations(
        examples.data,
        examples.validation,
        tuning.examples,
        context,
        flags.seed,
        opened.chat,
        console,
        examples.full_loss,
    )
    answer_metrics.check(dataset.references)
    is_preference = tuning.objective == "preference"
    rank_rows: Rows = []
    if opened.lora and not opened.continued_base and not flags.trainable.lora:
        lora, rank_rows = choose_adapter(opened.model.cfg, opened.lora, dataset, is_preference)
        opened = dataclasses.replace(opened, lora=lora)
    plan, matches = plan_for_model(flags, options, opened.model.cfg, opened.lora, opened.blocks)
    require_room_for_step(plan, flags, is_adapter=opened.lora is not None)
    plan = dataclasses.replace(plan, name=opened.model.name)
    objective = NEXT_TOKEN
    has_reference = False
    packed = None
    if is_preference:
        objective = preference_objective(tuning.loss, tuning.beta)
        has_reference = LOSSES[tuning.loss].has_reference
    else:
        packed = PackedBatches(dataset.train, context, tuning.rows, flags.seed, not examples.no_pack)
    planned = TuningPlan(
        plan=plan,
        opened=opened,
        dataset=dataset,
        metadata=tuning_metadata(flags, opened, dataset),
        matches=[*matches, *rank_rows],
        objective=objective,
        has_reference=has_reference,
        packed=packed,
        rows_a_step=tuning.rows,
        has_chosen_length=bool(flags.length.steps or flags.length.max_time),
        mixes_general=False,
        keep_last=tuning.keep_last,
        overwrites=options.overwrite,
        general=examples.general,
        answer_metrics=answer_metrics,
        peak_flops=mesh_ceilings(find_ceilings(console), plan.mesh).peak_flops(plan.cfg.dtype),
    )
    is_small = READINGS * planned.steps_a_reading() <= MOST_STEPS_TO_MIX
    has_answers = not is_preference and dataset.kind != "text"
    mixes_general = is_small and has_answers and not (examples.no_mix or on_mesh)
    return with_length(dataclasses.replace(planned, mixes_general=mixes_general))


def choose_context(flags: FinetuneFlags, cfg: ModelConfig) -> int:
    return flags.tuning.context or min(CONTEXT, cfg.context)


def plan_for_model(
    flags: FinetuneFlags, options: RunOptions, cfg: ModelConfig, lora: LoraConfig | None, blocks: Any
) -> tuple[RunPlan, Rows]:
    """Plans the run by a model's architecture; returns also what each rule matched. Raises
    UserError for one that cannot be."""
    tuning = flags.tuning
    trainable = flags.trainable
    is_preference = tuning.objective == "preference"
    context = choose_context(flags, cfg)
    if context > cfg.context:
        raise UserError(f"--context {context:,} is more than the {cfg.context:,} tokens {flags.model} was made for.")
    rate = 2e-4
    rows = tuning.rows
    if trainable.adapter:
        rate = 2e-3
    if is_preference:
        rate /= 10
        rows *= 2  # of tokens: both answers
    optimizer = OptimizerConfig(
        learning_rate=tuning.learning_rate or rate,
        warmup=tuning.warmup,
        beta2=0.99,
        weight_decay=tuning.weight_decay,
        clip=tuning.clip,
    )
    recipe = Recipe(
        tokenizer="the model's",
        context=context,
        batch=rows,
        optimizer=optimizer,
        accumulate=flags.microbatches,
        scan=tuning.scan,
        remat=tuning.remat,
    )
    cfg = dataclasses.replace(cfg, scan=tuning.scan, remat="block" if tuning.remat else "none")
    paths, matches = choose_trainable(cfg, lora, trainable.train, trainable.freeze)
    plan = RunPlan(
        name=flags.model,
        cfg=cfg,
        recipe=recipe,
        seed=flags.seed,
        steps=flags.length.steps,
        seconds=flags.length.max_time,
        trainable=paths,
        base=trainable.base,
        mesh=options.mesh or ONE_DEVICE,
        blocks=blocks,
    )
    return plan, matches


def require_room_for_step(plan: RunPlan, flags: FinetuneFlags, is_adapter: bool) -> None:
    check_mesh(plan.mesh, plan.cfg, flags.tuning.rows, flags.microbatches)
    parts = flags.tuning.rows // plan.mesh.row_shards
    lighter = "a LoRA (no --train, no --freeze)"
    if is_adapter:
        lighter = "--base int8"
    remedy = f"what takes less: --accumulate {parts}, --remat, {lighter}, or a smaller model."
    require_room(plan, plan.memory.total, "A step would need about", remedy)


def choose_adapter(
    cfg: ModelConfig, lora: LoraConfig, dataset: ConversationData, is_preference: bool
) -> tuple[LoraConfig, Rows]:
    """Returns the adapter that can hold what the data teach, and a row that says so.

    A token teaches a bit, and so does a preference, which says no more than yes or no.
    """
    bits = len(dataset.train)
    if not is_preference:
        bits = count_targets(dataset.train)
    chosen = choose_rank(cfg, lora, bits)
    holds = f"an adapter that can hold {lora_bits(cfg, chosen):,} bits, for data of about {bits:,}"
    return chosen, [("rank", f"{chosen.rank}, chosen: {holds}")]


def tuning_metadata(flags: FinetuneFlags, opened: OpenedModel, dataset: ConversationData) -> dict[str, Any]:
    examples = flags.examples
    tuning = flags.tuning
    is_preference = tuning.objective == "preference"
    return {
        "learns": flags.trainable.describe(opened.lora),
        "objective": tuning.objective,
        "full_loss": examples.full_loss,
        "metric": examples.metric,
        "loss": tuning.loss,
        "beta": tuning.beta or LOSSES[tuning.loss].beta,
        "pack": None if is_preference else not examples.no_pack,
        "keep_last": tuning.keep_last,
        "general": examples.general,
        "no_mix": examples.no_mix,
        "template": opened.chat.template_name,
        "text": {
            "data": examples.data,
            "validation": examples.validation,
            "digest": dataset.digest,
            "validation_digest": dataset.held_out_digest,
        },
    }


def choose_length(steps_a_reading: float) -> tuple[int, float | None, int]:
    """Returns the steps, the seconds and the least steps of a run when nobody asks for a length.

    It ends after READINGS readings of its data, or earlier after SECONDS, but makes LEAST_STEPS, if
    the readings have as many.
    """
    steps = max(1, round(READINGS * steps_a_reading))
    if steps <= LEAST_STEPS:
        return steps, None, 0
    return steps, SECONDS, LEAST_STEPS


def with_length(planned: TuningPlan) -> TuningPlan:
    """Returns a plan with the length that its data give, where nobody asked for one."""
    if planned.has_chosen_length:
        return planned
    steps, seconds, least_steps = choose_length(planned.steps_a_reading())
    plan = dataclasses.replace(planned.plan, steps=steps, seconds=seconds, least_steps=least_steps)
    return dataclasses.replace(planned, plan=plan)


def tuning_rows(planned: TuningPlan, mix: str, trained_numbers: int = 0) -> Rows:
    """Returns the banner's rows. `mix`: what is said of general questions; `trained_numbers`: see
    `model_rows`."""
    plan = planned.plan
    recipe = plan.recipe
    dataset = planned.dataset
    steps, long = plan.predict(plan.step_flops / (EXPECTED_MFU * planned.peak_flops))
    readings = steps / planned.steps_a_reading()
    length = f"{plan.length()}; about "
    if plan.seconds:  # else the steps are said already
        length += f"{quantity(steps, plan.step_name)}, "
    length += f"{long}, {readings:,.1f} times the data"
    packing = ""
    if planned.packed:
        packing = planned.packed.describe()
    many = ""
    if readings >= MANY_READINGS:
        many = MANY_READINGS_NOTE
    rows, *problems = dataset.summary
    unit = {"text": "piece", "preference": "pair"}.get(dataset.kind, "example")
    if isinstance(dataset.train[0], RatedPair):
        unit = "answer"
    return [
        *model_rows(planned.opened, plan, trained_numbers),
        *planned.matches,
        ("predicted", plan.cost_relative_to_full()),
        ("memory", memory_estimate(plan, plan.memory.total)),
        ("data", f"{dataset.name} ({dataset.kind}): {rows}; {quantity(len(dataset.train), unit)} to train on"),
        *(("", line) for line in problems),
        ("validation", f"{dataset.held_out_name}: {quantity(len(dataset.held_out), unit)}"),
        ("", dataset.overlap),
        ("mixed in", mix),
        ("template", planned.opened.chat.template_name),
        ("packing", packing),
        ("step", f"{recipe.batch} x {recipe.context} tokens, adamw, learning rate {recipe.optimizer.learning_rate:g}"),
        ("length", length),
        ("", many),
    ]


def print_first_example(planned: TuningPlan, console: Console) -> None:
    """Prints the first example, or both answers of the first pair, marking the tokens that are
    trained on."""
    first = planned.dataset.train[0]
    if isinstance(first, RatedPair):
        kind = "good" if first.is_good else "bad"
        answers = {f"the first answer, a {kind} one": first.answer}
    elif isinstance(first, Pair):
        answers = {"the chosen answer": first.answer, "the rejected answer": first.other}
    else:
        answers = {"the first example": first}
    for name, example in answers.items():
        console.print(f"\n{name}; what is trained on is marked", style="bold")
        console.print_marked(list(planned.opened.chat.marked_pieces(example)))
    console.print()


# What it begins with, and its steps


@dataclasses.dataclass(frozen=True)
class Scores:
    """A model's scores before or after training."""

    held_out: float
    general: float | None  # bits per byte of a general text
    answers: tuple[JudgedAnswer, ...]  # to held-out questions
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    known: tuple[str, ...] | None = None  # general questions that it answers right, None where they were not asked


class Measured(NamedTuple):
    """Scores, the unit of `held_out`, and whether one device holds the model, to answer."""

    scores: Scores
    unit: str
    fits_device: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTuning(PreparedModel):
    """What a fine-tuning begins with. `mixed_in`: how many general questions were, None where none
    was to be."""

    tuning: TuningPlan
    mixed_in: int | None = None

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

    def begin_steps(self, state: TrainState, loop_state: LoopState, compiling: Any, console: Console) -> BatchSteps:
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
        return BatchSteps(self.plan, program, buffer_bytes, self.frozen, batches, evaluator, loop_state.step, peak_flops)

    def _batches(self, console: Console) -> MeshBatches:
        packed = self.tuning.packed
        if packed:
            return MeshBatches(packed.order, packed.at)
        pairs = self.tuning.dataset.train
        plan = self.plan
        seq = plan.recipe.context
        rows = self.tuning.rows_a_step
        order = EpochOrder(len(pairs), rows, plan.seed)
        with console.task("computing reference log-probabilities", always=self.tuning.has_reference) as report:
            logprobs = reference_logprobs(plan.cfg, self._reference(), pairs, seq, rows, report)

        def read(step: int, part: slice) -> Preferences:
            items = [index for _, index in order.at(step, part)]
            return preference_batch(pairs, items, seq, logprobs)

        return MeshBatches(order, read)

    def _evaluator(self, limit: int | None = None) -> Evaluator:
        examples = self.tuning.dataset.held_out[:limit]
        seq = self.plan.recipe.context
        return held_out_evaluator(self.plan.cfg, self.frozen, self._reference(), examples, self.objective, seq)

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
            general = general_bits_per_byte(cfg, params, self.tokenizer, tuning.general, self.plan.recipe.context, console)
        _clear_programs()  # as large as a small model, and not run again soon
        fits_device = before.fits_device if before else fits_one_device(params)
        if not fits_device:
            return Measured(Scores(held_out, general, ()), evaluator.unit, fits_device)
        asks_general = tuning.general != "none" and (before is None or tells_enough(before.scores.known or ()))
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
            raise UserError(f"{error} The trained model is in {folder}, and the same command measures it.") from error
        path = self.check_frozen(step)
        return tuning_report(self, finished, after, step, path)


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
            answers = write_general_answers(prepared.plan.cfg, params, chat, conversations, prepared.stop_token_ids, report)
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


# The report


def tuning_report(prepared: PreparedTuning, finished: Finished, after: Measured, step: int, path: Path) -> RunReport:
    """Reports scores before and after. `step`: the checkpoint that the run stands for; `path`:
    where it was saved."""
    tuning = prepared.tuning
    plan = prepared.plan
    before: Scores = finished.before.scores
    now = after.scores
    last_step = finished.loop_state.step
    seconds = finished.loop_state.seconds
    rate = last_step / max(seconds, 1e-9)
    speed = rate * plan.step_tokens
    share_of_ceiling = (finished.warm_rate or rate) * plan.step_flops / tuning.peak_flops
    doubt_ceilings(share_of_ceiling)
    result = {
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(now),
        "unit": after.unit,
        "train_seconds": seconds,
        "tokens_per_second": speed,
        "flops_share_of_ceiling": share_of_ceiling,
        "general": tuning.general,
        "kept_step": None,
    }
    rows = [("held out", f"{before.held_out:.3f} -> {now.held_out:.3f} {after.unit} on {tuning.dataset.held_out_name}")]
    scored = f"of {quantity(len(tuning.dataset.references[:QUICK_EXAMPLES]), 'held-out answer')}"
    for name, value in now.metrics.items():
        rows.append((name, f"{before.metrics[name]:.3f} -> {value:.3f} {scored}"))
    forgotten = "not measured"
    if before.general is not None:
        forgotten = f"{before.general:.3f} -> {now.general:.3f} bits per byte on {tuning.general}"
    rows.append(("forgotten", forgotten))
    if before.known is not None:
        kept_answers = compare_known(before.known, now.known)
        result["kept_answers"] = dataclasses.asdict(kept_answers)
        rows += kept_answers.rows()
    rows.append(("speed", f"{speed:,.0f} tokens/s, {share_of_ceiling:.0%} of the ceiling"))
    if now.answers:
        rows.append(("answers", describe_faults(now.answers)))
    if step != last_step:
        result["kept_step"] = step
        rows.append(("chosen", f"step {step:,}, the best evaluated; the last, {last_step:,}, is still there to train on from"))
    texts = compare(
        [answer.question for answer in now.answers],
        [(answer.text, answer.faults) for answer in before.answers],
        [(answer.text, answer.faults) for answer in now.answers],
    )
    trained_count = sum(leaf.size for leaf in jax.tree.leaves(finished.state.trainable))
    as_trained = ""
    if prepared.opened.in_blocks:
        as_trained = " --weights q4"
    next_stages = ["chat", f"serve{as_trained}", f"evaluate{as_trained}", "export"]
    return RunReport(result, texts, rows, f"{path} ({trained_count:,} parameters)", next_stages)


def _clear_programs() -> None:
    jax.clear_caches()
    return_freed_memory()
