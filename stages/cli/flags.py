"""Parsers of flags, whose ValueError explains a wrong value, and the flags that several commands share."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from engine.errors import Range, UserError, did_you_mean
from engine.inference.request import RANGES
from engine.mesh.processes import announced, in_cluster, process_count
from engine.mesh.shape import MeshShape, parse_mesh
from stages.cli import lifecycle

# A name that can be a segment of a URL. Clients fold `.` and `..` away, so what has such a name
# could not be asked for.
PLAIN_NAME = r"(?!\.{1,2}$)[A-Za-z0-9_.:-]+"
AUTO = 0  # of --processes: as many as the cluster started
UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """Parses a duration above 0: '90s', '3m', '1h30m', or plain seconds '45'."""
    parts = re.fullmatch(r"(?:\d+(?:\.\d+)?(?:ms|s|min|m|h|d))+|\d+(?:\.\d+)?", text.strip().lower())
    if not parts:
        raise ValueError(
            f"wanted a duration such as 90s, 3m or 1h30m (a plain number is seconds), got {text!r}"
        )
    pairs = re.findall(r"(\d+(?:\.\d+)?)(ms|s|min|m|h|d|)", parts[0])
    total = sum(float(amount) * UNITS[unit] for amount, unit in pairs)
    if total <= 0:
        raise ValueError(f"wanted a duration above 0, got {text!r}")
    return total


def integer(low: int, high: float = float("inf")) -> Callable[[str], int]:
    return in_range(Range(low, high, integer=True))


def number(low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], float]:
    return in_range(Range(low, high, above=above))


def in_range(allowed: Range) -> Callable[[str], Any]:
    """Returns a parser of the numbers of a range; an integer may be written 1_000 or 1e6."""

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError, OverflowError):
            value: int | float
            if allowed.integer and "e" not in text.lower():
                value = int(text)
            else:
                value = float(text)
            if allowed.holds(value) and allowed.integer:
                return int(value)
            if allowed.holds(value):
                return value
        kind = "a number"
        if allowed.integer:
            kind = "an integer"
        raise ValueError(f"wanted {kind}, {allowed}, got {text!r}")

    return parse


def interval(text: str) -> int | float:
    """Parses an interval: '200' -> 200 (steps), '30s' -> 30.0 (seconds)."""
    if text.strip().isdigit():
        return integer(1)(text)
    try:
        return seconds(text)
    except ValueError:
        raise ValueError(
            f"wanted steps, such as 200, or a duration, such as 30s or 5m, got {text!r}"
        ) from None


def plain_name(text: str) -> str:
    """Parses a name that can be a segment of a URL."""
    if not re.fullmatch(PLAIN_NAME, text):
        raise ValueError(
            f"wanted a name of letters, digits, and _ . : -, and not . or .. alone, got {text!r}"
        )
    return text


def model_names(text: str) -> str:
    """Checks names with commas between them, as of --name; each may have slashes between plain
    names, as ORG/NAME.
    """
    for name in text.split(","):
        if name.strip():
            for part in name.strip().split("/"):
                plain_name(part)
    return text


def parser(parse: Callable[[str], Any], metavar: str) -> Any:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


COUNT = parser(integer(1), "N")
BATCH = parser(integer(1, 10**9), "N")


def positive(high: float = float("inf")) -> Any:
    return parser(number(0, high, above=True), "X")


def default(meaning: str, help: str | None = None, metavar: str | None = None) -> Any:
    """Returns the annotation for the default that the help shows, and for `help` in place of a
    field's docstring.
    """
    return tyro.conf.arg(help=help, metavar=metavar, help_behavior_hint=f"(default: {meaning})")


def one_of(*names: str) -> Any:
    """Returns the annotation for a flag that takes one of `names`; its error lists them, and the
    name that a wrong one misspells.
    """

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"wanted one of {', '.join(names)}, got {text!r}.{did_you_mean(text, names)}")
        return text

    return parser(parse, "|".join(names))


def path(text: str) -> Path:
    return Path(text).expanduser()


# Flags that several commands have.
DEVICES = ("auto", "cpu", "gpu", "tpu")
DeviceFlag = Annotated[str, one_of(*DEVICES), default("auto", "auto, cpu, gpu or tpu.")]
MeshFlag = Annotated[
    str | None,
    parser(str, "tensor=N"),
    default("one device", "Spread a model that one device cannot hold over N of them."),
]
DocumentsFlag = Annotated[
    Path | None,
    parser(path, "FOLDER"),
    default(
        "none",
        "Texts (.txt, .md, .jsonl) of which the passages that share words with a question come before it.",
    ),
]
TemplateFlag = Annotated[
    Path | None,
    parser(path, "FILE"),
    default("the model's own", "A chat template (Jinja) to use in place of the model's."),
]
MODEL = "A run or step folder, a Hugging Face or PEFT folder, a .gguf file, ORG/NAME on the hub, or a named model."
ModelFlag = Annotated[str | None, parser(str, "MODEL"), default("the newest finished run in runs/", MODEL)]
WeightsFlag = Annotated[
    str | None,
    one_of("bfloat16", "float32", "int8", "q4", "file"),
    default(
        "as they lie in a GGUF file, where kernels in C multiply them, else as loaded",
        "The type of the weights' matrices, as `serve` stores them, on one device alone. `q4`, `file`: see there.",
    ),
]
MetricFlag = Annotated[
    tuple[str, ...],
    default(
        "none",
        "Of the model's own answers to conversations, in `finetune` held-out ones before and after: "
        "`exact`, `regex:PATTERN`, or FILE.py:FUNCTION, "
        "which takes any of `completion`, `prompt` and `answer`, the data's own, and returns a number.",
        "METRIC ...",
    ),
]
VerboseFlag = Annotated[bool, default("off", "Show the traceback of an error.")]


def parse_address(text: str) -> str:
    """Parses HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"wanted HOST:PORT, such as 10.0.0.1:8476, got {text!r}")
    return text


