"""Makes the memory of a compiled program over time: bytes alive at each position of its schedule, by kind.

XLA's own buffer assignment says where each value lies: values in one place of one allocation follow
each other there. The scheduled program says when each is made and last read. Both are protocol
buffers (`xla/service/hlo.proto`), also in a program from the compilation cache; field numbers below
are those of that file. A loop's body runs once here.
"""

import bisect
import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from bench.cli import Json
from engine.counting.xla import xla_peak
from engine.errors import UserError

POSITIONS = 400  # that a document has of a schedule, at most
KINDS = ("parameters", "optimizer state", "KV cache", "gradients", "residuals", "temporaries")
_BACKWARD = "transpose(jvp"
_OPTIMIZER = "/optimizer/"
Index = tuple[int, ...]  # of an array in a value: () of an array alone, (0, 1) in a tuple of tuples


@dataclasses.dataclass(frozen=True)
class MemoryOverTime:
    """The memory of one call of a program, in bytes at each position of its schedule.

    `backward` and `update` are the positions at which backward begins and at which all gradients
    exist; None where there is no backward pass. `xla` is the peak by `memory_analysis()`, with the
    holes between the places of the heap.
    """

    bytes: dict[str, list[int]]  # by kind; each position's sum is what is alive
    backward: int | None
    update: int | None
    xla: int

    @property
    def alive(self) -> list[int]:
        return [sum(column) for column in zip(*self.bytes.values())]

    def document(self) -> Json:
        """Returns the bytes by kind at POSITIONS positions at most, the first of these in backward
        and in the update, and the peak by XLA. Of equal stretches of the schedule, the position
        with most alive stands for each: peaks stay.
        """
        alive = self.alive
        parts = min(len(alive), POSITIONS)
        cuts = [len(alive) * part // parts for part in range(parts + 1)]
        positions = [max(range(low, high), key=alive.__getitem__) for low, high in itertools.pairwise(cuts)]

        def place(position: int | None) -> int | None:
            if position is None:
                return None
            return min(bisect.bisect_left(positions, position), parts - 1)

        return {
            "bytes": {
                kind: [column[position] for position in positions] for kind, column in self.bytes.items()
            },
            "backward": place(self.backward),
            "update": place(self.update),
            "xla": self.xla,
        }


@dataclasses.dataclass(eq=False)
class Buffer:
    """A place in memory while it holds one value, or those that are written over one another: alive
    from position `start` to `end`, both included.

    `argument`: the label of the argument in whose memory it lies. `origins`: of the first value,
    labels of the arguments that it depends on, and 'loss' from the logits of a batch on.
    """

    bytes: int
    place: tuple[int, int]  # allocation, and offset in it
    argument: str | None
    start: int = -1
    end: int = -1
    label: str = ""
    last_label: str = ""  # of the operation that reads it last
    origins: frozenset[str] = frozenset()


def memory_over_time(compiled: jax.stages.Compiled) -> MemoryOverTime:
    """Returns the memory of a compiled program. Its phases and kinds are known by the scopes of
    `engine/training/step.py`.

    Raises UserError when the backend does not say where its values lie.
    """
    buffers, positions = find_buffers(compiled)
    after_loss = [each for each in buffers if _BACKWARD in each.label and "loss" in each.origins]
    backward = min((each.start for each in after_loss), default=None)
    if after_loss:
        update = max((each.start for each in after_loss), default=0) + 1
    else:
        update = None
    changes = {kind: [0] * (positions + 1) for kind in KINDS}
    for buffer in buffers:
        column = changes[kind_of(buffer, backward)]
        column[buffer.start] += buffer.bytes
        column[buffer.end + 1] -= buffer.bytes
    alive = {kind: list(itertools.accumulate(column))[:positions] for kind, column in changes.items()}
    return MemoryOverTime(alive, backward, update, xla_peak(compiled))


def find_buffers(compiled: jax.stages.Compiled) -> tuple[list[Buffer], int]:
    """Returns the program's buffers, and how many positions its schedule has."""
    program = _Program(compiled)
    program.run(program.entry)
    buffers: set[Buffer] = set()
    for results in program.results.values():
        buffers.update(buffer for buffer in results.values() if buffer.start >= 0)
    ordered = sorted(buffers, key=lambda buffer: (buffer.place, buffer.start))
    for buffer, after in itertools.pairwise(ordered):
        if buffer.place == after.place:
            buffer.end = min(buffer.end, after.start - 1)
    for buffer in ordered:
        if buffer.argument is not None:
            buffer.start = 0
            buffer.end = program.position - 1  # the caller's memory
    return ordered, program.position


Value = dict[Index, frozenset[Buffer]]  # the buffers that each array of a value may lie in


class _Program:
    """A scheduled program with its buffer assignment; `run` walks it and sets the spans, labels and
    origins of buffers.
    """

    def __init__(self, compiled: jax.stages.Compiled) -> None:
        assignment = getattr(compiled.memory_analysis(), "serialized_buffer_assignment_proto", b"")
        if not assignment:
            raise UserError(
                "This backend does not say where the values "
                "of a program lie, so that its memory cannot be drawn."
            )
        executable: Any = compiled.runtime_executable()
        module = read_message(executable.hlo_modules()[0].as_serialized_hlo_module_proto())
        self.entry: int = module[6][0]
        self.roots: dict[int, int] = {}  # computation -> its root
        self.instructions: dict[int, dict[int, list[Any]]] = {}
        for computation in map(read_message, module[3]):
            self.roots[computation[5][0]] = computation[6][0]
            self.instructions |= {each[35][0]: each for each in map(read_message, computation[2])}
        sequences = [read_message(entry) for entry in read_message(module[7][0])[1]]
        self.schedule = {
            entry[1][0]: [*integers(read_message(entry[2][0]).get(1, []))] for entry in sequences
        }
        self.position = 0
        # instruction -> index -> buffer
        self.results: dict[int, dict[Index, Buffer]] = defaultdict(dict)
        self._assign(read_message(assignment))

    def _assign(self, assignment: dict[int, list[Any]]) -> None:
        """Reads a BufferAssignmentProto: values (1) with the places that define them, those that
        share a buffer (2), and allocations (3).
        """
        defined = {each.get(1, [0])[0]: _location(each[3][0]) for each in map(read_message, assignment[1])}
        numbers = {location: number for number, location in defined.items()}
        first = {number: number for number in defined}
        for alias in map(read_message, assignment.get(2, [])):
            number = alias.get(1, [0])[0]
            other = numbers[_location(alias[2][0])]
            if number < other:
                first[other] = first[number]
        buffers: dict[int, Buffer] = {}
        entry = {self._number(n, 9): n for n in self.schedule[self.entry] if self._opcode(n) == "parameter"}
        for allocation in map(read_message, assignment[3]):
            # of one thread, of pointers, of constants
            if any(allocation.get(field) for field in (3, 11, 12)):
                continue
            if allocation.get(5):
                argument = self._label(entry[allocation.get(6, [0])[0]])
            else:
                argument = None
            for assigned in map(read_message, allocation.get(9, [])):
                place = (allocation.get(1, [0])[0], assigned.get(2, [0])[0])
                number = assigned.get(1, [0])[0]
                instruction, index = defined[number]
                self.results[instruction][index] = buffers.setdefault(
                    first[number], Buffer(assigned.get(3, [0])[0], place, argument)
                )

    def _opcode(self, instruction: int) -> str:
        return self.instructions[instruction][2][0].decode()

    def _number(self, instruction: int, field: int) -> int:
        return self.instructions[instruction].get(field, [0])[0]

    def _label(self, instruction: int) -> str:
        """Returns the scopes of the source that it comes from, such as
        `jit(train_step)/jvp(head)/dot_general`, or ''.
        """
        metadata = self.instructions[instruction].get(7)
        if metadata:
            return read_message(metadata[0]).get(2, [b""])[0].decode()
        return ""

    def run(self, computation: int, arguments: Sequence[Value] = ()) -> Value:
        """Runs a computation's operations in their order, each at the next position, and returns
        its result's value.
        """
        values: dict[int, Value] = {}
        result: Value = {}
        for instruction in self.schedule[computation]:
            fields = self.instructions[instruction]
            label = self._label(instruction)
            inputs = [values[operand] for operand in integers(fields.get(36, []))]
            called = [*integers(fields.get(38, []))]
            match self._opcode(instruction):
                case "parameter" if arguments:
                    value = arguments[self._number(instruction, 9)]
                case "bitcast" | "opt-barrier":
                    value = inputs[0]
                case "tuple":
                    value = {}
                    for place, each in enumerate(inputs):
                        value |= {(place, *index): buffers for index, buffers in each.items()}
                case "get-tuple-element":
                    place = self._number(instruction, 13)
                    value = {
                        index[1:]: buffers for index, buffers in inputs[0].items() if index[:1] == (place,)
                    }
                case "while":
                    body, condition = called
                    self._read(inputs, label)
                    self.run(condition, inputs)
                    value = _either(inputs[0], self.run(body, inputs))
                    self._read([value], label)
                case "call":
                    value = self.run(called[0], inputs)
                case "conditional":
                    branches = [self.run(branch, [each]) for branch, each in zip(called, inputs[1:])]
                    value = functools.reduce(_either, branches)
                case _:
                    value = self._make(instruction, inputs, label)
            values[instruction] = value
            if instruction == self.roots[computation]:
                result = value
                self._read([value], "")
            self.position += 1
        return result

    def _make(self, instruction: int, inputs: list[Value], label: str) -> Value:
        """Reads the operands, and returns the value of the buffers that the instruction makes."""
        origins = frozenset[str]().union(*(buffer.origins for buffer in self._read(inputs, label)))
        if "(head)" in label and any(origin.startswith("batch") for origin in origins):
            origins |= {"loss"}
        if self._opcode(instruction) == "parameter":
            origins = frozenset({label})
        for buffer in self.results[instruction].values():
            buffer.end = self.position
            if buffer.start < 0:
                buffer.start = self.position
                buffer.label = label
                buffer.last_label = label
                buffer.origins = origins
        return {index: frozenset({buffer}) for index, buffer in self.results[instruction].items()}

    def _read(self, values: list[Value], label: str) -> list[Buffer]:
        """Notes that the buffers of these values are read here, and returns them."""
        buffers: list[Buffer] = []
        for value in values:
            for each in value.values():
                buffers += each
        for buffer in buffers:
            buffer.end = self.position
            buffer.last_label = label or buffer.last_label
        return buffers


def _location(data: bytes) -> tuple[int, Index]:
    """Returns the instruction and the place in its result that a LogicalBufferProto.Location names."""
    location = read_message(data)
    return location[4][0], (*integers(location.get(3, [])),)


def _either(first: Value, second: Value) -> Value:
    return {index: first.get(index, frozenset()) | second.get(index, frozenset()) for index in first | second}


def read_message(data: bytes) -> dict[int, list[Any]]:
    """Returns field number -> values of a protocol buffer: integers, and bytes for anything longer."""
    fields: dict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            number, at = _varint(data, at)
            fields[key >> 3].append(number)
        else:
            size, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            fields[key >> 3].append(data[at : at + size])
            at += size
    return dict(fields)


def integers(values: list[Any]) -> Iterator[int]:
    """Yields the integers of a repeated field, which may be packed."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the integer that begins at a place, seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at = at + 1
        shift = shift + 7
        if byte < 128:
            return value, at


def kind_of(buffer: Buffer, backward: int | None) -> str:
    """Returns one of KINDS. A value made before `backward` and read after it is a residual; weights
    in another type, or with the norm's gain in them, are parameters still.
    """
    if buffer.argument is not None:
        return _argument_kind(buffer.argument)
    if _OPTIMIZER in buffer.label:
        return "optimizer state"
    if backward is not None:
        if buffer.origins and all(_argument_kind(origin) == "parameters" for origin in buffer.origins):
            return "parameters"
        if _OPTIMIZER in buffer.last_label and _BACKWARD in buffer.label:
            return "gradients"
        if buffer.start < backward <= buffer.end:
            return "residuals"
    return "temporaries"


def _argument_kind(label: str) -> str:
    name = label.partition("[")[0]
    for start, kind in {
        "state.opt_state": "optimizer state",
        "state.trainable": "parameters",
        "params": "parameters",
        "frozen": "parameters",
        "cache": "KV cache",
    }.items():
        if name.startswith(start):
            return kind
    return "temporaries"
