"""What XLA says of a program: its operations, its peak memory, and the collectives in its HLO text.

Known faults of its count of operations:

- The body of a loop counts once, however often it runs: ask about a program without loops (no
  `cfg.scan`, one microbatch, one decoding step).
- A call into a library or a kernel in C counts as -1 operation. On the CPU of JAX 0.12 products
  given to YNNPACK are fusions, which are counted.
- After compiling, elementwise work that fusion repeats, and conversions to and from a type the chip
  lacks, count.
- The compiler may undo remat where it sees that two computations are one.

A collective counts as often as it runs in one execution; both branches of a conditional count.
"""

import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
import numpy as np

from engine.errors import UserError

_KINDS = "all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|collective-permute|collective-broadcast"
# A TPU's kernel is written over several lines, of which one begins with `}}, metadata=`.
_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}(?:$|, execution_thread=)", re.MULTILINE | re.DOTALL
)
# what a TPU's compiler calls a computation of an all-reduce and a slice, which it sends as a reduce-scatter
_FUSED_REDUCE_SCATTER = "all-reduce-scatter"
_COLLECTIVE = re.compile(rf"\s*(?:ROOT )?\S+ = (\(.*?\)|\S+) ({_KINDS})(-start)?\(")
_CALL = re.compile(r"(?:body|calls|to_apply|\w+_computations?)=(?:\{([^}]*)\}|([\w.%-]+))")
# of an asynchronous operation: the first counts
_SECOND_HALF = re.compile(r" [\w-]+-(?:done|update)\(")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_RESULT = re.compile(r"\((?:\([^()]*\)|[^]]*\]), (\([^()]*\)|[^]]*\])")  # (operands, results, ...)
_BOX = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"mesh\[([^]]*)\] \{([\w',:()]*)\}")
# 'x', or 'x':(2)3, the 3 in x as 2 x 3 x others
_SUB_AXIS = re.compile(r"('\w+')(?::\((\d+)\)(\d+))?")


def xla_flops(program: jax.stages.Lowered | jax.stages.Compiled) -> int:
    """Returns XLA's operations of a call of a program, lowered or compiled, without transcendental
    functions.
    """
    return round((program.cost_analysis() or {}).get("flops", 0))


def xla_peak(program: jax.stages.Compiled) -> int:
    """Returns a compiled program's peak bytes. Raises RuntimeError on a backend that does not know them."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError(f"The {jax.default_backend()} backend does not say what memory a program takes.")
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return total - memory.alias_size_in_bytes  # outputs that reuse donated arguments


class CompileCounter:
    """Counts in `count` the programs compiled or fetched from the compilation cache since `reset`."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def reset(self) -> None:
        self.count = 0