def _count_of_processes(text: str) -> int:
    if text == "auto":
        return AUTO
    return integer(1)(text)


@dataclasses.dataclass(frozen=True)
class MeshFlags:
    """Several devices of one host, or several processes, of which each is started with this same command."""

    mesh: Annotated[
        str | None, parser(str, "AXES"), default("one device; with several processes fsdp over all devices")
    ] = None
    """`data=2,fsdp=4,tensor=2`: copies of the model, devices that share its weights, and that share products."""
    processes: Annotated[
        int | None,
        parser(_count_of_processes, "N|auto"),
        default("as Kubeflow's Trainer, SLURM, Open MPI 4, or 5 with mpi4py, or a TPU slice started"),
    ] = None
    """`auto` asks Kubernetes too (with JAX's k8s extra); for N give --process and --coordinator."""
    process: Annotated[int | None, parser(integer(0), "I"), default("the cluster's")] = None
    """This process's number, from 0."""
    coordinator: Annotated[str | None, parser(parse_address, "HOST:PORT"), default("the cluster's")] = None
    """Where process 0 listens for the others."""
    join_within: Annotated[float, parser(seconds, "TIME"), default("5m")] = 300.0
    """The time in which all processes must have started."""

    def check_together(self) -> None:
        if self.processes is None or self.processes == 1:
            if self.process is not None or self.coordinator is not None:
                raise UserError(
                    "--process and --coordinator are for several processes: "
                    "give --processes N, or leave them out."
                )
            return
        if self.processes == AUTO:
            return
        if self.process is None or self.coordinator is None:
            raise UserError(
                f"Each of {self.processes} processes wants --process I and --coordinator HOST:PORT, "
                "or all of them --processes auto."
            )
        if self.process >= self.processes:
            raise UserError(
                f"--process {self.process} is one of 0 to {self.processes - 1} "
                f"when there are {self.processes}."
            )

    def shape(self) -> MeshShape | None:
        """Returns the shape, once connected: without --mesh `fsdp` over all devices of several
        processes, None for one.
        """
        if self.mesh:
            return parse_mesh(self.mesh)
        if process_count() == 1:
            return None
        import jax

        return MeshShape(fsdp=jax.device_count())

    def connect(self) -> None:
        """Joins the processes of the run, where there are several."""
        if self.processes == 1:
            return
        if self.processes is None and not in_cluster():
            return
        count = self.processes
        if count in (None, AUTO):
            count = None
            place = announced()
            if place:
                lifecycle.join(place.coordinator, place.processes, place.process, self.join_within)
                return
        lifecycle.join(self.coordinator, count, self.process, self.join_within)


def _sampling(name: str, metavar: str) -> Any:
    return parser(in_range(RANGES[name]), metavar)


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How tokens are sampled, in place of what the model recommends. There are no flags for penalties."""

    temperature: Annotated[
        float | None,
        _sampling("temperature", "X"),
        default("the model's, else 1; 0.8 in generate, 0.7 in chat"),
    ] = None
    """0 takes the most probable token each time; higher is more varied."""
    top_k: Annotated[int | None, _sampling("top_k", "N"), default("the model's, else 0, all")] = None
    """Sample from the N most probable tokens."""
    top_p: Annotated[
        float | None, _sampling("top_p", "X"), default("the model's, else 1, all; 0.9 in chat")
    ] = None
    """Sample from the fewest tokens that together have this probability."""
    min_p: Annotated[float | None, _sampling("min_p", "X"), default("the model's, else 0, all")] = None
    """Sample from tokens at least this share as probable as the best."""

    @property
    def overrides(self) -> dict[str, float | None]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingFlags)}


@dataclasses.dataclass(frozen=True)
class CompletionFlags(SamplingFlags):
    """How tokens are sampled, in place of what the model recommends, and how many at most."""

    max_tokens: Annotated[int, _sampling("max_tokens", "N")] = 200
    """Tokens of a completion at most."""
    seed: Annotated[int, _sampling("seed", "N")] = 0
    """The same seed samples the same text."""
