"""Evaluate a model: bits per byte on a whole text by a sliding window, or nats per token on conversations.

    python -m stages.evaluate                               the newest finished run, on what it was validated on
    python -m stages.evaluate --model runs/demo-shakespeare --data book.txt
    python -m stages.evaluate --model smollm2-135m-instruct --data voice-held-out
    python -m stages.evaluate --weights int8                what int8 costs, `q4` or `file`, beside the same without it
    python -m stages.evaluate --mesh fsdp=4                 a model that one device cannot hold

Of a text, every token but the first is scored once, after at least half a window of it. Of
conversations, only what the assistant says is scored. Of a fine-tuned run, its held-out set, and
the general text that measures forgetting, are set beside what was measured before fine-tuning.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import dataclasses
import functools
import math
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from engine.device import host_memory, start_jax
from engine.errors import UserError
from engine.format import format_count
from engine.mesh import processes
from engine.mesh.shape import MeshShape
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.cli.console import Console, ReportProgress
from stages.cli.flags import (
    COUNT,
    DeviceFlag,
    MeshFlags,
    MetricFlag,
    ModelFlag,
    VerboseFlag,
    default,
    integer,
    one_of,
    parser,
)

if TYPE_CHECKING:
    import numpy as np

    from engine.storage.model_loader import LoadedModel
    from engine.text.chat_tokenizer import ChatTokenizer
    from engine.text.conversations import Conversations
    from engine.text.template import Message
    from stages.runs.answers import AnswerMetrics
    from stages.runs.text_data import Source

WINDOW = 1024  # tokens by default: more tell little and take much longer
LARGEST_EXPONENT = 700  # whose power of e a float holds
Rows = list[tuple[str, str]]  # to print


def perplexity(nats: float) -> str:
    return f"{math.exp(min(nats, LARGEST_EXPONENT)):.3f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    model: ModelFlag = None
    data: Annotated[str | None, parser(str, "TEXT"), default("what the run was validated on")] = None
    """A text (a name, whose held-out part is meant, a file or a folder), or conversations as `finetune` takes them."""
    metric: MetricFlag = ()
    context: Annotated[
        int | None,
        parser(integer(2), "N"),
        default("the model's context, at most 1,024"),
    ] = None
    """Tokens a window."""
    stride: Annotated[int | None, COUNT, default("half the window")] = None
    """Tokens between windows of a text: each token is predicted from at least context - stride before it."""
    batch: Annotated[int | None, COUNT, default("as many as fit in memory")] = None
    """Windows of a text scored together, on each device that shares the rows."""
    weights: Annotated[
        str | None, one_of("bfloat16", "float32", "int8", "q4", "file"), default("as loaded")
    ] = None
    """The type of the weights' matrices, as `serve` stores them, on one device alone. `q4`, `file`: see there."""
    mesh: MeshFlags
    device: DeviceFlag = "auto"
    verbose: VerboseFlag = False


def evaluate(flags: EvaluateFlags) -> None:
    """Raises RuntimeError when scoring changed a weight."""
    signals.set_phase("before the evaluation was done.")
    device = start_jax(flags.device, connect=flags.mesh.connect)
    # These import JAX, here and below, which must be started first.
    import jax

    from engine.model.attention import attention_path
    from engine.storage import run_folder
    from engine.storage.tensor_layout import describe_kinds
    from engine.text.conversations import SHIPPED
    from stages.runs.answers import AnswerMetrics
    from stages.runs.mesh import device_with_mesh, make_mesh_here
    from stages.runs.text_data import check_text_name

    shape = flags.mesh.shape()
    _check_together(flags, shape)
    metrics = AnswerMetrics(flags.metric)
    mesh = None
    if shape:
        mesh = make_mesh_here(shape)
        device = device_with_mesh(device, shape)
    with Console() as console, jax.set_mesh(mesh):
        data = None
        if flags.data:
            data = _read_conversations(flags.data)
            if data is None:
                check_text_name(flags.data, [*SHIPPED])
        model = _load(flags, shape, console)
        attention = f"attention {attention_path(model.cfg, model.cfg.context)}"
        console.print_rows(
            [
                ("device", f"{device}; {attention}"),
                ("model", str(model)),
                ("file", describe_kinds(model.kinds, model.params)),
            ]
        )
        before = _digest_in_memory(model.params)
        record = {}
        if model.run:
            record = run_folder.read_json(model.run / "run.json")
        if data or (flags.data is None and record.get("stage") == "finetune"):
            if flags.stride or flags.batch:
                raise UserError("--stride and --batch are for texts; conversations are read one by one.")
            rows = evaluate_conversations(model, data, record, flags.context, metrics, console)
        else:
            if flags.metric:
                raise UserError("--metric compares with the answers of conversations; a text has none.")
            rows = evaluate_text(
                model,
                flags.data,
                record,
                console,
                context=flags.context,
                stride=flags.stride,
                batch=flags.batch,
            )
        after = _digest_in_memory(model.params)
        if before != after:
            raise RuntimeError(f"Evaluation changed the weights: their SHA-256 was {before} and is {after}.")
        console.print_rows([*rows, ("weights", f"unchanged, SHA-256 {after[:16]} before and after")])


