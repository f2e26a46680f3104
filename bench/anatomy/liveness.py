"""Finds the buffers of a scheduled program: which operation makes each, how large it is, and when it is last read.

Positions are those of the schedule, with a loop's body once. Three rules of XLA make memory other than the sum of results:

- views (a bitcast, a tuple and its elements) are their operand's buffer, a loop's body writes into the buffers that the loop
  carries, and a donated result into its argument;
- an operation that reads an operand element by element, for the last time, may write over it;
- a heap has holes: XLA places the largest buffer first, each in the smallest gap that it fits, or the longest-lived first
  where that packs closer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.anatomy.hlo import Operation, ScheduledProgram, array_bytes

ALIGNMENT = 64  # bytes, of each place in the heap
_VIEWS = {"bitcast", "optimization-barrier"}
_UPDATES = {"dynamic-update-slice", "scatter"}
_ELEMENTWISE = {
    "abs", "add", "and", "compare", "convert", "copy", "cosine", "divide", "exponential", "is-finite", "log", "maximum",
    "minimum", "multiply", "negate", "not", "or", "power", "rsqrt", "select", "sine", "sqrt", "subtract", "tanh",
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class Buffer:
    """A place in memory: alive from position `start` to `end`, both included.

    `place`: 'argument', 'result' (of the program, not donated), or 'heap'. `origins`: labels of the arguments that its
    numbers depend on, and 'loss' from the logits of a batch on. `order`: XLA's own numbering.
    """

    shape: str
    bytes: int
    start: int
    end: int
    label: str
    place: str
    origins: frozenset[str] = frozenset()
    first_origins: frozenset[str] = frozenset()  # of the numbers first written
    last_label: str = ""
    order: int = 0
    has_many_values: bool = False  # it is updated in place, or carried by a loop
    overwrites: "Buffer | None" = None
    candidates: tuple["Buffer", ...] = ()


Value = Any  # a Buffer, or a tuple of Values


def _flat(value: Value) -> Iterator[Buffer]:
    if isinstance(value, Buffer):
        yield value
    else:
        for each in value:
            yield from _flat(each)


@dataclasses.dataclass
class _Walk:
    program: ScheduledProgram
    buffers: list[Buffer] = dataclasses.field(default_factory=list)
    position: int = 0

    def entry(self) -> None:
        program, name = self.program, self.program.entry
        root = program.root(name)
        results = root.operands if root.opcode == "tuple" else (root.name,)
        arguments: dict[int, Buffer] = {}
        for operation in program.computations[name]:
            if operation.opcode == "parameter":
                shape = operation.shapes[0]
                arguments[operation.number] = Buffer(
                    shape, array_bytes(shape), 0, 0, operation.label, "argument", frozenset({operation.label})
                )
        self.buffers += arguments.values()
        targets: dict[str, Any] = {}
        for number, result in enumerate(results):
            if number in program.donated:
                self._route(name, result, arguments[program.donated[number]], targets)
            else:
                self._route(name, result, "result", targets)
        self._run(name, [arguments[number] for number in sorted(arguments)], targets)
        for buffer in self.buffers:
            if buffer.place != "heap":
                buffer.end = self.position

    def _route(self, computation: str, name: str, target: Any, targets: dict[str, Any]) -> None:
        """Notes where the operation that makes a result must write."""
        operations = self.program.by_name(computation)
        operation = operations[name]
        if operation.opcode in _VIEWS:
            self._route(computation, operation.operands[0], target, targets)
        elif operation.opcode == "get-tuple-element":
            loop = operations[operation.operands[0]]
            first = operations[loop.operands[0]] if loop.opcode == "while" else loop
            if first.opcode == "tuple":
                self._route(computation, first.operands[operation.number], target, targets)
        elif operation.opcode not in ("parameter", "constant", "tuple"):
            targets.setdefault(name, target)

    def _read(self, value: Value, label: str) -> None:
        for buffer in _flat(value):
            buffer.end, buffer.last_label = self.position, label or buffer.last_label

    def _make(self, operation: Operation, target: Any, inputs: Sequence[Value], shapes: Sequence[str]) -> Value:
        """Returns the buffers of an operation's results, or those where they must lie. `shapes`: of its operands, viewed."""
        origins = frozenset[str]().union(*(buffer.origins for buffer in _flat(inputs)))
        if "(head)" in operation.label and any(origin.startswith("batch") for origin in origins):
            origins |= {"loss"}
        if target is None and self._updates_in_place(operation) and isinstance(inputs[0], Buffer) and inputs[0].place == "heap":
            target = inputs[0]
        if isinstance(target, Buffer):
            target.origins |= origins
            target.has_many_values = True
            return target
        made = []
        for shape in operation.shapes:
            size = 0 if operation.opcode == "constant" else array_bytes(shape)
            place = "result" if target == "result" else "heap"
            buffer = Buffer(
                shape, size, self.position, self.position, operation.label, place, origins, origins, operation.label
            )
            buffer.candidates = tuple(
                each
                for number, each in enumerate(inputs)
                if isinstance(each, Buffer) and shapes[number] == shape and self._may_overwrite(operation, number)
            )
            made.append(buffer)
        self.buffers += made
        return tuple(made) if operation.is_tuple else made[0]

    def _updates_in_place(self, operation: Operation) -> bool:
        """Returns whether an operation, or the last one of a fusion, writes a part of its first operand."""
        if operation.opcode == "fusion":
            inside = self.program.by_name(operation.called("calls"))
            operation = self.program.root(operation.called("calls"))
            if operation.opcode in _UPDATES:
                first = inside[operation.operands[0]]
                return first.opcode == "parameter" and first.number == 0
        return operation.opcode in _UPDATES

    def _may_overwrite(self, operation: Operation, number: int) -> bool:
        """Returns whether an operation reads its operand of this number element by element."""
        if operation.opcode != "fusion":
            return operation.opcode in _ELEMENTWISE
        if "kind=kLoop" not in operation.attributes:
            return False
        reached = set[str]()
        for each in self.program.computations[operation.called("calls")]:
            if each.opcode == "parameter" and each.number == number:
                reached.add(each.name)
            elif reached.intersection(each.operands):
                if each.opcode not in _ELEMENTWISE | {"tuple"}:
                    return False
                reached.add(each.name)
        return True

    def _run(self, computation: str, arguments: Sequence[Value], targets: dict[str, Any]) -> Value:
        values: dict[str, Value] = {}
        result: Value = ()
        operations, order = self.program.by_name(computation), self._orders(computation)
        for operation in self.program.computations[computation]:
            inputs = [values[name] for name in operation.operands]
            first = len(self.buffers)
            if operation.opcode == "parameter":
                value = arguments[operation.number]
            elif operation.opcode in _VIEWS:
                value = inputs[0]
            elif operation.opcode == "tuple":
                value = tuple(inputs)
            elif operation.opcode == "get-tuple-element":
                value = inputs[0][operation.number]
            elif operation.opcode == "while":
                value = inputs[0]
                self._read(value, operation.label)
                for buffer in _flat(value):
                    buffer.has_many_values = True
                self._run(operation.called("condition"), [value], {})
                carried: dict[str, Any] = {}
                body = self.program.root(operation.called("body"))
                for number, name in enumerate(body.operands if body.opcode == "tuple" else ()):
                    if isinstance(value[number], Buffer):
                        self._route(operation.called("body"), name, value[number], carried)
                self._run(operation.called("body"), [value], carried)
                self._read(value, operation.label)
            elif operation.opcode == "call":
                value = self._run(operation.called("to_apply"), inputs, {})
            else:
                self._read(inputs, operation.label)
                views = ["".join(operations[name].shapes) for name in operation.operands]
                value = self._make(operation, targets.get(operation.name), inputs, views)
            for buffer in self.buffers[first:]:
                buffer.order = buffer.order or order[operation.name]
            values[operation.name] = value
            self.position += 1
            if operation.is_root:
                result = value
                self._read(value, "")
        return result

    def _orders(self, computation: str) -> dict[str, int]:
        """Returns name -> number of the operations in the order that XLA numbers them: each after its operands."""
        operations, order = self.program.by_name(computation), dict[str, int]()
        stack = [(self.program.root(computation).name, False)]
        while stack:
            name, is_ready = stack.pop()
            if name in order:
                continue
            if is_ready:
                order[name] = len(order) + 1
            else:
                stack.append((name, True))
                stack += [(operand, False) for operand in reversed(operations[name].operands)]
        return {name: order.get(name, len(order)) for name in operations}


