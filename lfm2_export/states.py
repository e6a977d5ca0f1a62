"""A conversation with its state as one file, from which it goes on without a prefill.

In: a path, which may lead to a stranger's file, and the runner and tokenizer that it must belong to. Out: ``State``:
messages, their text and tokens, and the runner's snapshot after them. A state fits the program that made it and no
other; the file says which one that is, by the hash of the program's files.

The file is a safetensors file: "tokens" I32 [N], and the state's tensors by their names, for one row of N tokens. Its
metadata hold one JSON text (``_describe``). Every size is compared with what this program's state has before memory is
taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lfm2_export import json_values, own_files, paths
from lfm2_export.backends.base import Runner, Snapshot, check_fits
from lfm2_export.chat_template import Message
from lfm2_export.errors import CheckpointError, GenerationError
from lfm2_export.messages import named, one_line, shown
from lfm2_export.safetensors_file import MAX_HEADER_BYTES, Shard, read_into, read_shard
from lfm2_export.text import Tokenizer

VERSION = 1
METADATA = "lfm2_export.state"
TOKENS = "tokens"
_DTYPES = {"float32": "F32", "float16": "F16", "uint8": "U8", "int32": "I32"}
_REMEDY = "save the state again"


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """``tokens`` are what the snapshot's only row holds, ``text`` is what they say, as the chat template wrote it."""

    messages: list[Message]
    text: str
    tokens: list[int]
    snapshot: Snapshot


def write_state(path: str | Path, state: State, tokenizer: Tokenizer) -> None:
    """Puts a state into a file, whole or not at all; only this user may read it.

    Raises:
        GenerationError: the file cannot be written, or holds something else than a state already.
        ResourceError: the disk is full.
    """
    path = Path(path)
    check_target(path)
    tensors = {TOKENS: np.asarray(state.tokens, np.int32), **state.snapshot.tensors}
    header = _header(tensors, {**_describe(state, tokenizer), "content": _content(tensors)})
    if len(header) > MAX_HEADER_BYTES:
        raise GenerationError(
            f"{paths.shown(path)}: the messages of this conversation are too long to be saved with it"
        )
    own_files.write(path, _bytes(header, tensors), GenerationError)


def check_target(path: str | Path) -> None:
    """Whether a state can be put there.

    Raises:
        GenerationError: the folder is missing, or the file there is no state, which would be lost.
    """
    path = Path(path)
    own_files.check_place(path, GenerationError)
    if paths.exists(path, GenerationError):
        try:
            _described(path, _read_shard(path))
        except GenerationError as error:
            raise GenerationError(
                f"{paths.shown(path)}: is there already and no saved state; give another file"
            ) from error


def _describe(state: State, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "version": VERSION,
        "program": state.snapshot.program_id,
        "vocabulary": _vocabulary(state.tokens, tokenizer),
        "messages": state.messages,
        "text": state.text,
    }


def _vocabulary(tokens: list[int], tokenizer: Tokenizer) -> str:
    """What the tokens are to this tokenizer: its files are their owner's to change, and a program's hash leaves them
    out."""
    return hashlib.sha256(tokenizer.decode(tokens).encode("utf-8", "backslashreplace")).hexdigest()


