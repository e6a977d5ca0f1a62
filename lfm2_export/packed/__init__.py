"""Checkpoints that other tools quantized and saved as safetensors, their codes packed into int32 words.

In: config.json's ``quantization_config`` and what the weight files hold. Out: the checkpoint's tensors, those that are
packed as ``PackedTensor``s under the names that their weights had, and ``PackedWeights``, which reads them. A way of
packing is an object (here: one module of this package) with what ``Method`` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lfm2_export.errors import ConfigError
from lfm2_export.messages import shown
from lfm2_export.packed.tensors import PackedTensor, PackedWeights
from lfm2_export.registry import Registry
from lfm2_export.safetensors_file import Shard, TensorInfo

__all__ = ["KEY", "PackedTensor", "PackedWeights", "Quantization", "read_quantization"]

KEY = "quantization_config"


class Method(Protocol):
    """One way of packing, by its ``quant_method``."""

    def check(self, section: Mapping[str, Any]) -> str | None:
        """Why a checkpoint with this ``quantization_config`` cannot be taken over; None where it can."""

    def packed_tensors(
        self, section: Mapping[str, Any], stored: Mapping[str, TensorInfo], weights: PackedWeights
    ) -> tuple[dict[str, PackedTensor], set[str]]:
        """The packed weights by their names, and the names of all that they are made of.

        Raises:
            CheckpointError: a part is missing, or of a wrong shape or dtype.
        """


METHODS: Registry[Method] = Registry(
    {
        "compressed-tensors": "lfm2_export.packed.compressed_tensors",
        "gptq": "lfm2_export.packed.gptq",
    }
)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a checkpoint's weights are packed."""

    method: Method
    section: Mapping[str, Any]

    def open(self, shards: Mapping[Path, Shard]) -> tuple[dict[str, TensorInfo], PackedWeights]:
        """What the files hold, each packed weight as one tensor, and what reads those.

        Raises:
            CheckpointError: a part of a packed weight is missing, or of a wrong shape or dtype.
        """
        stored = {name: info for shard in shards.values() for name, info in shard.tensors.items()}
        weights = PackedWeights(shards)
        found, parts = self.method.packed_tensors(self.section, stored, weights)
        plain = {name: info for name, info in stored.items() if name not in parts}
        return {**plain, **found}, weights


def read_quantization(raw_config: Mapping[str, Any], place: str) -> Quantization | None:
    """What config.json says of packed weights; None where it says nothing. ``place`` names the file in errors.

    Raises:
        ConfigError: they are packed otherwise than can be taken over; the message says how.
    """
    section = raw_config.get(KEY)
    if section is None:
        return None
    name = section.get("quant_method") if isinstance(section, dict) else None
    if isinstance(name, str) and name in METHODS:
        method = METHODS[name]
        if (reason := method.check(section)) is None:
            return Quantization(method=method, section=section)
    else:
        reason = f"quant_method={shown(name)} is none of those that can be taken over ({', '.join(METHODS)})"
    raise ConfigError(
        f"{place}: {KEY} says that the weights are quantized already; export the checkpoint that they were made of: "
        f"{reason}"
    )
