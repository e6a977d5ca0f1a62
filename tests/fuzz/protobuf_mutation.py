"""Changes one field of a protobuf message, wherever in it: a graph whose bytes are still a graph.

In: a message's bytes and its type. Out: the bytes with one number at an extreme, one text changed, or one of several
submessages left out, doubled or exchanged.
"""

from __future__ import annotations

from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tests.fuzz.mutation import mutate_bytes

_INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    16,
    255,
    1 << 20,
    (1 << 31) - 1,
    -(1 << 31),
    1 << 32,
    1 << 62,
    (1 << 63) - 1,
    -(1 << 63),
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e38, 1e-40, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    "x",
    ".",
    "..",
    "../x",
    "/nowhere/xx",
    "a/b",
    "\0",
    "é" * 200,
    "x" * 4000,
    "[/x]",
    "0",
    "-1",
    "1" * 30,
    "\x1b[2J",
)


def mutate_message(data: bytes, rng: Random, kind: type[Message]) -> bytes:
    """One change; of bytes where ``data`` is no such message."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return mutate_bytes(data, rng)
    if rng.random() < 0.1 or not message.ListFields():
        return mutate_bytes(data, rng)
    _change(message, rng)
    return message.SerializeToString(deterministic=True)


def _change(message: Message, rng: Random) -> None:
    """Goes down a random way, and changes what it ends at."""
    present = message.ListFields()
    while present:
        field, value = rng.choice(present)
        repeated = field.is_repeated
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            _change_scalar(message, field, value, rng)
            return
        if repeated and rng.random() < 0.15:
            _change_list(value, rng)
            return
        message = rng.choice(value) if repeated else value
        present = message.ListFields()


def _change_list(items: Any, rng: Random) -> None:
    index = rng.randrange(len(items))
    match rng.randrange(3):
        case 0:
            del items[index]
        case 1:
            items.add().CopyFrom(items[index])
        case _:
            items[index].CopyFrom(items[rng.randrange(len(items))])


def _change_scalar(message: Message, field: FieldDescriptor, value: Any, rng: Random) -> None:
    if not field.is_repeated:
        setattr(message, field.name, _another(field, value, rng))
        return
    items = list(value)
    index = rng.randrange(len(items))
    items[index] = _another(field, items[index], rng)
    changed = rng.choice([items, items, items, items[:index], items + items])
    message.ClearField(field.name)
    getattr(message, field.name).extend(changed)


def _another(field: FieldDescriptor, value: Any, rng: Random) -> Any:
    """A value that the field's type can hold."""
    if isinstance(value, bool):
        return not value
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice([known.number for known in field.enum_type.values])
    if isinstance(value, float):
        return rng.choice(_FLOATS)
    if isinstance(value, int):
        chosen = rng.choice([*_INTEGERS, value + 1, value - 1, value * 2])
        return _fitting(field, chosen)
    if isinstance(value, str):
        return rng.choice([*_TEXTS, value + "x", value[:-1]])
    return mutate_bytes(value, rng)


def _fitting(field: FieldDescriptor, value: int) -> int:
    bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
    value %= 1 << bits
    signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_INT32)
    return value - (1 << bits) if signed and value >= 1 << (bits - 1) else value
