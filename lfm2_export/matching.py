"""Which stored tensors are the model's: by name, as transformers finds them, and by shape.

In: what the weight files hold and what the family says of its tensors. Out: where each of the model's tensors lies.
What is stored but cannot be part of the computation (a value head that training left, RoPE's buffers) is left out and
said; what could be (a layer too many, a bias that the config does not know) contradicts the config and is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from lfm2_export import paths
from lfm2_export.errors import CheckpointError
from lfm2_export.families.tensors import (
    BACKBONE,
    EMBEDDING,
    HEAD,
    OTHER_BACKBONES,
    PROJECTION,
    FusedTensor,
    ModelTensor,
)
from lfm2_export.messages import MESSAGE_LIMIT, listed
from lfm2_export.safetensors_file import TensorInfo

logger = logging.getLogger(__name__)

# name -> (shape as stored, shape that the config asks for)
WrongShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

_HEAD_PREFIXES = tuple(f"{name.partition('.')[0]}." for name in (HEAD, PROJECTION))
# Characters around the names of a list in a message: "100000 missing: " and " and 99999 more; ".
_COUNTS = 36


def with_prefix(stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The stored tensors under the names of a whole decoder: a backbone that was saved alone has them without
    ``model.``, that of an encoder for masked text with ``lfm2.`` in its place."""
    if any(name.startswith(BACKBONE) for name in stored):
        return dict(stored)
    table = EMBEDDING.removeprefix(BACKBONE)
    prefix = next((one for one in (*OTHER_BACKBONES, "") if f"{one}{table}" in stored), None)
    if prefix is None:
        return dict(stored)

    def whole(name: str) -> str:
        is_backbone = name.startswith(prefix) and not name.startswith(_HEAD_PREFIXES)
        return f"{BACKBONE}{name.removeprefix(prefix)}" if is_backbone else name

    return {whole(name): info for name, info in stored.items()}


def match_tensors(
    path: Path,
    model_tensors: Mapping[str, ModelTensor],
    fused_tensors: Mapping[str, FusedTensor],
    stored: Mapping[str, TensorInfo],
    *,
    knows_all: bool = False,
) -> dict[str, TensorInfo]:
    """The family's tensors found among the stored ones; fused tensors are taken apart by offset. ``knows_all``:
    whatever else is stored contradicts the config.

    Raises:
        CheckpointError: lists every tensor that is missing, left over, or of another shape than the config says.
    """
    found, wrong = _take_fused_apart(fused_tensors, _under_published_names(model_tensors, stored))
    for name, tensor in model_tensors.items():
        if name in found and found[name].shape != tensor.shape:
            wrong[name] = (found[name].shape, tensor.shape)
    missing = [name for name in model_tensors if name not in found]
    left_over = [name for name in found if name not in model_tensors]
    idle = {name for name in left_over if not knows_all and _is_idle(name)}
    _raise_mismatch(path, missing, [name for name in left_over if name not in idle], wrong)
    if idle:
        logger.warning(
            "%s: tensors that generating text does not use are left out (%d): %s",
            paths.shown(path),
            len(idle),
            listed(idle, room=160),
        )
    return {name: _readable(found[name]) for name in model_tensors}


def _under_published_names(
    model_tensors: Mapping[str, ModelTensor], stored: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """A tensor that is stored under another name of it; where both are there, the other one is left over."""
    names = {
        other: name for name, tensor in model_tensors.items() for other in tensor.other_names if name not in stored
    }
    return {names.get(name, name): info for name, info in stored.items()}


def _is_idle(name: str) -> bool:
    """Whether a tensor has no part in the logits: it belongs neither to the backbone nor to the head, or it is RoPE's
    table of frequencies, which follows from the config."""
    return not name.startswith((BACKBONE, *_HEAD_PREFIXES)) or name.endswith("rotary_emb.inv_freq")


def _readable(info: TensorInfo) -> TensorInfo:
    if not info.is_readable:
        raise CheckpointError(
            f"{paths.shown(info.file)}: {listed([info.name])} is stored as {info.dtype}, which is no floating-point "
            "type that weights are read in (BF16, F16, F32, F64); give the checkpoint from before it was quantized"
        )
    return info


def _take_fused_apart(
    fused_tensors: Mapping[str, FusedTensor], stored: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], WrongShapes]:
    """The stored tensors with every fused one replaced by its parts, and the fused ones of a wrong shape."""
    found = dict(stored)
    wrong: WrongShapes = {}
    for name, fused in fused_tensors.items():
        if name not in stored or any(part in stored for part in fused.parts):
            continue  # not stored so, or stored twice: then the fused name stays behind as left over
        info = found.pop(name)
        if info.shape != fused.shape:
            wrong[name] = (info.shape, fused.shape)
        _, rows, columns = fused.shape
        for part, place in fused.parts.items():
            shape = (place.stop - place.start, columns)
            found[part] = info.part(part, shape, (place.expert * rows + place.start) * columns)
    return found, wrong


def _raise_mismatch(path: Path, missing: Collection[str], left_over: Collection[str], wrong: WrongShapes) -> None:
    shapes = [f"{name} is {list(is_)}, config.json asks for {list(asked)}" for name, (is_, asked) in wrong.items()]
    lists: dict[str, Collection[str]] = {"missing": missing, "left over": left_over, "wrong shape": shapes}
    lists = {kind: names for kind, names in lists.items() if names}
    if not lists:
        return
    start = f"{paths.shown(path)}: the weights do not fit config.json; "
    remedy = "; use the config.json of these weights"
    room = (MESSAGE_LIMIT - len(start + remedy)) // len(lists) - _COUNTS
    problems = [f"{len(names)} {kind}: {listed(names, room=room, longest=160)}" for kind, names in lists.items()]
    details = [f"{kind}: {name}" for kind, names in lists.items() for name in names]
    raise CheckpointError(f"{start}{'; '.join(problems)}{remedy}", details=details)
