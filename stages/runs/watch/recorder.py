"""Records a run: events of how its weights move, for sinks such as `file_sink`, a file of JSON lines.

A sink takes one event, a dict that JSON can hold, whose numbers are finite or None, with `event`
and `step` in it:

    begin       the run, its `life` (train, frozen, lora, all) and its tensors: `path`, `shape`, `layer`, `trainable`, and the
                `rows` and `columns` of its mosaic
    step        a line of metrics.jsonl; `validation` is one too, of an evaluation
    frame       the weights at the start, after each of FIRST steps, after each PARTS-th of the run, and at the end: `digest` of
                what a checkpoint holds; `changed`, elements of which a bit changed since the frame before (`changed_in` each
                tensor), and `frozen_changed` since the start; `gradient_norms` of the step's batch; `sample`
    measure     the last step is over, and the result is measured: no frame follows
    end         the run's `result`, and the last frame's `digest`, None where that frame is not of
                the last step. A run that was stopped has no such event

A run that is watched makes frames between these too, for all sinks. A frame's `mosaic` has for each
tensor, in base64, an int8 a patch of weights, row by row: their mean over the tensor's number in
`limits`, times 127. A run that is resumed goes on in the file.
"""

import base64
import contextlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.errors import UserError
from engine.files import open_regular
from engine.inference.decode import generate, prepare_params
from engine.mesh import processes
from engine.model.config import ModelConfig
from engine.model.paths import array_paths, merge
from engine.model.shapes import leaf_shapes
from engine.storage.digest import digest
from engine.training.step import gradient_norms
from stages.cli.command import command_line, explain_error
from stages.cli.console import Console
from stages.runs.folder import JsonLines, replace_nonfinite
from stages.runs.stage import Prepared

SAMPLE = 48  # tokens of a sample at most
SAMPLE_TEXT = 120  # characters of it at most
FIRST = 4  # steps that have a frame each
PARTS = 16  # of the run, at whose ends frames are due
PIXELS = 12_000  # of a frame at most, unless there are more tensors
PIXELS_OF_TENSOR = 20  # less for each tensor, whose numbers in a frame take as much room
MAX_PIXEL = 127  # of an int8, for a mean at its tensor's limit
ROBUST = 0.99  # the share of a tensor's pixels that are within its limit
BEGINNING = b'{"event": '  # of a recording
MAX_LINE = 2**20  # bytes of the first line of a recording
WATCHING = 0.01  # the share of the time that frames take which nobody but a watcher asked for

Sink = Callable[[dict[str, Any]], object]


def file_sink(path: Path) -> Sink:
    """Returns a sink that writes a line for each event. The first one's step says which lines of an
    older recording stay."""
    lines: JsonLines | None = None  # from the first event on

    def write(event: dict[str, Any]) -> None:
        nonlocal lines
        if lines is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = JsonLines(path, event["step"])
        lines.add(**event)

    return write


def refuse_other_file(path: Path, step: int, **run: str) -> None:
    """Raises UserError unless a run that begins after `step` may record here.

    It may where nothing is; at step 0 over any recording, later over its own, known by the fields
    `run` of `begin`. Another file may be the text that is trained on, or a link such as
    /dev/stdout.
    """
    other = "Give another file with --record."
    if path.is_symlink():
        raise UserError(f"{path} is no recording, and is not replaced. {other}")
    if not path.is_file():
        return
    with open_regular(path) as file:
        line = file.readline(MAX_LINE)
    if not line:
        return
    if not line.startswith(BEGINNING):
        raise UserError(f"{path} is no recording, and is not replaced. {other}")
    if step == 0:
        return
    try:
        first = json.loads(line)
    except ValueError:
        first = {}
    for name, now in run.items():
        was = first.get(name)
        if was != now:
            raise UserError(
                f"{path} holds the recording of another run ({name} {was}, and here {now}). {other}"
            )


def nobody_watches() -> bool:
    return False


@contextlib.contextmanager
def open_recorder(
    record: Path | None, tensorboard: Path | None, watch: int | None, console: Console
) -> Iterator["Recorder"]:
    """Yields a recorder for `--record` (a file), `--tensorboard` (a folder) and `--watch` (a port),
    where they are given; says at the end that the page has ended, and what keeps it."""
    sinks: list[Sink] = []
    if record:
        sinks.append(file_sink(record))
    is_watched = nobody_watches
    page = None
    with contextlib.ExitStack() as stack:
        if tensorboard and processes.is_first():
            sinks.append(stack.enter_context(tensorboard_sink(tensorboard)))
        if watch is not None:
            from stages.runs.watch.server import Watch

            page = stack.enter_context(Watch(watch))
            console.print_rows([("watch", page.url)])
            sinks.append(page)
            is_watched = page.is_watched
        yield Recorder(sinks, console.print, is_recorded=record is not None, is_watched=is_watched)
    if page is not None:
        kept = "--record FILE keeps what it shows"
        if record and record.is_file():
            kept = f"{record} has it, for {command_line('runs.watch', record, 'lives.html')}"
        console.print(f"{page.url} has ended with the run; {kept}.")


