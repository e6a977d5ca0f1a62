"""Changes an input, at random but the same for the same seed: for the fuzzer, and for the tests.

Every mutator takes the input and a ``Random`` and returns another input. What it understands (JSON, several files,
words of a binary file) it changes as such; what it does not, as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from random import Random

from tests.fuzz import bundle
from tests.fuzz.bundle import SAFE_DEVICES, Part
from tests.fuzz.json_mutation import mutate_json

Mutator = Callable[[bytes, Random], bytes]

# 4 or 8 bytes, little-endian: what counts, sizes and offsets become.
_WORDS = (0, 1, 2, 3, 4, 7, 8, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC, 1 << 20)
_LONG_WORDS = (*_WORDS, 1 << 32, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """A bit, a byte, a piece: changed, left out, doubled, moved."""
    if not data:
        return rng.randbytes(rng.randrange(1, 9))
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([1, 1, 2, 4, 8, 64]))
    changed: Sequence[Callable[[], bytes]] = (
        lambda: data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :],
        lambda: data[:start] + rng.randbytes(stop - start) + data[stop:],
        lambda: data[:start] + data[stop:],
        lambda: data[:stop] + data[start:stop] + data[stop:],
        lambda: data[:start],
        lambda: data[:start] + data[stop:] + data[start:stop],
        lambda: data[:start] + rng.choice([b"\xff", b"\0", b"\xed\xa0\x80", b'"', b"\n"]) + data[start:],
    )
    return rng.choice(changed)()


def mutate_words(data: bytes, rng: Random, aligned: int = 4) -> bytes:
    """An integer of a binary file: an extreme, its neighbour, or another integer of the file."""
    size = rng.choice([4, 4, 8, 2])
    if len(data) < size + aligned or rng.random() < 0.15:
        return mutate_bytes(data, rng)
    at = rng.randrange(0, len(data) - size, aligned)
    value = int.from_bytes(data[at : at + size], "little")
    other = rng.randrange(0, len(data) - size, aligned)
    another = int.from_bytes(data[other : other + size], "little")
    near = value + rng.choice([1, -1, 4, -4, 1 << 16])
    chosen = rng.choice([rng.choice(_LONG_WORDS), near, another]) % (1 << 8 * size)
    return data[:at] + chosen.to_bytes(size, "little") + data[at + size :]


def json_mutator(*words: str) -> Mutator:
    """For one JSON document; ``words`` are what its reader knows."""

    def mutate(data: bytes, rng: Random) -> bytes:
        mutated = mutate_json(data, rng, words) if rng.random() < 0.95 else None
        return mutate_bytes(data, rng) if mutated is None else mutated

    return mutate


def mutate_described(data: bytes, rng: Random, key: str, mutate_json: Mutator) -> bytes:
    """A safetensors file whose metadata hold a JSON text under ``key``: the header as JSON, or that text, with the
    header's length put right."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) or rng.random() < 0.15:
        return mutate_bytes(data, rng)
    header = data[8 : 8 + length]
    changed = _mutate_description(header, rng, key, mutate_json) if rng.random() < 0.5 else mutate_json(header, rng)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def _mutate_description(header: bytes, rng: Random, key: str, mutate_json: Mutator) -> bytes:
    try:
        entries = json.loads(header)
        told = mutate_json(entries["__metadata__"][key].encode(), rng)
        entries["__metadata__"][key] = told.decode("utf-8", "replace")
        return json.dumps(entries).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return mutate_json(header, rng)


def bundle_mutator(by_name: Mapping[str, Mutator], titles: Sequence[str] = ()) -> Mutator:
    """For several files, each by the first pattern that its name matches; ``titles`` are parts to add."""

    def mutate(data: bytes, rng: Random) -> bytes:
        parts = bundle.split(data)
        if not parts or rng.random() < 0.02:
            return mutate_bytes(data, rng)
        index = rng.randrange(len(parts))
        if rng.random() < 0.85:
            parts[index] = Part(parts[index].title, _for(parts[index], by_name)(parts[index].content, rng))
        else:
            _change_parts(parts, index, rng, titles)
        return bundle.join(parts)

    return mutate


def _for(part: Part, by_name: Mapping[str, Mutator]) -> Mutator:
    name = part.name.decode("utf-8", "replace")
    return next((mutator for pattern, mutator in by_name.items() if fnmatch(name, pattern)), mutate_bytes)


def _change_parts(parts: list[Part], index: int, rng: Random, titles: Sequence[str]) -> None:
    """A file left out, put in another's place, or turned into a link, a pipe or a folder."""
    part, other = parts[index], rng.choice(parts)
    targets = [*(device.encode() for device in SAFE_DEVICES), b"../outside", b"../../outside", b".", b"x" * 300]
    made_into = rng.choice([*(b" -> " + target for target in targets), b" (fifo)", b"/x"])
    match rng.randrange(5):
        case 0:
            del parts[index]
        case 1:
            parts[index] = Part(part.title, other.content)
        case 2:
            parts[index] = Part(part.name + made_into, part.content)
        case 3:
            parts.append(Part(rng.choice(titles or ["x"]).encode(), other.content))
        case _:
            parts[index] = Part(part.name + b" -> " + other.name, b"")