def find_buffers(program: ScheduledProgram) -> tuple[list[Buffer], int]:
    """Returns the program's buffers in the order in which they are made, and how many positions there are.

    A buffer that is written over ends one position before the one that `overwrites` it begins.
    """
    walk = _Walk(program)
    walk.entry()
    taken: set[int] = set()
    free = lambda buffer: buffer.place == "heap" and buffer.bytes and not buffer.has_many_values
    for buffer in filter(free, walk.buffers):
        for old in filter(free, buffer.candidates):
            if old.end == buffer.start and old.start < old.end and id(old) not in taken:
                buffer.overwrites, old.end = old, buffer.start - 1
                taken.add(id(old))
                break
    return walk.buffers, walk.position


@dataclasses.dataclass
class _Span:
    """The time in which a place in the heap is taken: by its first buffer to `own_end`, by those that overwrite it to `end`."""

    order: int
    bytes: int
    start: int
    own_end: int
    end: int


def heap_bytes(buffers: Sequence[Buffer]) -> int:
    """Returns the bytes of the heap that holds these buffers, packed as XLA packs them."""
    spans: dict[int, _Span] = {}  # by the id of each buffer in them
    for buffer in buffers:
        if buffer.place == "heap" and buffer.bytes:
            new = _Span(buffer.order, buffer.bytes, buffer.start, buffer.end, buffer.end)
            if buffer.overwrites:
                new = spans[id(buffer.overwrites)]
                new.end = buffer.end
            spans[id(buffer)] = new
    distinct = list({id(span): span for span in spans.values()}.values())
    by_size = sorted(distinct, key=lambda span: (-span.bytes, span.start - span.own_end, span.order))
    by_life = sorted(distinct, key=lambda span: (span.start - span.end, -span.bytes, span.order))
    return min(_pack(by_size), _pack(by_life))


def _pack(spans: Sequence[_Span]) -> int:
    starts, ends = (np.array([getattr(span, name) for span in spans]) for name in ("start", "end"))
    placed: list[tuple[int, int]] = []
    for count, span in enumerate(spans):
        at, best = 0, None
        together = np.flatnonzero((starts[:count] <= span.end) & (ends[:count] >= span.start))
        for low, high in sorted(placed[each] for each in together):
            if low - at >= span.bytes and (best is None or low - at < best[0]):
                best = low - at, at
            at = max(at, -(-high // ALIGNMENT) * ALIGNMENT)
        place = best[1] if best else at
        placed.append((place, place + span.bytes))
    return max((high for _, high in placed), default=0)
