"""What an adapter's adapter_config.json says: rank and scale of each weight.

In: the folder. Out: ``LoraSettings``. The fields are those of peft 0.21's LoraConfig; one that would change what the
merged weights are, and that is not followed here, is refused by name, and so is one that is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lfm2_export import files, paths
from lfm2_export.errors import CheckpointError
from lfm2_export.messages import named, shown

T = TypeVar("T")

CONFIG = "adapter_config.json"
_LIMIT = 1 << 20
_MOST_PATTERNS, _HIGHEST_RANK = 10_000, 1 << 16
_FOLLOWED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "init_lora_weights"}
# Of training and loading; merged weights do not depend on them. Which modules have weights is said by their file.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Others change the base's weights when training begins.
_HARMLESS_STARTS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")
_PLAIN = re.compile(r"[\w.]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """``rank`` and ``alpha`` of every module that no pattern names; ``base`` is what it was trained on, as stated."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    base: str

    def rank_of(self, module: str) -> int:
        return _of(module, self.rank_pattern, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied with: alpha / r, or alpha / sqrt(r) (https://arxiv.org/abs/2312.03732)."""
        rank, alpha = self.rank_of(module), _of(module, self.alpha_pattern, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_settings(folder: Path) -> LoraSettings:
    """Raises: CheckpointError, where the file is missing or damaged, or asks for what is not followed here."""
    path = folder / CONFIG
    if not paths.is_file(path, CheckpointError):
        raise CheckpointError(f"{paths.shown(folder)}: is no LoRA adapter (it has no {CONFIG}); give peft's own folder")
    raw = files.read_json_object(path, folder, CheckpointError, limit=_LIMIT)
    place = paths.shown(path)
    _refuse_others(place, raw)
    return LoraSettings(
        rank=_rank(place, "r", raw.get("r", 8)),
        alpha=_number(place, "lora_alpha", raw.get("lora_alpha", 8)),
        rank_pattern=_patterns(place, raw, "rank_pattern", _rank),
        alpha_pattern=_patterns(place, raw, "alpha_pattern", _number),
        rslora=raw.get("use_rslora") is True,
        base=str(raw.get("base_model_name_or_path") or ""),
    )


def _refuse_others(place: str, raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{place}: peft_type={shown(raw.get('peft_type'))} is no LoRA; merge it with peft first")
    for name, value in raw.items():
        is_off = value is None or value is False or value in ("none", [], {})
        if name in _FOLLOWED | _WITHOUT_EFFECT or is_off:
            continue
        raise CheckpointError(
            f"{place}: {named(name)}={shown(value)} is not followed here; merge the adapter with peft "
            "(merge_and_unload), then export that"
        )
    if raw.get("init_lora_weights") not in _HARMLESS_STARTS:
        raise CheckpointError(
            f"{place}: init_lora_weights={shown(raw['init_lora_weights'])} changes the base's weights; merge the "
            "adapter with peft (merge_and_unload), then export that"
        )
    if type(raw.get("use_rslora", False)) not in (bool, type(None)):
        raise CheckpointError(f"{place}: use_rslora={shown(raw['use_rslora'])} is neither true nor false; correct it")


def _patterns(place: str, raw: Mapping[str, Any], name: str, read: Callable[[str, str, object], T]) -> dict[str, T]:
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise CheckpointError(f"{place}: {name}={shown(patterns)}: an object with modules' names expected")
    for key in patterns:
        # peft takes them for regular expressions; those of a stranger may take for ever.
        if not _PLAIN.fullmatch(key):
            raise CheckpointError(
                f"{place}: {name} has {shown(key)}, which is more than a module's name; merge the adapter with peft"
            )
    return {key: read(place, name, value) for key, value in patterns.items()}


def _rank(place: str, name: str, value: object) -> int:
    if type(value) is not int or not 0 < value <= _HIGHEST_RANK:
        raise CheckpointError(f"{place}: {name}={shown(value)}: a rank from 1 to {_HIGHEST_RANK} expected")
    return value


def _number(place: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise CheckpointError(f"{place}: {name}={shown(value)}: a number expected")
    return float(value)


def _of(module: str, patterns: Mapping[str, T], default: T) -> T:
    """The first pattern that is the module's name or the end of it, as in peft."""
    return next((v for key, v in patterns.items() if module == key or module.endswith(f".{key}")), default)