def _content(tensors: Mapping[str, np.ndarray]) -> str:
    """The hash of all values: of a state that is slightly damaged nobody would notice that it answers otherwise."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()


def _header(tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(description)}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries).encode()
    return text.ljust(-(-len(text) // 8) * 8)


def _bytes(header: bytes, tensors: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        yield np.ascontiguousarray(tensor).astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()


def read_state(path: str | Path, runner: Runner, tokenizer: Tokenizer) -> State:
    """The state in a file, for ``runner.restore``.

    Raises:
        GenerationError: there is no file, it is damaged or no state, or of another program or tokenizer.
        ContextLimitError: the runner's context is shorter.
    """
    path = Path(path)
    shard = _read_shard(path)
    told = _described(path, shard)
    if told["program"] != runner.program_id:
        raise GenerationError(
            f"{paths.shown(path)}: is a state of {named(told['program'])}, but this program is {runner.program_id}; "
            "a state only fits the program that made it"
        )
    tokens = _read_tokens(path, shard, runner)
    if told["vocabulary"] != _vocabulary(tokens, tokenizer):
        raise GenerationError(f"{paths.shown(path)}: was made with another tokenizer.json; {_REMEDY}")
    wanted = {t.past_name: (t.dtype, t.concrete_shape(1, len(tokens))) for t in runner.cache.tensors}
    if odd := (shard.tensors.keys() ^ {TOKENS, *wanted}):
        raise _damaged(path, f"{named(min(odd))} is {'unknown' if min(odd) in shard.tensors else 'missing'}")
    for name, (dtype, shape) in wanted.items():
        _check(path, shard, name, dtype, shape)
    tensors = {name: _read(path, shard, name, dtype, shape) for name, (dtype, shape) in wanted.items()}
    if told["content"] != _content({TOKENS: np.array(tokens, np.int32), **tensors}):
        raise _damaged(path, "its values are not those that were saved")
    snapshot = Snapshot(program_id=told["program"], lengths=np.array([len(tokens)], np.int64), tensors=tensors)
    return State(messages=told["messages"], text=told["text"], tokens=tokens, snapshot=snapshot)


def _read_shard(path: Path) -> Shard:
    if not paths.exists(path, GenerationError):
        raise GenerationError(f"{paths.shown(path)}: no such file; make it with --save-state {paths.shown(path, 60)}")
    try:
        return read_shard(paths.real(path, GenerationError))
    except CheckpointError as error:
        raise _damaged(path, error) from error


def _described(path: Path, shard: Shard) -> dict[str, Any]:
    """What the file says of itself, its types checked."""
    text = shard.metadata.get(METADATA) if isinstance(shard.metadata, dict) else None
    if not isinstance(text, str):
        raise GenerationError(f"{paths.shown(path)}: is no saved state; give the file that --save-state wrote")
    try:
        told = json_values.parse(text)
    except json_values.JsonError as error:
        raise _damaged(path, error) from error
    if not isinstance(told, dict) or told.get("version") != VERSION:
        version = told.get("version") if isinstance(told, dict) else told
        raise _damaged(path, f"it is of version {shown(version, 40)}, and {VERSION} is read")
    for name in ("program", "vocabulary", "content", "text"):
        if not isinstance(told.get(name), str):
            raise _damaged(path, f"{name} is {shown(told.get(name), 40)}, no text")
    messages = told.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise _damaged(path, "its messages are none")
    return told


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _read_tokens(path: Path, shard: Shard, runner: Runner) -> list[int]:
    info = shard.tensors.get(TOKENS)
    if info is None or info.dtype != "I32" or len(info.shape) != 1 or not info.count:
        raise _damaged(path, "it has no list of tokens")
    check_fits(np.zeros(1, dtype=np.int64), [info.count], runner.context_length)
    tokens = _read(path, shard, TOKENS, "int32", info.shape)
    if tokens.min() < 0 or tokens.max() >= runner.vocab_size:
        raise _damaged(path, f"it has tokens that are not among the {runner.vocab_size} of the vocabulary")
    return [int(token) for token in tokens]


def _check(path: Path, shard: Shard, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    info = shard.tensors[name]
    if info.dtype != _DTYPES[dtype] or info.shape != shape:
        raise _damaged(
            path,
            f"{named(name)} is {info.dtype} {shown(list(info.shape), 40)}, and {_DTYPES[dtype]} {list(shape)} is "
            "expected here; --kv-cache has to be the same",
        )


def _read(path: Path, shard: Shard, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, np.dtype(dtype).newbyteorder("<"))
    try:
        read_into(shard, shard.tensors[name], out)
    except CheckpointError as error:
        raise _damaged(path, error) from error
    return out.astype(dtype, copy=False)


def _damaged(path: Path, fault: object) -> GenerationError:
    reason = str(fault).removeprefix(f"{paths.shown(path)}: ").removesuffix("; download it again")
    return GenerationError(f"{paths.shown(path)}: cannot be used as a state ({one_line(reason, 160)}); {_REMEDY}")