def _check_together(flags: EvaluateFlags, shape: MeshShape | None) -> None:
    """Raises UserError for flags that do not go with a mesh, or with each other."""
    if shape and flags.weights:
        raise UserError("--weights is for one device; leave --mesh out.")
    if flags.metric and (shape or flags.weights):
        raise UserError(
            "--metric is for the weights as loaded, on one device; leave --mesh and --weights out."
        )


def _load(flags: EvaluateFlags, shape: MeshShape | None, console: Console) -> "LoadedModel":
    """Loads the model onto the mesh, with its weights in the type of --weights.

    Raises UserError when several processes evaluate different things.
    """
    from engine.inference.config import EngineConfig
    from engine.mesh import layout
    from engine.model.weights.block_layout import KINDS
    from engine.storage.digest import digest
    from engine.storage.model_loader import load_model

    mesh = layout.current_mesh()
    check = functools.partial(layout.check_inference, mesh=mesh)
    keep_kinds: Collection[str] = ()
    if flags.weights in ("file", "q4"):
        keep_kinds = KINDS
    with processes.process_0_first(), console.task("loading"), host_memory(mesh is not None):
        model = load_model(flags.model, on_config=check, keep_kinds=keep_kinds)
    console.print_notes(*model.notes)
    if processes.process_count() > 1:
        options = {f"--{name}": str(getattr(flags, name)) for name in ("data", "context", "stride", "batch")}
        processes.refuse_differences(options | {"--mesh": str(shape), "model": digest(model.params)})
    model = dataclasses.replace(model, params=layout.place(model.params))
    if flags.weights:  # as `stages.serve --weights` stores them
        config = EngineConfig(weights=flags.weights)  # type: ignore[arg-type]
        cfg = config.model_config(model.cfg)
        model = dataclasses.replace(model, cfg=cfg, params=config.prepare_params(cfg, model.params))
    return model


def _digest_in_memory(params: Any) -> str:
    """Returns the digest of params, whole ones of several processes."""
    from jax.experimental.multihost_utils import process_allgather

    from engine.storage.digest import digest

    if processes.process_count() > 1:
        params = process_allgather(params, tiled=True)
    return digest(params)


def _read_conversations(data: str) -> "Conversations | None":
    from engine.text.conversations import SHIPPED, read_conversations

    is_file = Path(data).suffix.lower() in (".jsonl", ".json") and Path(data).is_file()
    if not is_file and data not in SHIPPED:
        return None
    conversations = read_conversations(data)
    if conversations.kind == "text":
        return None
    return conversations


