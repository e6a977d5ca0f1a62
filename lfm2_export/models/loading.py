"""Fills an eager model with a checkpoint's weights, one tensor at a time.

In: a weight source, such as a ``Checkpoint`` (or anything else that can say the same things about other weights, for
instance the ones that an artifact holds). Out: the family's eager model. The model is built on the meta device, so
nothing is initialized for nothing, and every weight is converted straight into the memory where it stays: besides the
model there is never more than a few megabytes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lfm2_export.checkpoint import check_finite, open_checkpoint
from lfm2_export.config import ModelConfig
from lfm2_export.errors import CheckpointError
from lfm2_export.families import Family
from lfm2_export.families.tensors import FusedPart
from lfm2_export.messages import listed, named, natural
from lfm2_export.models import get_draft_net, get_encoder, get_net

if TYPE_CHECKING:
    from lfm2_export.models.decoder import DecoderForCausalLM
    from lfm2_export.models.lfm2_bidirectional import Lfm2BidirectionalModel
    from lfm2_export.models.lfm2_dspark import Lfm2DSparkDraftModel

    AnyNet: TypeAlias = DecoderForCausalLM | Lfm2BidirectionalModel

Net = TypeVar("Net", "DecoderForCausalLM", "Lfm2BidirectionalModel", "Lfm2DSparkDraftModel")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows are read in pieces of about this many values, so that the fp32 values in between stay small.
PIECE = 1 << 22


class WeightSource(Protocol):
    """What ``load_model`` asks of a checkpoint."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def family(self) -> Family: ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By published name; only the names and ``shape`` are read."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its first axis, as float32."""


# Where a published tensor goes: the model's tensor of this name, all of it or the part of a fused one.
Place = tuple[str, FusedPart | None]


def load_model(source: WeightSource, *, dtype: torch.dtype = torch.float32) -> DecoderForCausalLM:
    """A decoder's eager model with the source's weights as ``dtype`` (expert biases stay fp32), in evaluation mode.

    Raises:
        CheckpointError: weights are missing, left over, of another shape, not finite, or too large for ``dtype``.
        ValueError: a ``dtype`` that the model cannot have.
    """
    _check_dtype(dtype)
    return _filled(source, _meta_model(source), dtype)


def load_encoder_model(source: WeightSource, *, dtype: torch.dtype = torch.float32) -> Lfm2BidirectionalModel:
    """The same of an encoder."""
    _check_dtype(dtype)
    with _on_meta():
        model = get_encoder(source.config.model_type)(source.config)
    return _filled(source, model, dtype)


def load_draft_model(source: WeightSource) -> Lfm2DSparkDraftModel:
    """The same of a drafter, fp32, with its target's table and head."""
    with _on_meta():
        model = get_draft_net(source.config.model_type)(source.config)
    return _filled(source, model, torch.float32)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; expected one of {', '.join(map(str, DTYPES))}")


def _filled(source: WeightSource, model: Net, dtype: torch.dtype) -> Net:
    """A model on the meta device with its weights."""
    for name, parts in _parts(source, model).items():
        _set_tensor(model, name, _read_tensor(source, parts, _tensor(model, name), dtype))
    model.tie_weights()
    return model.eval()


class PartlyLoaded:
    """An eager model, fp32, whose weights are read for a module at a time: the others' are on the meta device.

    Raises:
        CheckpointError: weights are missing or left over.
    """

    def __init__(self, source: WeightSource):
        self._source = source
        self.model = _meta_model(source).eval()
        self._parts = _parts(source, self.model)

    @contextmanager
    def loaded(self, prefix: str) -> Iterator[nn.Module]:
        """The module of that name with its weights, which are let go at the end.

        Raises:
            CheckpointError: a weight has another shape or is not finite.
        """
        names = [name for name in self._parts if name.startswith(f"{prefix}.")]
        for name in names:
            read = _read_tensor(self._source, self._parts[name], _tensor(self.model, name), torch.float32)
            _set_tensor(self.model, name, read)
        try:
            yield self.model.get_submodule(prefix)
        finally:
            for name in names:
                _set_tensor(self.model, name, _tensor(self.model, name).to("meta"))


def _meta_model(source: WeightSource) -> DecoderForCausalLM:
    with _on_meta():
        return get_net(source.config.model_type)(source.config)


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), _WithoutInit():
        yield