class RecordedModel(NamedTuple):
    """The model of a run that is recorded, and how its frames show it."""

    run: Prepared
    prompt: list[int]  # of the samples
    frozen: Any
    # Of all arrays, by path, in the order in which a token passes them.
    shapes: dict[str, tuple[int, ...]]
    trained: Collection[str]  # paths of those that train
    patch: int  # weights along the side of a mosaic's pixel

    def count_weights(self, paths: Iterable[str]) -> int:
        return sum(math.prod(self.shapes[path]) for path in paths)

    def describe_tensors(self) -> list[dict[str, Any]]:
        tensors = []
        for path, shape in self.shapes.items():
            tensors.append(_describe(path, shape, self.patch) | {"trainable": path in self.trained})
        return tensors


def recorded_model(run: Prepared, prompt: list[int], trainable: Any) -> RecordedModel:
    trained = _shapes(trainable)
    shapes = _together(trained, _shapes(run.frozen))
    paths = _in_order(run.plan.cfg, shapes, trained.keys())
    return RecordedModel(
        run=run,
        prompt=prompt,
        frozen=run.frozen,
        shapes={path: shapes[path] for path in paths},
        trained=trained.keys(),
        patch=_patch([*shapes.values()]),
    )


class Mosaic(NamedTuple):
    """The picture of a tensor in a frame."""

    pixels: str  # int8 in base64
    limit: float  # the mean of a patch that MAX_PIXEL stands for


