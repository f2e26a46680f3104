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
from typing import TYPE_CHECKING, Annotated, Any

from engine.device import host_memory, start_jax
from engine.errors import UserError
from engine.mesh import processes
from engine.mesh.shape import MeshShape
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.cli.console import Console
from stages.cli.flags import (
    COUNT,
    DeviceFlag,
    MeshFlags,
    MetricFlag,
    ModelFlag,
    VerboseFlag,
    WeightsFlag,
    default,
    integer,
    parser,
)

if TYPE_CHECKING:
    from engine.storage.model_loader import LoadedModel


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
    weights: WeightsFlag = None
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
    from engine.model.weights.convert import describe_weights
    from engine.storage import run_folder
    from engine.storage.kinds_in_words import describe_kinds
    from engine.text.conversations import SHIPPED
    from stages.evaluate.conversations import evaluate_conversations, read_if_conversations
    from stages.evaluate.text import evaluate_text
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
            data = read_if_conversations(flags.data)
            if data is None:
                check_text_name(flags.data, [*SHIPPED])
        model = _load(flags, shape, console)
        attention = f"attention {attention_path(model.cfg, model.cfg.context)}"
        console.print_rows(
            [
                ("device", f"{device}; {attention}"),
                ("model", str(model)),
                ("weights", describe_weights(model.params)),
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
    from engine.storage.digest import digest
    from engine.storage.model_loader import load_model

    mesh = layout.current_mesh()
    check = functools.partial(layout.check_inference, mesh=mesh)
    config = EngineConfig(weights=flags.weights)  # type: ignore[arg-type]
    with processes.process_0_first(), console.task("loading"), host_memory(mesh is not None):
        model = load_model(
            flags.model, dtype=config.dtype_of_file, on_config=check, keep_kinds=config.kept_kinds
        )
    console.print_notes(*model.notes)
    if processes.process_count() > 1:
        options = {f"--{name}": str(getattr(flags, name)) for name in ("data", "context", "stride", "batch")}
        processes.refuse_differences(options | {"--mesh": str(shape), "model": digest(model.params)})
    model = dataclasses.replace(model, params=layout.place(model.params))
    if flags.weights:  # as `stages.serve --weights` stores them
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


main = functools.partial(run_command, "evaluate", __doc__, EvaluateFlags, evaluate)


if __name__ == "__main__":
    leave(main())