def evaluate_text(
    model: "LoadedModel",
    data: str | None,
    record: dict[str, Any],
    console: Console,
    *,
    context: int | None,
    stride: int | None,
    batch: int | None,
) -> Rows:
    """Scores every token of a text but the first, each after context - stride tokens or more.

    The text is `data`, else what the run of `record` was validated on. Raises UserError.
    """
    from engine.mesh import layout
    from stages.runs import text_data

    with processes.process_0_first():
        if data:
            source = text_data.evaluation_source(data, console)
        else:
            source = _validation_source(model, record, console)
        text = text_data.encode_text(source, model.tokenizer, console)
    cfg = model.cfg
    if context is None:
        context = min(cfg.context, WINDOW)
    seq = min(context, max(2, len(text.tokens) - 1))
    stride = stride or max(1, seq // 2)
    if stride > seq:
        raise UserError(
            f"--stride {stride:,} would leave tokens out: it is at most the window of {seq:,} tokens."
        )
    batch = batch or text_data.rows_in_memory(cfg, seq)
    window = f"{seq:,} tokens"
    if seq > cfg.context:
        window += f" (the model was trained on {cfg.context:,})"
    window += f", moved on by {stride:,}; {batch * layout.row_shards()} at a time"
    processes.refuse_differences({"text": text_data.digest_tokens(text)})
    console.print_rows([("text", text_data.source_name(source)), ("window", window)])
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        nats = text_data.score_text(cfg, model.params, text.tokens, seq, stride, batch, report)
    seconds = time.perf_counter() - begin
    scored = len(text.tokens) - 1
    return [
        ("tokens", f"{len(text.tokens):,}"),
        ("bytes", f"{text.bytes:,}"),
        ("nats per token", f"{nats / scored:.4f}"),
        ("perplexity per token", perplexity(nats / scored)),
        ("bits per byte", f"{text_data.bits_per_byte(nats, text.bytes):.4f}"),
        ("seconds", f"{seconds:.1f} ({format_count(scored / seconds)} tokens/s)"),
    ]


def _validation_source(model: "LoadedModel", record: dict[str, Any], console: Console) -> "Source":
    from stages.runs.text_data import find_sources

    text = record.get("text", {})
    if not text.get("data") or record.get("stage") == "reinforce":
        raise UserError(f"{model.name} does not say what it was validated on; give --data.")
    held_out = None
    if text.get("validation"):
        held_out = Path(text["validation"])
    _, source = find_sources(text["data"], held_out, console)
    if source is None:
        raise UserError("The run was validated on the end of a .bin; give a text with --data.")
    return source


@dataclasses.dataclass(frozen=True)
class ConversationSet:
    """Conversations to score: those of --data, or the held-out set of a fine-tuned run."""

    name: str
    notes: list[str]  # on the rows used and left out
    kind: str  # of `examples`: answers (Example), preference (Pair) or kto (RatedPair)
    examples: Sequence[Any]
    references: "Sequence[Sequence[Message]]"  # each up to an answer that a metric compares with
    digest: str


def evaluate_conversations(
    model: "LoadedModel",
    data: "Conversations | None",
    record: dict[str, Any],
    context: int | None,
    metrics: "AnswerMetrics",
    console: Console,
) -> Rows:
    """Scores `data`, or the held-out set of the fine-tuning `record` beside its scores from before
    fine-tuning."""
    from engine.text.chat_tokenizer import ChatTokenizer

    if record.get("stage") != "finetune":
        record = {}
    chat = ChatTokenizer(model.tokenizer)
    seq = min(context or record.get("recipe", {}).get("context") or WINDOW, model.cfg.context)
    is_whole = not data and record.get("full_loss", False)
    if data:
        conversations = _tokenize_conversations(data, chat, seq)
    else:
        conversations = _held_out_conversations(model, record, chat, seq, is_whole, console)
        if not context:
            _refuse_other_split(model, record, conversations)
    console.print_rows(
        [
            ("data", conversations.name),
            *(("", note) for note in conversations.notes),
            ("template", chat.template_name),
        ]
    )
    processes.refuse_differences({"data": conversations.digest})
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        if conversations.kind == "kto":
            rows = _score_ratings(model, conversations.examples, seq, report)
        elif conversations.kind == "preference":
            rows = _score_pairs(model, conversations.examples, seq, report)
        else:
            rows = _score_answers(model, conversations.examples, seq, is_whole, report)
    with console.task("scoring answers") as report:
        stop_token_ids = {*model.eos_ids, *chat.eot_ids}
        scores = metrics.score(
            model.cfg, model.params, chat, conversations.references, stop_token_ids, report
        )
    for task, score in scores.items():
        rows.append((task, f"{score:.4f} of {len(conversations.references):,} answers"))
    seconds = time.perf_counter() - begin
    if not data and not context:
        rows += _before_finetuning(model, record, console)
    chat.close()
    return [*rows, ("seconds", f"{seconds:.1f}")]


def _tokenize_conversations(data: "Conversations", chat: "ChatTokenizer", seq: int) -> ConversationSet:
    from engine.text.examples import make_examples, make_pairs
    from stages.runs.conversation_data import digest_examples, references_of

    if data.kind == "preference":
        kind = "preference"
        dataset = make_pairs(data, chat, seq)
    else:
        kind = "answers"
        dataset = make_examples(data, chat, seq)
    return ConversationSet(
        name=f"{data.name} ({data.kind})",
        notes=dataset.describe(),
        kind=kind,
        examples=dataset.examples,
        references=references_of(data),
        digest=digest_examples(dataset.examples),
    )


def _held_out_conversations(
    model: "LoadedModel",
    record: dict[str, Any],
    chat: "ChatTokenizer",
    seq: int,
    is_whole: bool,
    console: Console,
) -> ConversationSet:
    from stages.runs.conversation_data import prepare_conversations

    text = record["text"]
    objective = record["objective"]
    if objective == "preference" and record.get("loss") == "kto":
        objective = "kto"
    split = prepare_conversations(
        text["data"], text["validation"], objective, seq, record["seed"], chat, console, full=is_whole
    )
    notes = []
    if split.overlap:
        notes.append(split.overlap)
    return ConversationSet(
        name=split.held_out_name,
        notes=notes,
        kind=objective,
        examples=split.held_out,
        references=split.references,
        digest=split.held_out_digest,
    )


def _refuse_other_split(model: "LoadedModel", record: dict[str, Any], held_out: ConversationSet) -> None:
    """Raises UserError where the held-out set is not that of the run: the model may have been
    trained on it."""
    text = record["text"]
    if text.get("validation_digest") in (None, held_out.digest):
        return
    raise UserError(
        f"{held_out.name} is not what {model.name} was validated on: "
        f"{text['data']} or the way it is split has changed since, and it may have been trained on. "
        "Give conversations that it was not trained on with --data."
    )


def _pair_logprobs(
    model: "LoadedModel", pairs: Sequence[Any], seq: int, report: ReportProgress
) -> "np.ndarray":
    from engine.mesh import layout
    from stages.runs.conversation_data import reference_logprobs
    from stages.runs.text_data import EVALUATION_ROWS

    return reference_logprobs(
        model.cfg, model.params, pairs, seq, EVALUATION_ROWS * layout.row_shards(), report
    )


def _score_ratings(model: "LoadedModel", pairs: Sequence[Any], seq: int, report: ReportProgress) -> Rows:
    nats = -_pair_logprobs(model, pairs, seq, report)[:, 0]
    good = [row for row, pair in enumerate(pairs) if pair.is_good]
    bad = [row for row, pair in enumerate(pairs) if not pair.is_good]
    rows = [("answers", f"{len(good):,} good ones and {len(bad):,} bad ones")]
    for name, places in (("good ones", good), ("bad ones", bad)):
        if places:
            rows.append((name, f"{nats[places].mean():.3f} nats each on average"))
    return rows


def _score_pairs(model: "LoadedModel", pairs: Sequence[Any], seq: int, report: ReportProgress) -> Rows:
    logprobs = _pair_logprobs(model, pairs, seq, report)
    margin = logprobs[:, 0] - logprobs[:, 1]
    preferred = format_count(100 * (margin > 0).mean())
    return [
        ("pairs", f"{len(margin):,}"),
        ("preferred", f"the chosen answer is the more probable one in {preferred}% of them"),
        ("margin", f"{margin.mean():.3f} nats on average"),
    ]


def _score_answers(
    model: "LoadedModel", examples: Sequence[Any], seq: int, is_whole: bool, report: ReportProgress
) -> Rows:
    from engine.training.step import NEXT_TOKEN
    from stages.runs.conversation_data import held_out_evaluator

    evaluator = held_out_evaluator(model.cfg, {}, None, examples, NEXT_TOKEN, seq)
    nats = evaluator.evaluate(model.params, report)
    assert nats is not None
    unit = "answer tokens"
    scored = "what the assistant says, the end of each answer included"
    if is_whole:
        unit = "scored tokens"
        scored = "whole conversations"
    return [
        ("examples", f"{len(examples):,}"),
        (unit, f"{evaluator.size:,}"),
        ("nats per token", f"{nats:.4f} of {scored}"),
        ("perplexity", perplexity(nats)),
    ]


def _before_finetuning(model: "LoadedModel", record: dict[str, Any], console: Console) -> Rows:
    from stages.runs import text_data

    result = record.get("result") or {}
    before = result.get("before") or {}
    rows = []
    if before:
        # The score at the run's end stands beside it, for a preference loss is not measured here.
        scores = f"{before['held_out']:.4f} {result['unit']} on the held-out set, before fine-tuning"
        rows.append(("before", f"{scores}; {result['after']['held_out']:.4f} at its end"))
    text = str(result.get("general"))
    is_there = text in text_data.TEXTS or Path(text).exists()
    if before.get("general") is None or not is_there:
        return rows
    context = record["recipe"]["context"]
    now = text_data.general_bits_per_byte(model.cfg, model.params, model.tokenizer, text, context, console)
    rows.append(("forgotten", f"{before['general']:.3f} -> {now:.3f} bits per byte on {text}"))
    return rows


main = functools.partial(run_command, "evaluate", __doc__, EvaluateFlags, evaluate)


if __name__ == "__main__":
    leave(main())