class Recorder:
    """Gives the events of a run to `sinks`; without any it does nothing.

    While the run `is_watched`, frames are made as often as WATCHING allows too; where it is not
    `is_recorded`, then alone. It changes no weight, and never ends the run: of what goes wrong
    `say` gets a sentence, and the sink, or the recording, ends. Takes three times the memory of the
    trainable weights and once that of the frozen ones.
    """

    model: RecordedModel  # from `begin` on, which comes before the frames

    def __init__(
        self,
        sinks: Sequence[Sink],
        say: Callable[[str], None],
        is_recorded: bool = True,
        is_watched: Callable[[], bool] = nobody_watches,
    ) -> None:
        self.sinks = [*sinks]
        self.say = say
        self.is_recorded = is_recorded
        self.is_watched = is_watched
        self.shown: dict[str, np.ndarray] = {}  # the weights of the last frame
        self.mosaics: dict[str, Mosaic] = {}  # of the last frame
        self.frame_step = -1  # of the last frame
        self.digest = ""  # of its weights
        self.part = 0  # of the run that the last frame due was for
        self.frames = 0
        self.rests_until = 0.0
        self.before: Any = None  # the trainable weights before a step whose frame is due

    def begin(self, run: Prepared, trainable: Any, step: int, **header: Any) -> None:
        """Begins with the weights before the first step. `header`: fields of the event that `run`
        does not tell."""
        with self._surviving():
            text, prompt = run.prompt()
            model = recorded_model(run, prompt, trainable)
            self.model = model
            plan = run.plan
            header |= {
                "params": model.count_weights(model.shapes),
                "trainable": model.count_weights(model.trained),
                "tensors": model.describe_tensors(),
                "name": plan.name,
                "layers": plan.cfg.layers,
                "width": plan.cfg.width,
                "steps": plan.steps,
                "seconds": plan.seconds,
                "prompt": text,
                "life": _life(header["stage"], model.shapes.keys(), model.trained),
            }
        self.event("begin", step=step, **header)

    def sample(self, trainable: Any) -> str:
        run = self.model.run
        cfg = run.plan.cfg
        prompt = self.model.prompt[-(cfg.context // 2) :]  # one may fill the context
        params = prepare_params(cfg, merge(trainable, self.model.frozen))
        count = min(SAMPLE, cfg.context - len(prompt))
        tokens = generate(cfg, params, prompt, count, temperature=0.0, stop_token_ids=run.stop_token_ids)
        return run.tokenizer.decode(tokens)[:SAMPLE_TEXT]

    def digest_of(self, trainable: Any) -> str:
        return digest(self.model.run.to_saved(trainable), scales=False)

    def gradient_norms(self, trainable: Any, batch: Any) -> Any:
        run = self.model.run
        plan = run.plan
        return gradient_norms(
            plan.cfg, trainable, self.model.frozen, batch, plan.recipe.accumulate, run.objective
        )

    def event(self, kind: str, **fields: Any) -> None:
        for sink in [*self.sinks]:
            with self._surviving(sink):
                sink(replace_nonfinite({"event": kind, **fields}, lambda _: None))

    def before_step(self, trainable: Any, step: int, progress: float) -> bool:
        """Keeps the weights if the frame of the next step, the `step`-th, is due; returns whether
        it is."""
        part = int(progress * PARTS)
        is_asked_for = self.is_watched() and time.monotonic() >= self.rests_until
        is_planned = self.is_recorded and (step <= FIRST or part > self.part)
        if self.sinks and (is_asked_for or is_planned):
            # It stays below PARTS: a frame is due after each step that may be the last.
            self.part = min(PARTS - 1, max(part, self.part))
            with self._surviving():
                # The step takes the place of the weights.
                self.before = jax.tree.map(jnp.copy, trainable)
        return self.before is not None

    def wants_frame(self, step: int) -> bool:
        is_wanted = self.is_recorded or self.before is not None or self.is_watched()
        return bool(self.sinks) and step != self.frame_step and is_wanted

    def frame(self, trainable: Any, step: int, seconds: float, batch: Any = None) -> None:
        """Records the weights after a step, unless they are. `batch`: what the step was trained on."""
        begin = time.monotonic()
        fields: dict[str, Any] = {}
        with self._surviving():
            if batch is not None and self.before is not None:
                fields["gradient_norms"] = self._norms_by_path(batch)
            self.before = None
            # A view of the weights themselves would keep the next step from them.
            copies = jax.tree.map(jnp.copy, trainable)
            changed = self._show(copies)
            self.frame_step = step
            self.digest = self.digest_of(copies)
            paths = self.model.shapes.keys()
            trained = self.model.trained
            fields |= {
                "changed": sum(changed[path] for path in paths if path in trained),
                "frozen_changed": sum(changed[path] for path in paths if path not in trained),
                "changed_in": {path: changed[path] for path in paths if path in trained},
                "digest": self.digest,
                "mosaic": {path: self.mosaics[path].pixels for path in paths},
                "limits": {path: self.mosaics[path].limit for path in paths},
                "sample": self.sample(copies),
            }
        self.event("frame", step=step, seconds=seconds, **fields)
        self.frames += 1
        seconds_taken = 0.0
        if self.frames > 2:  # the first two also compile
            seconds_taken = time.monotonic() - begin
        self.rests_until = begin + seconds_taken / WATCHING

    def _norms_by_path(self, batch: Any) -> dict[str, float]:
        """Returns the gradient norms of the step that was trained on the batch, of each tensor that
        has one."""
        norms = _arrays(self.gradient_norms(self.before, batch))
        return {path: float(norms[path]) for path in self.model.shapes if path in norms}

    def _show(self, copies: Any) -> dict[str, int]:
        """Keeps a frame's weights and mosaics. Returns the number of elements of each tensor that
        changed: since the frame before, or of a frozen one since the start."""
        model = self.model
        now = _together(_arrays(copies, copy=False), _arrays(model.frozen, copy=not self.shown))
        self.shown = self.shown or now
        changed = {path: _changed(self.shown[path], now[path]) for path in model.shapes}
        self.shown |= {path: now[path] for path in model.trained}
        for path in model.shapes:
            if changed[path] or path not in self.mosaics:
                self.mosaics[path] = _pixels(now[path], model.patch)
        return changed

    def end(self, step: int, seconds: float, result: dict[str, Any]) -> None:
        digest = None
        if step == self.frame_step:
            digest = self.digest
        self.event("end", step=step, seconds=seconds, digest=digest, result=result)

    @contextlib.contextmanager
    def _surviving(self, sink: Sink | None = None) -> Iterator[None]:
        """After an error drops the sink, or all of them if none is named, and says so."""
        try:
            yield
        except Exception as error:
            self.before = None
            if sink is None:
                self.sinks = []
            else:
                self.sinks = [other for other in self.sinks if other is not sink]
            sentence = explain_error(error) or f"{type(error).__name__}: {error}."
            with contextlib.suppress(OSError):
                self.say(f"The recording ended, and the run goes on: {sentence}")


def _arrays(tree: Any, copy: bool = True) -> dict[str, np.ndarray]:
    """Returns the arrays of a tree by path, on the host; without `copy` perhaps the very memory of
    the tree's."""
    arrays = {}
    for path, leaf in array_paths(tree).items():
        arrays[path] = np.asarray(jnp.copy(leaf) if copy else leaf)
    return arrays


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in array_paths(tree).items()}


def _in_order(cfg: ModelConfig, paths: Iterable[str], trained: Collection[str]) -> list[str]:
    """Returns paths of arrays in the order in which a token passes them; those of a leaf, as a
    LoRA's `a`, have its place."""
    places = {path: place for place, path in enumerate(leaf_shapes(cfg))}

    def rank(path: str) -> tuple[int, bool, str]:
        parts = path.split("/")
        prefixes = ["/".join(parts[:size]) for size in range(1, len(parts) + 1)]
        place = max(places.get(prefix, -1) for prefix in prefixes)
        return place, path in trained, path

    return sorted(paths, key=rank)


def _life(stage: str, paths: Collection[str], trained: Collection[str]) -> str:
    if stage == "train":
        return "train"
    if any(path.endswith("/a") for path in paths):
        return "lora"
    if {*trained} == {*paths}:
        return "all"
    return "frozen"


def _together[T](trained: dict[str, T], still: dict[str, T]) -> dict[str, T]:
    """Returns both; of an adapter on an adapter the frozen one is called `q/base/a`."""
    both = {}
    for path, value in still.items():
        if path in trained:
            leaf, _, array = path.rpartition("/")
            path = f"{leaf}/base/{array}"
        both[path] = value
    return both | trained


def _changed(before: np.ndarray, now: np.ndarray) -> int:
    bits = f"u{now.itemsize}"
    return int(np.count_nonzero(before.view(bits) != now.view(bits)))


def _grid(shape: tuple[int, ...], patch: int) -> tuple[int, int]:
    """Returns the rows and columns of a tensor's mosaic, whose last axis is across."""
    return -(-math.prod(shape[:-1]) // patch), -(-math.prod(shape[-1:]) // patch)


def _describe(path: str, shape: tuple[int, ...], patch: int) -> dict[str, Any]:
    rows, columns = _grid(shape, patch)
    layer = None
    if path.startswith("blocks/"):
        layer = int(path.split("/")[1])
    return {"path": path, "shape": shape, "layer": layer, "rows": rows, "columns": columns}


def _patch(shapes: Sequence[tuple[int, ...]]) -> int:
    """Returns the side of the smallest patch with which all mosaics, and their numbers, have PIXELS
    at most."""
    largest = max(math.prod(shape) for shape in shapes)
    most = PIXELS - PIXELS_OF_TENSOR * len(shapes)
    for side in range(1, largest):
        if sum(math.prod(_grid(shape, side)) for shape in shapes) <= most:
            return side
    return largest


def _pixels(array: np.ndarray, patch: int) -> Mosaic:
    """Returns a tensor's mosaic. ROBUST of its pixels are within the limit, and others are clipped."""
    matrix = np.nan_to_num(
        array.reshape(math.prod(array.shape[:-1]), -1).astype(np.float32), posinf=0, neginf=0
    )
    rows = np.arange(0, matrix.shape[0], patch)
    columns = np.arange(0, matrix.shape[1], patch)
    sums = np.add.reduceat(np.add.reduceat(matrix, rows, 0), columns, 1)
    heights = np.diff(rows, append=matrix.shape[0])
    widths = np.diff(columns, append=matrix.shape[1])
    means = sums / np.outer(heights, widths)
    limit = float(np.quantile(np.abs(means), ROBUST))
    scale = 0.0
    if limit:
        scale = MAX_PIXEL / limit
    pixels = np.clip(np.rint(means * scale), -MAX_PIXEL, MAX_PIXEL).astype(np.int8)
    return Mosaic(base64.b64encode(pixels.tobytes()).decode(), limit)


@contextlib.contextmanager
def tensorboard_sink(folder: Path) -> Iterator[Sink]:
    """Yields a sink that writes into the folder. The first event's step says which steps of older
    files stay."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs tensorboardX: "
            "start the command with `uv run --extra tensorboard python -m ...`, "
            "or install the extra with `pip install -e '.[tensorboard]'`."
        ) from None
    writer: Any = None  # from the first event on

    def write(event: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(str(folder), purge_step=event["step"] + 1, flush_secs=10)
        if event["event"] in ("step", "validation"):
            for name, value in event.items():
                if isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, event["step"])

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
