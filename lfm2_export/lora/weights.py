"""Which of an adapter's tensors belong to which weight of its base.

In: the adapter's folder, the base's tensors. Out: ``Adapter``, whose ``merged`` gives the base's tensors, those that
the adapter changes among them as merged ones. Only linear layers can be changed: what is for anything else, or fits no
weight of the base, is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm2_export import files, paths
from lfm2_export.errors import CheckpointError
from lfm2_export.families.tensors import BACKBONE, HEAD, ModelTensor, TensorClass
from lfm2_export.lora.merged import merged
from lfm2_export.lora.settings import CONFIG, LoraSettings, read_settings
from lfm2_export.messages import listed, named
from lfm2_export.safetensors_file import Shard, TensorInfo, read_shard

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_LIMIT = 64 << 30  # of its weights
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_LINEAR = (TensorClass.LINEAR, TensorClass.EXPERTS, TensorClass.HEAD, TensorClass.ROUTER)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A, [r, columns], and B, [rows, r], of one module."""

    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """An opened adapter. ``factors`` by module ("model.layers.0.self_attn.q_proj")."""

    folder: Path
    settings: LoraSettings
    shard: Shard
    factors: Mapping[str, Factors]

    def merged(
        self, tensors: Mapping[str, TensorInfo], model_tensors: Mapping[str, ModelTensor]
    ) -> dict[str, TensorInfo]:
        """The base's tensors with the adapter in them.

        Raises:
            CheckpointError: a factor is for no linear layer of the base, or of another shape.
        """
        names = {name: tensor.name for tensor in model_tensors.values() for name in (tensor.name, *tensor.other_names)}
        out = dict(tensors)
        for module, factors in self.factors.items():
            name = names.get(f"{module}.weight") or names.get(f"{BACKBONE}{module}.weight")
            if name is None or model_tensors[name].kind not in _LINEAR:
                raise self._of_no_layer(module)
            self._check_shapes(module, factors, tensors[name])
            out[name] = merged(tensors[name], factors.a, factors.b, self.settings.scale_of(module))
        return out

    @property
    def settings_sha256(self) -> str:
        """Of all in the settings that the merged weights follow from."""
        scales = {module: (self.settings.rank_of(module), self.settings.scale_of(module)) for module in self.factors}
        return hashlib.sha256(json.dumps(scales, sort_keys=True).encode()).hexdigest()

    def _of_no_layer(self, module: str) -> CheckpointError:
        why = "is no linear layer of this model; give the base that it was trained on"
        if f"{module}.weight" == HEAD:
            why = "is tied to the token table here; merge the adapter with peft first"
        return CheckpointError(f"{paths.shown(self.folder)}: changes {named(module)}, which {why}")

    def _check_shapes(self, module: str, factors: Factors, base: TensorInfo) -> None:
        rank = self.settings.rank_of(module)
        expected = ((rank, base.shape[1]), (base.shape[0], rank))
        if (factors.a.shape, factors.b.shape) != expected:
            raise CheckpointError(
                f"{paths.shown(self.folder)}: lora_A and lora_B of {named(module)} are {list(factors.a.shape)} and "
                f"{list(factors.b.shape)}, rank {rank} and the base ask for {list(expected[0])} and "
                f"{list(expected[1])}; give the base that it was trained on"
            )


def open_adapter(folder: Path) -> Adapter:
    """Reads the settings and the header of the weights.

    Raises:
        CheckpointError: the folder holds no LoRA adapter, or one that asks for what is not followed here.
    """
    if not paths.is_folder(folder, CheckpointError):
        what = "is a file" if paths.exists(folder, CheckpointError) else "no such directory"
        raise CheckpointError(f"{paths.shown(folder)}: {what}; give the folder that peft saved an adapter in")
    settings = read_settings(folder)
    path = folder / WEIGHTS
    if not paths.is_file(path, CheckpointError):
        pickled = paths.exists(folder / _PICKLED, CheckpointError)
        why = f"only pickled weights ({_PICKLED}), which can run code and stay closed" if pickled else f"no {WEIGHTS}"
        raise CheckpointError(f"{paths.shown(folder)}: holds {why}; save the adapter with safetensors")
    files.check(path, folder, CheckpointError, limit=_LIMIT)
    shard = read_shard(path)
    return Adapter(folder=folder, settings=settings, shard=shard, factors=_factors(path, shard))


def _factors(path: Path, shard: Shard) -> dict[str, Factors]:
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in shard.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or len(info.shape) != 2 or not info.is_readable:
            raise CheckpointError(
                f"{paths.shown(path)}: {listed([name])} ({info.dtype}, {list(info.shape)}) is no lora_A or lora_B of a "
                "linear layer; merge the adapter with peft (merge_and_unload), then export that"
            )
        found.setdefault(match["module"], {})[match["factor"]] = info
    alone = [module for module, factors in found.items() if len(factors) != 2]
    if alone or not found:
        what = f"has one of lora_A and lora_B alone for {listed(alone)}" if alone else "holds no weights"
        raise CheckpointError(f"{paths.shown(path)}: {what}; save the adapter again ({CONFIG} beside it)")
    return {module: Factors(a=factors["A"], b=factors["B"]) for module, factors in found.items()}
