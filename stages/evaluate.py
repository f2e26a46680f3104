"""Evaluate a model: bits per byte on a whole text by a sliding window, or nats per token on conversations.

    python -m stages.evaluate                               the newest finished run, on what it was validated on
    python -m stages.evaluate --model runs/demo-shakespeare --data book.txt
    python -m stages.evaluate --model smollm2-135m-instruct --data voice-held-out
    python -m stages.evaluate --weights int8                what int8 costs, `q4` or `file`, beside the same without it
    python -m stages.evaluate --mesh fsdp=4                 a model that one device cannot hold

Of a text, every token but the first is scored once, after at least half a window of it. Of conversations, only what the
assistant says is scored. Of a fine-tuned run, its held-out set, and the general text that measures forgetting, are set
beside what was measured before fine-tuning.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from engine.device import host_memory, start_jax
from engine.errors import UserError
from engine.format import format_count
from engine.mesh import processes
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.cli.console import Console
from stages.cli.flags import COUNT, DeviceFlag, MeshFlags, MetricFlag, ModelFlag, VerboseFlag, default, integer, one_of, parser

if TYPE_CHECKING:
    from engine.storage.model_loader import LoadedModel
    from engine.text.conversations import Conversations
    from stages.runs.answers import Metrics
    from stages.runs.text_data import Source

WINDOW = 1024  # tokens by default: more tell little and take much longer
Rows = list[tuple[str, str]]  # to print

perplexity = lambda nats: f"{math.exp(min(nats, 700)):.3f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    model: ModelFlag = None
    data: Annotated[str | None, parser(str, "TEXT"), default("what the run was validated on")] = None
    """A text (a name, whose held-out part is meant, a file or a folder), or conversations as `finetune` takes them."""
    metric: MetricFlag = ()
    context: Annotated[int | None, parser(integer(2), "N"), default("the model's context, at most 1,024")] = None
    """Tokens a window."""
    stride: Annotated[int | None, COUNT, default("half the window")] = None
    """Tokens between windows of a text: each token is predicted from at least context - stride before it."""
    batch: Annotated[int | None, COUNT, default("as many as fit in memory")] = None
    """Windows of a text scored together, on each device that shares the rows."""
    weights: Annotated[str | None, one_of("bfloat16", "float32", "int8", "q4", "file"), default("as loaded")] = None
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
    from jax.experimental.multihost_utils import process_allgather

    from engine.inference.config import EngineConfig
    from engine.mesh import layout
    from engine.model.attention import attention_path
    from engine.storage import run_folder
    from engine.storage.digest import digest
    from engine.storage.model_loader import load_model
    from engine.storage.tensor_layout import describe_kinds
    from engine.text.conversations import SHIPPED
    from stages.runs.answers import Metrics
    from stages.runs.mesh import device_with_mesh, make_mesh_here
    from stages.runs.text_data import check_text_name

    def digest_in_memory(params: Any) -> str:
        return digest(process_allgather(params, tiled=True) if processes.process_count() > 1 else params)

    shape = flags.mesh.shape()
    if shape and flags.weights:
        raise UserError("--weights is for one device; leave --mesh out.")
    if flags.metric and (shape or flags.weights):
        raise UserError("--metric is for the weights as loaded, on one device; leave --mesh and --weights out.")
    metrics = Metrics(flags.metric)
    mesh = make_mesh_here(shape) if shape else None
    with Console() as console, jax.set_mesh(mesh):
        data = _read_conversations(flags.data) if flags.data else None
        if flags.data and data is None:
            check_text_name(flags.data, [*SHIPPED])
        with processes.process_0_first(), console.task("loading"), host_memory(mesh is not None):
            blocks: dict[str, Any] | None = {} if flags.weights in ("file", "q4") else None
            model = load_model(flags.model, on_config=lambda cfg: layout.check_inference(cfg, mesh), blocks=blocks)
        console.print_notes(*model.notes)
        if processes.process_count() > 1:
            options = {f"--{name}": str(getattr(flags, name)) for name in ("data", "context", "stride", "batch")}
            processes.refuse_differences(options | {"--mesh": str(shape), "model": digest(model.params)})
        model = dataclasses.replace(model, params=layout.place(model.params))
        if flags.weights:  # as `stages.serve --weights` stores them
            config = EngineConfig(weights=flags.weights)  # type: ignore[arg-type]
            cfg = config.model_config(model.cfg)
            model = dataclasses.replace(model, cfg=cfg, params=config.prepare_params(cfg, model.params))
        by = f"attention {attention_path(model.cfg, model.cfg.context)}"
        console.print_rows(
            [
                ("device", f"{device_with_mesh(device, shape) if shape else device}; {by}"),
                ("model", str(model)),
                ("file", describe_kinds(model.kinds, model.params)),
            ]
        )
        before = digest_in_memory(model.params)
        record = run_folder.read_json(model.run / "run.json") if model.run else {}
        if data or (flags.data is None and record.get("stage") == "finetune"):
            if flags.stride or flags.batch:
                raise UserError("--stride and --batch are for texts; conversations are read one by one.")
            rows = evaluate_conversations(model, data, record, flags.context, metrics, console)
        else:
            if flags.metric:
                raise UserError("--metric compares with the answers of conversations; a text has none.")
            rows = evaluate_text(model, flags.data, record, flags.context, flags.stride, flags.batch, console)
        after = digest_in_memory(model.params)
        same = "unchanged" if before == after else "CHANGED"
        console.print_rows([*rows, ("weights", f"{same}, SHA-256 {after[:16]} before and after")])
        if before != after:
            raise RuntimeError(f"Evaluation changed the weights: their SHA-256 was {before} and is {after}.")


def _read_conversations(data: str) -> "Conversations | None":
    from engine.text.conversations import SHIPPED, read_conversations

    is_file = Path(data).suffix.lower() in (".jsonl", ".json") and Path(data).is_file()
    conversations = read_conversations(data) if is_file or data in SHIPPED else None
    return conversations if conversations and conversations.kind != "text" else None


def evaluate_text(
    model: "LoadedModel",
    data: str | None,
    record: dict[str, Any],
    context: int | None,
    stride: int | None,
    batch: int | None,
    console: Console,
) -> Rows:
    """Scores every token of a text but the first, each after context - stride tokens or more. Raises UserError."""
    from engine.mesh import layout
    from stages.runs import text_data

    with processes.process_0_first():
        source = text_data.evaluation_source(data, console) if data else _validation_source(model, record, console)
        text, cfg = text_data.encode_text(source, model.tokenizer, console), model.cfg
    seq = min(context or min(cfg.context, WINDOW), max(2, len(text.tokens) - 1))
    stride = stride or max(1, seq // 2)
    if stride > seq:
        raise UserError(f"--stride {stride:,} would leave tokens out: it is at most the window of {seq:,} tokens.")
    beyond = f" (the model was trained on {cfg.context:,})" if seq > cfg.context else ""
    batch = batch or text_data.rows_in_memory(cfg, seq)
    window = f"{seq:,} tokens{beyond}, moved on by {stride:,}; {batch * layout.row_shards()} at a time"
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
    held_out = Path(text["validation"]) if text.get("validation") else None
    if (source := find_sources(text["data"], held_out, console)[1]) is None:
        raise UserError("The run was validated on the end of a .bin; give a text with --data.")
    return source


def evaluate_conversations(
    model: "LoadedModel",
    data: "Conversations | None",
    record: dict[str, Any],
    context: int | None,
    metrics: "Metrics",
    console: Console,
) -> Rows:
    """Scores `data`, or the held-out set of the fine-tuning `record` beside its scores from before fine-tuning."""
    from engine.mesh import layout
    from engine.text.chat_tokenizer import ChatTokenizer
    from engine.text.examples import Pair, RatedPair, make_examples, make_pairs
    from engine.training.step import NEXT_TOKEN
    from stages.runs import conversation_data as conversations
    from stages.runs.text_data import EVALUATION_ROWS

    record = record if record.get("stage") == "finetune" else {}
    chat = ChatTokenizer(model.tokenizer)
    seq, objective = min(context or record.get("recipe", {}).get("context") or WINDOW, model.cfg.context), ""
    full = not data and record.get("full_loss", False)
    if data:
        make = make_pairs if data.kind == "preference" else make_examples
        dataset = make(data, chat, seq)
        name, lines, examples = f"{data.name} ({data.kind})", dataset.describe(), dataset.examples
        references, digest = conversations.references_of(data), conversations.digest_examples(examples)
    else:
        names, objective = (record["text"]["data"], record["text"]["validation"]), record["objective"]
        objective = "kto" if (objective, record.get("loss")) == ("preference", "kto") else objective
        split = conversations.prepare_conversations(*names, objective, seq, record["seed"], chat, console, full)
        examples, name, lines = split.held_out, split.held_out_name, [split.overlap] if split.overlap else []
        references, digest = list(split.references), split.held_out_digest
        if not context and record["text"].get("validation_digest") not in (None, digest):
            raise UserError(
                f"{name} is not what {model.name} was validated on: {names[0]} or the way it is split has changed since, and "
                "it may have been trained on. Give conversations that it was not trained on with --data."
            )
    console.print_rows([("data", name), *(("", line) for line in lines), ("template", chat.template_name)])
    processes.refuse_differences({"data": digest})
    begin, together = time.perf_counter(), EVALUATION_ROWS * layout.row_shards()
    with console.task("evaluating", always=True) as report:
        if isinstance(examples[0], Pair | RatedPair):
            logprobs = conversations.reference_logprobs(model.cfg, model.params, examples, seq, together, report)
        if isinstance(examples[0], RatedPair):
            is_good = [pair.is_good for pair in examples]
            sides = {side: -logprobs[[good == (side == "good") for good in is_good], 0] for side in ("good", "bad")}
            rows = [("answers", f"{len(sides['good']):,} good ones and {len(sides['bad']):,} bad ones")]
            rows += [(f"{side} ones", f"{each.mean():.3f} nats each on average") for side, each in sides.items() if len(each)]
        elif isinstance(examples[0], Pair):
            margin, more = logprobs[:, 0] - logprobs[:, 1], "the chosen answer is the more probable one in"
            rows = [
                ("pairs", f"{len(margin):,}"),
                ("preferred", f"{more} {format_count(100 * (margin > 0).mean())}% of them"),
                ("margin", f"{margin.mean():.3f} nats on average"),
            ]
        else:
            evaluator = conversations.held_out_evaluator(model.cfg, {}, None, examples, NEXT_TOKEN, seq)
            nats = evaluator.evaluate(model.params, report)
            scored = "whole conversations" if full else "what the assistant says, the end of each answer included"
            rows = [
                ("examples", f"{len(examples):,}"),
                ("scored tokens" if full else "answer tokens", f"{evaluator.size:,}"),
                ("nats per token", f"{nats:.4f} of {scored}"),
                ("perplexity", perplexity(nats)),
            ]
    with console.task("scoring answers") as report:
        stops = {*model.eos_ids, *chat.eot_ids}
        scores = metrics.score(model.cfg, model.params, chat, references, stops, report)
        rows += [(task, f"{score:.4f} of {len(references):,} answers") for task, score in scores.items()]
    seconds = time.perf_counter() - begin
    rows += [] if data or context else _before_finetuning(model, record, console)
    chat.close()
    return [*rows, ("seconds", f"{seconds:.1f}")]


def _before_finetuning(model: "LoadedModel", record: dict[str, Any], console: Console) -> Rows:
    from stages.runs import text_data

    result = record.get("result") or {}
    before, text = result.get("before") or {}, str(result.get("general"))
    rows = []
    if before:  # and after, for a preference loss is of a run alone
        scores = f"{before['held_out']:.4f} {result['unit']} on the held-out set, before fine-tuning"
        rows = [("before", f"{scores}; {result['after']['held_out']:.4f} at its end")]
    if before.get("general") is None or not (text in text_data.TEXTS or Path(text).exists()):
        return rows
    cfg, params, context = model.cfg, model.params, record["recipe"]["context"]
    now = text_data.general_bits_per_byte(cfg, params, model.tokenizer, text, context, console)
    return [*rows, ("forgotten", f"{before['general']:.3f} -> {now:.3f} bits per byte on {text}")]


main = functools.partial(run_command, "evaluate", __doc__, EvaluateFlags, evaluate)


if __name__ == "__main__":
    leave(main())