class Collective(NamedTuple):
    """A collective operation, on arrays of `bytes` for each group: what all-gather makes, what
    reduce-scatter takes.
    """

    kind: str  # such as all-gather, also where it is asynchronous
    bytes: int
    # the devices of the first group, as places in the mesh; of a permute, two that stand for a pair
    group: tuple[int, ...]
    times: int  # in one execution of the program

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in one execution: of n in a ring, (n - 1) / n of the array,
        an all-reduce twice that.

        (Patarasu & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
        workstations".)
        """
        if self.kind.startswith("collective-"):
            share = 1.0
        else:
            share = 1 - 1 / len(self.group)
        if self.kind == "all-reduce":
            share *= 2
        return self.times * self.bytes * share


def read_collectives(hlo: str) -> list[Collective]:
    """Returns the collectives between two and more devices in a program's text,
    `Compiled.as_text()`.

    Raises UserError for a loop of collectives that does not say how often it runs.
    """
    computations = _COMPUTATION.findall(hlo)
    bodies = {name: text.splitlines() for _, name, text in computations}
    header = hlo.partition("\n")[0]
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)))

    @functools.cache
    def inside(name: str) -> list[Collective]:
        collectives = []
        for line in bodies[name]:
            match = _COLLECTIVE.match(line)
            if match:
                collective = _parse_collective(line, match, devices)
                if name.startswith(_FUSED_REDUCE_SCATTER) and collective.kind == "all-reduce":
                    collective = collective._replace(kind="reduce-scatter")
                collectives.append(collective)
            elif not _SECOND_HALF.search(line):
                inner = list(itertools.chain.from_iterable(map(inside, _callees(line))))
                rounds = 1
                if inner and " while(" in line:
                    rounds = _trip_count(line, bodies)
                for collective in inner:
                    collectives.append(collective._replace(times=rounds * collective.times))
        return [collective for collective in collectives if len(collective.group) > 1]

    entries = [name for entry, name, _ in computations if entry]
    return list(itertools.chain.from_iterable(map(inside, entries)))


def _callees(line: str) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    names = []
    for several, one in _CALL.findall(line):
        names += (several or one).split(", ")
    return [name.lstrip("%") for name in names]


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns how often a loop runs: as the compiler noted, else the one constant that its counter
    stays below.
    """
    note = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    if note:
        return int(note[1])
    condition = bodies[line.partition("condition=")[2].lstrip("%").partition(",")[0]]
    lines = [*condition]
    for outer in condition:
        for name in _callees(outer):
            lines += bodies[name]
    constants = re.findall(r" constant\((\d+)\)", "\n".join(lines))
    if len(constants) != 1 or not any("direction=LT" in text for text in lines):
        raise UserError(
            f"The loop {line.split()[0]} holds collectives, and the program does not say how often it runs."
        )
    return int(constants[0])


def _parse_collective(line: str, match: re.Match[str], devices: int) -> Collective:
    shape, kind, start = match.groups()
    shape = re.sub(r"\{.*?\}", "", shape)  # the layout
    if start and kind != "all-reduce":
        result = _RESULT.match(shape)
        if result:
            shape = result[1]
    size = 0.0
    for _, bits, sides in _ARRAY.findall(shape):
        size += math.prod(_integers(sides)) * int(bits or 8) / 8  # a pred is a byte
    group: tuple[int, ...]
    if kind == "collective-permute":
        group = (0, 1)
    else:
        group = _first_group(line.partition("replica_groups=")[2], devices)
    if kind == "reduce-scatter":
        return Collective(kind, round(size) * len(group), group, times=1)
    return Collective(kind, round(size), group, times=1)


def _first_group(text: str, devices: int) -> tuple[int, ...]:
    """Returns the first group of `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` `mesh['x'=2,'y'=4]
    {'y':(2)2}`; all devices of none.
    """
    if text.startswith("{{"):
        return tuple(_integers(text.partition("}")[0]))
    box = _BOX.match(text)
    if box:
        return _first_group_of_box(box)
    mesh = _AXES.match(text)
    if mesh:
        return _first_group_of_axes(mesh)
    if text and not text.startswith("{}"):
        raise UserError(
            f"The groups of a collective are written in a way that is not known here: {text[:60]!r}."
        )
    return tuple(range(devices))


def _first_group_of_box(match: re.Match[str]) -> tuple[int, ...]:
    """Reads `[2,4]<=[4,2]T(1,0)`: so many groups of so many, in the order of a box that is counted
    through and transposed.
    """
    _, group_size, sides, transposition = match.groups()
    sizes = _integers(sides)
    axes = _integers(transposition or "") or None
    order = np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)
    return tuple(order.flatten()[: int(group_size)].tolist())


def _first_group_of_axes(match: re.Match[str]) -> tuple[int, ...]:
    """Reads `mesh['x'=2,'y'=4] {'y':(2)2}`: a group is all places along these axes, or along the part
    of an axis that `_SUB_AXIS` describes.
    """
    mesh_axes, group_axes = match.groups()
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", mesh_axes)}
    names = [*sizes]
    group = [0]
    for name, before, size in _SUB_AXIS.findall(group_axes):
        count = int(size or sizes[name])
        # Neighbours are as far apart as what varies faster has places: the axes after this one, and
        # the rest of this one.
        stride = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
        stride *= sizes[name] // (int(before or 1) * count)
        steps = range(0, stride * count, stride)
        group = [place + step for place, step in itertools.product(group, steps)]
    return tuple(sorted(group))


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
