"""Reads protocol buffers of `xla/service/hlo.proto`: scheduled programs and their buffer assignment.

Each enumeration below is a message of that file, with the numbers of the fields that are read here.
"""

from collections import defaultdict
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

Message = dict[int, list[Any]]  # a protocol buffer: field number -> its values


class Module(IntEnum):
    """HloModuleProto."""

    COMPUTATIONS = 3
    ENTRY_COMPUTATION_ID = 6
    SCHEDULE = 7


class Schedule(IntEnum):
    """HloScheduleProto, whose sequences are a map: computation id -> InstructionSequence."""

    SEQUENCES = 1


class MapEntry(IntEnum):
    """One entry of a map."""

    KEY = 1
    VALUE = 2


class InstructionSequence(IntEnum):
    """HloScheduleProto.InstructionSequence."""

    INSTRUCTION_IDS = 1


class Computation(IntEnum):
    """HloComputationProto."""

    INSTRUCTIONS = 2
    ID = 5
    ROOT_ID = 6


class Instruction(IntEnum):
    """HloInstructionProto."""

    OPCODE = 2
    METADATA = 7
    PARAMETER_NUMBER = 9
    TUPLE_INDEX = 13
    ID = 35
    OPERAND_IDS = 36
    CALLED_COMPUTATION_IDS = 38


class Metadata(IntEnum):
    """OpMetadata of an instruction."""

    OP_NAME = 2


class Assignment(IntEnum):
    """BufferAssignmentProto."""

    LOGICAL_BUFFERS = 1
    BUFFER_ALIASES = 2
    BUFFER_ALLOCATIONS = 3


class LogicalBuffer(IntEnum):
    """LogicalBufferProto."""

    ID = 1
    DEFINED_AT = 3


class Location(IntEnum):
    """LogicalBufferProto.Location."""

    SHAPE_INDEX = 3
    INSTRUCTION_ID = 4


class Alias(IntEnum):
    """BufferAssignmentProto.BufferAlias."""

    SOURCE_BUFFER_ID = 1
    LOCATION = 2


class Allocation(IntEnum):
    """BufferAllocationProto."""

    INDEX = 1
    IS_THREAD_LOCAL = 3
    IS_ENTRY_COMPUTATION_PARAMETER = 5
    PARAMETER_NUMBER = 6
    ASSIGNED = 9
    IS_TUPLE = 11
    IS_CONSTANT = 12


class AssignedBuffer(IntEnum):
    """BufferAllocationProto.Assigned."""

    LOGICAL_BUFFER_ID = 1
    OFFSET = 2
    SIZE = 3


def read_message(data: bytes) -> Message:
    """Returns field number -> values of a protocol buffer: integers, and bytes for anything longer."""
    fields: Message = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field = key >> 3
        match key & 7:  # the wire type
            case 0:
                number, at = _varint(data, at)
                fields[field].append(number)
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case wire_type:
                raise ValueError(f"Field {field} of a protocol buffer has the unknown wire type {wire_type}.")
        fields[field].append(data[at : at + size])
        at += size
    return dict(fields)


def integer(message: Message, field: int) -> int:
    """Returns the integer or bool in a field. Protocol buffers leave out zeros: a field that is not
    there is 0.
    """
    if field in message:
        return message[field][0]
    return 0


def text(message: Message, field: int) -> str:
    """Returns the text in a field. Protocol buffers leave out empty texts, too."""
    if field in message:
        return message[field][0].decode()
    return ""


def integers(message: Message, field: int) -> Iterator[int]:
    """Yields the integers of a repeated field, which may be packed."""
    for value in message.get(field, []):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the integer that begins at a place, seven bits a byte, and the place after it."""
    value = 0
    shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at
