"""Makes the memory of a compiled program over time: bytes alive at each position of its schedule, by kind.

XLA's own buffer assignment says where each value lies: values in one place of one allocation follow
each other there. The scheduled program says when each is made and last read. Both are protocol
buffers, also in a program from the compilation cache. The body of a loop is walked once here.
"""

import bisect
import dataclasses
import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

from bench.machine import Json
from bench.stages.hlo_proto import (
    Alias,
    Allocation,
    AssignedBuffer,
    Assignment,
    Computation,
    Instruction,
    InstructionSequence,
    Location,
    LogicalBuffer,
    MapEntry,
    Message,
    Metadata,
    Module,
    Schedule,
    integer,
    integers,
    read_message,
    text,
)
from engine.counting.xla import xla_peak
from engine.errors import UserError

POSITIONS = 400  # the most positions of a schedule that a document shows
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
        """Returns the memory as JSON: the bytes of each kind at no more than POSITIONS positions,
        which of these is the first in backward and in the update, and the peak by XLA.

        The schedule is cut into stretches of equal length. Each is shown by its position with the
        most bytes alive, so that no peak is lost.
        """
        alive = self.alive
        parts = min(len(alive), POSITIONS)
        cuts = [len(alive) * part // parts for part in range(parts + 1)]
        positions = [max(range(low, high), key=alive.__getitem__) for low, high in itertools.pairwise(cuts)]

        def first_shown(position: int | None) -> int | None:
            if position is None:
                return None
            return min(bisect.bisect_left(positions, position), parts - 1)

        return {
            "bytes": {
                kind: [column[position] for position in positions] for kind, column in self.bytes.items()
            },
            "backward": first_shown(self.backward),
            "update": first_shown(self.update),
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
    backward = None
    update = None
    starts = [buffer.start for buffer in buffers if _BACKWARD in buffer.label and "loss" in buffer.origins]
    if starts:
        backward = min(starts)
        update = max(starts) + 1
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
    ordered = sorted(buffers, key=operator.attrgetter("place", "start"))
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
        self.entry = integer(module, Module.ENTRY_COMPUTATION_ID)
        self.roots: dict[int, int] = {}  # computation -> its root
        self.instructions: dict[int, Message] = {}
        for computation in map(read_message, module[Module.COMPUTATIONS]):
            self.roots[integer(computation, Computation.ID)] = integer(computation, Computation.ROOT_ID)
            for instruction in map(read_message, computation[Computation.INSTRUCTIONS]):
                self.instructions[integer(instruction, Instruction.ID)] = instruction
        self.schedule: dict[int, list[int]] = {}  # computation -> its instructions in their order
        schedule = read_message(module[Module.SCHEDULE][0])
        for entry in map(read_message, schedule[Schedule.SEQUENCES]):
            sequence = read_message(entry[MapEntry.VALUE][0])
            instructions = integers(sequence, InstructionSequence.INSTRUCTION_IDS)
            self.schedule[integer(entry, MapEntry.KEY)] = list(instructions)
        self.position = 0
        # instruction -> index -> buffer
        self.results: dict[int, dict[Index, Buffer]] = defaultdict(dict)
        self._assign(read_message(assignment))

    def _assign(self, assignment: Message) -> None:
        """Makes the Buffers of a BufferAssignmentProto, and sets `results`.

        Each of its logical buffers is one array in the result of one instruction. Those that are
        written over one another share a Buffer.
        """
        defined_at: dict[int, tuple[int, Index]] = {}  # logical buffer -> instruction, and index in it
        for logical in map(read_message, assignment[Assignment.LOGICAL_BUFFERS]):
            location = _location(logical[LogicalBuffer.DEFINED_AT][0])
            defined_at[integer(logical, LogicalBuffer.ID)] = location
        logical_at = {location: logical for logical, location in defined_at.items()}
        first = {logical: logical for logical in defined_at}  # the first of those that share a Buffer
        for alias in map(read_message, assignment.get(Assignment.BUFFER_ALIASES, [])):
            source = integer(alias, Alias.SOURCE_BUFFER_ID)
            other = logical_at[_location(alias[Alias.LOCATION][0])]
            if source < other:
                first[other] = first[source]
        buffers: dict[int, Buffer] = {}
        for allocation in map(read_message, assignment[Assignment.BUFFER_ALLOCATIONS]):
            if (
                integer(allocation, Allocation.IS_THREAD_LOCAL)
                or integer(allocation, Allocation.IS_TUPLE)  # of pointers
                or integer(allocation, Allocation.IS_CONSTANT)
            ):
                continue
            argument = self._argument(allocation)
            for part in map(read_message, allocation.get(Allocation.ASSIGNED, [])):
                size = integer(part, AssignedBuffer.SIZE)
                place = (integer(allocation, Allocation.INDEX), integer(part, AssignedBuffer.OFFSET))
                logical_id = integer(part, AssignedBuffer.LOGICAL_BUFFER_ID)
                buffer = buffers.setdefault(first[logical_id], Buffer(size, place, argument))
                instruction, index = defined_at[logical_id]
                self.results[instruction][index] = buffer

    def _argument(self, allocation: Message) -> str | None:
        """Returns the label of the program's argument that an allocation holds; None for another."""
        if not integer(allocation, Allocation.IS_ENTRY_COMPUTATION_PARAMETER):
            return None
        return self._label(self._parameters[integer(allocation, Allocation.PARAMETER_NUMBER)])

    @functools.cached_property
    def _parameters(self) -> dict[int, int]:
        """The number of each of the program's arguments -> the instruction that stands for it."""
        parameters = {}
        for instruction in self.schedule[self.entry]:
            if self._opcode(instruction) == "parameter":
                number = integer(self.instructions[instruction], Instruction.PARAMETER_NUMBER)
                parameters[number] = instruction
        return parameters

    def _opcode(self, instruction: int) -> str:
        return text(self.instructions[instruction], Instruction.OPCODE)

    def _label(self, instruction: int) -> str:
        """Returns the scopes of the source that it comes from, such as
        `jit(train_step)/jvp(head)/dot_general`, or ''.
        """
        metadata = self.instructions[instruction].get(Instruction.METADATA)
        if metadata:
            return text(read_message(metadata[0]), Metadata.OP_NAME)
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
            inputs = [values[operand] for operand in integers(fields, Instruction.OPERAND_IDS)]
            called = list(integers(fields, Instruction.CALLED_COMPUTATION_IDS))
            match self._opcode(instruction):
                case "parameter" if arguments:
                    value = arguments[integer(fields, Instruction.PARAMETER_NUMBER)]
                case "bitcast" | "opt-barrier":
                    value = inputs[0]
                case "tuple":
                    value = _tuple_of(inputs)
                case "get-tuple-element":
                    value = _element(inputs[0], integer(fields, Instruction.TUPLE_INDEX))
                case "while":
                    body, condition = called
                    self._note_reads(inputs, label)
                    self.run(condition, inputs)
                    value = _either(inputs[0], self.run(body, inputs))
                    self._note_reads([value], label)
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
                self._note_reads([value], "")
            self.position += 1
        return result

    def _make(self, instruction: int, inputs: list[Value], label: str) -> Value:
        """Reads the operands, and returns the value of the buffers that the instruction makes."""
        operands = self._note_reads(inputs, label)
        if self._opcode(instruction) == "parameter":
            origins = frozenset({label})
        else:
            origins = frozenset[str]().union(*(buffer.origins for buffer in operands))
            if "(head)" in label and any(origin.startswith("batch") for origin in origins):
                origins |= {"loss"}
        for buffer in self.results[instruction].values():
            buffer.end = self.position
            if buffer.start < 0:
                buffer.start = self.position
                buffer.label = label
                buffer.last_label = label
                buffer.origins = origins
        return {index: frozenset({buffer}) for index, buffer in self.results[instruction].items()}

    def _note_reads(self, values: list[Value], label: str) -> list[Buffer]:
        """Notes that the buffers of these values are read at this position, by an operation of this
        label, and returns them.
        """
        buffers: list[Buffer] = []
        for value in values:
            for each in value.values():
                buffers.extend(each)
        for buffer in buffers:
            buffer.end = self.position
            buffer.last_label = label or buffer.last_label
        return buffers


def _location(data: bytes) -> tuple[int, Index]:
    """Returns the instruction and the index in its result that a LogicalBufferProto.Location names."""
    location = read_message(data)
    index = tuple(integers(location, Location.SHAPE_INDEX))
    return integer(location, Location.INSTRUCTION_ID), index


def _tuple_of(values: Sequence[Value]) -> Value:
    """Returns the value of a tuple of these values."""
    joined: Value = {}
    for element, value in enumerate(values):
        for index, buffers in value.items():
            joined[(element, *index)] = buffers
    return joined


def _element(value: Value, element: int) -> Value:
    """Returns the value of one element of a tuple."""
    return {index[1:]: buffers for index, buffers in value.items() if index[:1] == (element,)}


def _either(first: Value, second: Value) -> Value:
    """Returns a value that may lie where either of two does."""
    return {index: first.get(index, frozenset()) | second.get(index, frozenset()) for index in first | second}


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


# how the label of an argument begins -> its kind
_ARGUMENT_KINDS = {
    "state.opt_state": "optimizer state",
    "state.trainable": "parameters",
    "params": "parameters",
    "frozen": "parameters",
    "cache": "KV cache",
}


def _argument_kind(label: str) -> str:
    name = label.partition("[")[0]
    for start, kind in _ARGUMENT_KINDS.items():
        if name.startswith(start):
            return kind
    return "temporaries"