def load_pretrained(
    kind: type[AnyNet],
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None,
    offline: bool,
) -> AnyNet:
    """The model of a checkpoint, which must be a ``kind`` (``DecoderForCausalLM.from_pretrained``)."""
    checkpoint = open_checkpoint(name_or_path, revision=revision, offline=offline)
    is_encoder = checkpoint.config.encoder is not None
    net: type[AnyNet] = (get_encoder if is_encoder else get_net)(checkpoint.config.model_type)
    if not issubclass(net, kind):
        raise CheckpointError(
            f"{name_or_path}: model_type={checkpoint.config.model_type} is loaded by {net.__name__}, "
            f"not by {kind.__name__}"
        )
    return load_encoder_model(checkpoint, dtype=dtype) if is_encoder else load_model(checkpoint, dtype=dtype)


class _WithoutInit(TorchFunctionMode):
    """Makes torch.nn.init's functions do nothing: on the meta device they cost two seconds of imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _parts(source: WeightSource, model: nn.Module) -> dict[str, dict[str, FusedPart | None]]:
    """The published tensors that fill each tensor of the model, in the model's order."""
    places: dict[str, Place] = {name: (name, None) for name in source.tensors}
    for fused_name, fused in source.family.fused_tensors(source.config).items():
        places |= {name: (fused_name, part) for name, part in fused.parts.items()}
    # A tied parameter comes once, under its first name.
    parts: dict[str, dict[str, FusedPart | None]] = {
        name: {} for name, _ in [*model.named_parameters(), *model.named_buffers()]
    }
    covered = {name for name, _ in places.values()}
    missing = (parts.keys() - covered) | (places.keys() - source.tensors.keys())
    _check_names(source, missing=missing, extra=covered - parts.keys())
    for published, (name, part) in places.items():
        parts[name][published] = part
    return parts


def _check_names(source: WeightSource, *, missing: set[str], extra: set[str]) -> None:
    if missing or extra:
        raise CheckpointError(
            f"the weights do not fit the {source.config.model_type} model; "
            f"missing: {listed(missing, room=120) or 'none'}; left over: {listed(extra, room=120) or 'none'}",
            details=[
                *(f"missing: {name}" for name in sorted(missing, key=natural)),
                *(f"left over: {name}" for name in sorted(extra, key=natural)),
            ],
        )


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(module), attribute)
    assert isinstance(tensor, Tensor)
    return tensor


def _read_tensor(
    source: WeightSource, parts: Mapping[str, FusedPart | None], empty: Tensor, dtype: torch.dtype
) -> Tensor:
    # The only buffers are biases that rank experts by small differences: they stay fp32, as in transformers.
    tensor = torch.empty(empty.shape, dtype=dtype if isinstance(empty, nn.Parameter) else torch.float32)
    for name, part in parts.items():
        _fill(source, name, tensor if part is None else tensor[part.expert, part.start : part.stop])
    return tensor


def _fill(source: WeightSource, name: str, target: Tensor) -> None:
    """Reads a published tensor into ``target``, some rows at a time."""
    shape = tuple(source.tensors[name].shape)
    if shape != tuple(target.shape):
        raise CheckpointError(f"{named(name)}: has the shape {list(shape)}; the model asks for {list(target.shape)}")
    step = max(1, PIECE * shape[0] // target.numel())
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        values = source.read(name, rows)
        check_finite(name if step >= shape[0] else f"{name}[{rows.start}:{rows.stop}]", values)
        if target.dtype == torch.float16:
            _check_float16(name, values)
        target[rows].copy_(torch.from_numpy(values))


def _check_float16(name: str, values: np.ndarray) -> None:
    largest = float(np.abs(values).max())
    if largest > torch.finfo(torch.float16).max:
        raise CheckpointError(f"{name}: values up to {largest:g} do not fit float16; load as bfloat16 or float32")


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    is_parameter = isinstance(getattr(module, attribute), nn.Parameter)
    # Registering anew is what replaces a tensor on the meta device; copying into it does nothing.
    delattr(module, attribute)
    if is_parameter:
        module.register_parameter(attribute, nn.Parameter(tensor))
    else:
        module.register_buffer(attribute, tensor)
