"""Reads the scheduled program that XLA compiled, as text: each computation's operations in the order in which they run."""

import dataclasses
import functools
import math
import re

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_RESULT = re.compile(r"\s*(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*\})?")
_DONATED = re.compile(r"\{(\d*)\}: \((\d+),")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation. `shapes` holds an array's type, or those of a tuple, each such as `f32[4,8]{1,0}`."""

    name: str
    opcode: str
    shapes: tuple[str, ...]
    is_tuple: bool
    operands: tuple[str, ...]
    argument: str  # what stands in its parentheses
    attributes: str
    is_root: bool

    @functools.cached_property
    def label(self) -> str:
        """The scopes of the source that it comes from, such as `jit(train_step)/jvp(head)/dot_general`; '' if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, attribute: str) -> str:
        """Returns the computation that it calls as `calls`, `to_apply`, `body` or `condition`; '' for none."""
        match = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def number(self) -> int:
        """The number of a parameter, or the place in its tuple that a get-tuple-element takes."""
        match = re.search(r"index=(\d+)", self.attributes)
        return int(self.argument if self.opcode == "parameter" else match[1] if match else 0)


@dataclasses.dataclass(frozen=True)
class ScheduledProgram:
    """The computations of a program by name, the one that runs first, and donated: result number -> parameter number."""

    computations: dict[str, tuple[Operation, ...]]
    entry: str
    donated: dict[int, int]

    def by_name(self, computation: str) -> dict[str, Operation]:
        return {operation.name: operation for operation in self.computations[computation]}

    def root(self, computation: str) -> Operation:
        return next(operation for operation in self.computations[computation] if operation.is_root)


def array_bytes(shape: str) -> int:
    """Returns the bytes of an array's type, such as f32[4,8]{1,0}; a token takes none."""
    match = _ARRAY.match(shape)
    return _BYTES.get(match[1], 0) * math.prod(map(int, filter(None, match[2].split(",")))) if match else 0


def read_program(text: str) -> ScheduledProgram:
    """Parses `compiled.as_text()`. Raises ValueError for a program whose operations are in no order."""
    header = text.partition("\n")[0]
    if "is_scheduled=true" not in header:
        raise ValueError("The program is not scheduled: its text does not say in which order it runs.")
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    donated = {int(result or 0): int(parameter) for result, parameter in _DONATED.findall(aliases[1])} if aliases else {}
    computations: dict[str, list[Operation]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None and (match := _RESULT.match(line)):
            lines.append(_operation(match[2], re.sub(r"/\*.*?\*/", "", line[match.end() :]), bool(match[1])))
    return ScheduledProgram({name: tuple(lines) for name, lines in computations.items()}, entry, donated)


def _operation(name: str, text: str, is_root: bool) -> Operation:
    is_tuple = text.startswith("(")
    cut = _closing(text) + 1 if is_tuple else text.index(" ")
    shapes = tuple(match[0] for match in _ARRAY.finditer(text[:cut]))
    opcode, _, rest = text[cut:].strip().partition("(")
    end = _closing("(" + rest) - 1
    argument = rest[:end]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Operation(name, opcode, shapes, is_tuple, operands, argument, rest[end + 1 :], is_root)


def _closing(text: str) -> int:
    """Returns the place of the parenthesis that closes the first."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"A parenthesis does not close: {text[:80]}")
