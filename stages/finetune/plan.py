"""The plan of a fine-tuning: by flags, data and the model's architecture, what is trained, how and for how long."""

import dataclasses
from typing import Any, Literal

from engine.errors import UserError
from engine.format import quantity
from engine.mesh.shape import ONE_DEVICE, check_mesh
from engine.model.config import LoraConfig, ModelConfig
from engine.text.examples import Pair, RatedPair, count_targets
from engine.text.packing import PackedBatches
from engine.text.template import read_template
from engine.training.lora_rank import choose_rank, lora_bits
from engine.training.optimizer import OptimizerConfig
from engine.training.preference import LOSSES, preference_objective
from engine.training.step import NEXT_TOKEN, Objective
from stages.cli.console import Console
from stages.finetune.flags import FinetuneFlags
from stages.runs.answers import AnswerMetrics
from stages.runs.conversation_data import (
    ConversationData,
    open_conversations,
    prepare_conversations,
)
from stages.runs.estimate import find_ceilings, memory_estimate, mesh_ceilings, require_room
from stages.runs.model_stage import (
    OpenedModel,
    Rows,
    choose_trainable,
    model_rows,
    open_model,
)
from stages.runs.options import RunOptions
from stages.runs.plan import Recipe, RunPlan
from stages.runs.text_data import check_text_name

READINGS = 3  # of its data, after which a run ends when nobody asks for a length
SECONDS = 180.0  # after which such a run ends earlier
# Steps that such a run makes however long they take, if READINGS of its data have as many.
LEAST_STEPS = 100
# Of READINGS of its data; at 212, those of `voice`, the mix kept 34 and 36 of 40 answers instead of 29.
MOST_STEPS_TO_MIX = 300
MANY_READINGS = 6  # that somebody asks for, from which on the plan says what they do
MANY_READINGS_NOTE = (
    f"By default it would be {READINGS} times: read more often, a small file is learned by heart."
)
CONTEXT = 256  # tokens of a row when nobody asks for a context
EXPECTED_MFU = 0.4
LEARNING_RATE = 2e-4
ADAPTER_LEARNING_RATE = 2e-3


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

    template = read_template(examples.template)
    on_mesh = options.mesh is not None
    opened = open_model(
        flags.model, flags.trainable, options.folder, console, template=template, on_mesh=on_mesh
    )
    plan_for_model(flags, options, opened)  # raises before the data are read, which may take minutes
    context = choose_context(flags, opened.model.cfg)
    dataset = prepare_conversations(
        examples.data,
        examples.validation,
        objective=tuning.examples,
        seq=context,
        seed=flags.seed,
        chat=opened.chat,
        console=console,
        full=examples.full_loss,
    )
    answer_metrics.check(dataset.references)
    is_preference = tuning.objective == "preference"
    rank_rows: Rows = []
    if opened.lora and not opened.continued_base and not flags.trainable.lora:
        lora, rank_rows = choose_adapter(opened.model.cfg, opened.lora, dataset, is_preference)
        opened = dataclasses.replace(opened, lora=lora)
    plan, matches = plan_for_model(flags, options, opened)
    plan = dataclasses.replace(plan, name=opened.model.name)
    if is_preference:
        objective = preference_objective(tuning.loss, tuning.beta)
        has_reference = LOSSES[tuning.loss].has_reference
        packed = None
    else:
        objective = NEXT_TOKEN
        has_reference = False
        packed = PackedBatches(
            dataset.train, seq=context, batch=tuning.rows, seed=flags.seed, pack=not examples.no_pack
        )
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
    mixes_general = needs_general(planned) and not examples.no_mix
    return with_length(dataclasses.replace(planned, mixes_general=mixes_general))


def needs_general(planned: TuningPlan) -> bool:
    """Whether general questions can be mixed in, and the data are so few that they should be."""
    has_answers = planned.packed is not None and planned.dataset.kind != "text"
    if planned.opened.on_mesh or not has_answers:
        return False
    return READINGS * planned.steps_a_reading() <= MOST_STEPS_TO_MIX


def choose_context(flags: FinetuneFlags, cfg: ModelConfig) -> int:
    return flags.tuning.context or min(CONTEXT, cfg.context)


def plan_for_model(flags: FinetuneFlags, options: RunOptions, opened: OpenedModel) -> tuple[RunPlan, Rows]:
    """Plans the run of an opened model; returns also what each rule matched. Raises UserError for
    one that cannot be, or for which there is no room."""
    tuning = flags.tuning
    trainable = flags.trainable
    cfg = opened.model.cfg
    is_preference = tuning.objective == "preference"
    context = choose_context(flags, cfg)
    if context > cfg.context:
        raise UserError(
            f"--context {context:,} is more than the {cfg.context:,} tokens {flags.model} was made for."
        )
    rate = LEARNING_RATE
    rows_of_tokens = tuning.rows
    if trainable.adapter:
        rate = ADAPTER_LEARNING_RATE
    if is_preference:
        rate /= 10
        rows_of_tokens *= 2  # both answers
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
        batch=rows_of_tokens,
        optimizer=optimizer,
        accumulate=flags.microbatches,
        scan=tuning.scan,
        remat=tuning.remat,
    )
    remat: Literal["none", "block"] = "none"
    if tuning.remat:
        remat = "block"
    cfg = dataclasses.replace(cfg, scan=tuning.scan, remat=remat)
    paths, matches = choose_trainable(cfg, opened.lora, trainable.train, trainable.freeze)
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
        blocks=opened.blocks,
    )
    require_room_for_step(plan, flags, is_adapter=opened.lora is not None)
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
    packing = ""
    if planned.packed:
        packing = planned.packed.describe()
    rows, *problems = dataset.summary
    unit = {"text": "piece", "preference": "pair"}.get(dataset.kind, "example")
    if isinstance(dataset.train[0], RatedPair):
        unit = "answer"
    return [
        *model_rows(planned.opened, plan, trained_numbers),
        *planned.matches,
        ("predicted", plan.cost_relative_to_full()),
        ("memory", memory_estimate(plan, plan.memory.total)),
        (
            "data",
            f"{dataset.name} ({dataset.kind}): {rows}; {quantity(len(dataset.train), unit)} to train on",
        ),
        *(("", line) for line in problems),
        ("validation", f"{dataset.held_out_name}: {quantity(len(dataset.held_out), unit)}"),
        ("", dataset.overlap),
        ("mixed in", mix),
        ("template", planned.opened.chat.template_name),
        ("packing", packing),
        (
            "step",
            f"{recipe.batch} x {recipe.context} tokens, "
            f"adamw, learning rate {recipe.optimizer.learning_rate:g}",
        ),
        *_length_rows(planned),
    ]


def _length_rows(planned: TuningPlan) -> Rows:
    """Returns the length of the run, and a note where it reads the data often."""
    plan = planned.plan
    steps, long = plan.predict(plan.step_flops / (EXPECTED_MFU * planned.peak_flops))
    readings = steps / planned.steps_a_reading()
    length = f"{plan.length()}; about "
    if plan.seconds:  # else the steps are said already
        length += f"{quantity(steps, plan.step_name)}, "
    length += f"{long}, {readings:,.1f} times the data"
    note = ""
    if readings >= MANY_READINGS:
        note = MANY_READINGS_NOTE
    return [("length", length), ("", note)]


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
