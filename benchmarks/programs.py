"""The files that are compared: a GGUF, ONNX artifacts and a .pte of one shape, made of random weights, or found.

In: a shape and a folder that keeps the files. Out: ``Program``s, each with its size, and the bits that a decode step
reads of it. Our artifacts come from one random checkpoint, by plain rounding: speed does not depend on the algorithm.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import random_gguf
from benchmarks.figures import EXECUTORCH, LLAMA_CPP, ONNX
from benchmarks.processes import BenchmarkError
from benchmarks.synthetic import stored_bytes, write_random_checkpoint
from lfm2_export.artifact import Artifact
from lfm2_export.backends.executorch import plan as executorch_plan
from lfm2_export.backends.onnx import plan as onnx_plan
from lfm2_export.config import ModelConfig
from lfm2_export.families import get_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, ModelTensor, Part, TensorClass
from lfm2_export.quant.schemes import get_scheme
from lfm2_export.resources import check_disk

ONNX_SCHEME, PTE_SCHEME = "q4", "8da4w"
EQUAL_BITS_GROUP = 64  # with zero points and float16 scales it comes to 4.3 bits, Q4_0 to 4.5
_PTE_CONTEXT = 1024  # positions: enough for 512 + 128
_WEIGHT_BITS = 5.2  # the most that any of the files takes, for the disk's estimate
_TOKENIZER = "tiny-dense"  # never used, but an artifact wants one


@dataclass(frozen=True, kw_only=True)
class Program:
    """One contender. ``path``: a .gguf or an artifact's folder; ``files``: what it reads when it loads; ``kernels``:
    which ones an artifact is run on."""

    system: str
    name: str
    path: Path
    files: tuple[Path, ...]
    bits_per_weight: float
    kernels: str = "auto"

    @property
    def label(self) -> str:
        return f"{self.system} {self.name}"

    @property
    def artifact_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def prepare(
    folder: Path, raw_config: Mapping[str, Any], systems: Sequence[str], onnx_groups: Sequence[int]
) -> list[Program]:
    """Makes what is not there.

    Raises:
        ResourceError: the disk is short.
        BenchmarkError: an export failed.
    """
    makers = {
        LLAMA_CPP: lambda: [gguf_program(folder, raw_config)],
        ONNX: lambda: onnx_programs(folder, raw_config, onnx_groups),
        EXECUTORCH: lambda: [pte_program(folder, raw_config)],
    }
    check_disk(folder, disk_needed(folder, raw_config, systems, onnx_groups), purpose="this comparison")
    return [program for system in systems for program in makers[system]()]


def disk_needed(folder: Path, raw_config: Mapping[str, Any], systems: Sequence[str], onnx_groups: Sequence[int]) -> int:
    """Bytes of the files that ``folder`` lacks."""
    paths = {LLAMA_CPP: [_gguf_path(folder)], ONNX: [_onnx_path(folder, group) for group in onnx_groups]}
    paths[EXECUTORCH] = [_pte_path(folder)]
    missing = [path for system in systems for path in paths[system] if not path.exists()]
    checkpoint = stored_bytes(raw_config)
    needed = len(missing) * checkpoint * _WEIGHT_BITS / 16
    is_exported = any(path != _gguf_path(folder) for path in missing)
    return int(needed + (checkpoint if is_exported and not (folder / "checkpoint").exists() else 0))


def round_disk_needed(
    folder: Path, raw_config: Mapping[str, Any], drafter_config: Mapping[str, Any], group_size: int
) -> int:
    """The same of a model and its drafter."""
    drafter = 0 if _drafter_path(folder, _onnx_path(folder, group_size)).exists() else stored_bytes(drafter_config)
    table = 4 * raw_config["vocab_size"] * raw_config["hidden_size"]  # what is borrowed, at most
    return disk_needed(folder, raw_config, [ONNX], [group_size]) + (2 * drafter + table if drafter else 0)


def gguf_program(folder: Path, raw_config: Mapping[str, Any]) -> Program:
    path = _gguf_path(folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        random_gguf.write_random_gguf(path, raw_config, seed=0)
    used = [(tensor.nbytes, tensor.count, tensor.active) for tensor in random_gguf.tensors(raw_config)]
    bits = 8 * sum(n * active for n, _, active in used) / sum(count * active for _, count, active in used)
    return Program(system=LLAMA_CPP, name="Q4_0", path=path, files=(path,), bits_per_weight=bits)


def onnx_programs(folder: Path, raw_config: Mapping[str, Any], groups: Sequence[int]) -> list[Program]:
    """Each group size on our kernels, and the one whose bits equal llama.cpp's on onnxruntime's own as well."""
    found = [onnx_program(folder, raw_config, group) for group in groups]
    stock = [
        replace(program, name=f"{program.name}, stock kernels", kernels="stock")
        for program, group in zip(found, groups, strict=True)
        if group == EQUAL_BITS_GROUP
    ]
    return found + stock


def onnx_program(folder: Path, raw_config: Mapping[str, Any], group_size: int) -> Program:
    path = _onnx_path(folder, group_size)
    if not path.exists():
        _export(folder, raw_config, path, "--backend", "onnx", "--scheme", ONNX_SCHEME, "--group-size", str(group_size))
    config = _parsed(raw_config)
    nbytes = 0.0
    for weight in onnx_plan.make_plan(config, get_scheme(ONNX_SCHEME).with_group_size(group_size)).values():
        if weight.part is not Part.EMBEDDING:  # of a table, a step reads a row; the tied head reads all
            nbytes += weight.nbytes() * (_active(config) if weight.part is Part.EXPERTS else 1)
    bits = 8 * nbytes / active_weights(raw_config)
    return _artifact(ONNX, f"{ONNX_SCHEME} group {group_size}", path, bits)


def drafter_folder(folder: Path, raw_config: Mapping[str, Any], target: Program) -> Path:
    """The artifact of a drafter for one of our programs, of random weights."""
    path = _drafter_path(folder, target.path)
    if not path.exists():
        _export(
            folder, raw_config, path, "--target", str(target.path), "--scheme", ONNX_SCHEME, name="drafter-checkpoint"
        )
    Artifact.open(path)  # hashes its files once, so that no timed load has to
    return path


def pte_program(folder: Path, raw_config: Mapping[str, Any]) -> Program:
    path = _pte_path(folder)
    config = _parsed(raw_config)
    if not path.exists():
        options = ["--backend", "executorch", "--scheme", PTE_SCHEME, "--max-context", str(_PTE_CONTEXT)]
        _export(folder, raw_config, path, *options, *(("--moe-op", "lfm2") if config.moe_layers else ()))
    plan = executorch_plan.make_plan(config, get_scheme(PTE_SCHEME))
    bits = 0.0
    for tensor, count in _used(config):
        form = plan[HEAD if tensor.kind is TensorClass.EMBEDDING else tensor.name].format
        bits += count * form.bits_per_weight(tensor.shape[-1])
    return _artifact(EXECUTORCH, PTE_SCHEME, path, bits / active_weights(raw_config))


def active_weights(raw_config: Mapping[str, Any]) -> float:
    """Weights that one decode step uses: everything, of the experts the chosen ones, of two tables the head."""
    return sum(count for _, count in _used(_parsed(raw_config)))


def _used(config: ModelConfig) -> Iterator[tuple[ModelTensor, float]]:
    for tensor in get_family(config.model_type).tensors(config).values():
        if tensor.name != EMBEDDING or config.tie_word_embeddings:
            yield tensor, math.prod(tensor.shape) * (_active(config) if tensor.kind is TensorClass.EXPERTS else 1)


def _active(config: ModelConfig) -> float:
    return config.num_experts_per_tok / config.num_experts


def _parsed(raw_config: Mapping[str, Any]) -> ModelConfig:
    return get_family(raw_config["model_type"]).parse_config(raw_config)


def _gguf_path(folder: Path) -> Path:
    return folder / "Q4_0.gguf"


def _onnx_path(folder: Path, group_size: int) -> Path:
    return folder / f"onnx-{ONNX_SCHEME}-group{group_size}"


def _drafter_path(folder: Path, target: Path) -> Path:
    return folder / f"drafter-{ONNX_SCHEME}-for-{target.name}"


def _pte_path(folder: Path) -> Path:
    return folder / f"executorch-{PTE_SCHEME}"


def _artifact(system: str, name: str, path: Path, bits_per_weight: float) -> Program:
    artifact = Artifact.open(path)  # hashes its files once, so that no timed load has to
    (program,) = artifact.programs
    files = tuple(path / file for file in program.files)
    return Program(system=system, name=name, path=path, files=files, bits_per_weight=bits_per_weight)


def _export(folder: Path, raw_config: Mapping[str, Any], output: Path, *options: str, name: str = "checkpoint") -> None:
    """In a process of its own: its memory is gone before anything is timed."""
    checkpoint, unfinished = folder / name, folder / f".{name}"
    if not checkpoint.exists():
        tokenizer = _TOKENIZER if name == "checkpoint" else None  # a drafter's is its target's
        write_random_checkpoint(unfinished, raw_config, seed=0, tokenizer_from=tokenizer, shards=4)
        unfinished.rename(checkpoint)
    command = [sys.executable, "-m", "lfm2_export.cli", "export", str(checkpoint), "--algorithm", "round"]
    done = subprocess.run([*command, "--output", str(output), *options], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise BenchmarkError(f"{output.name}: the export failed with status {done.returncode}, see above")
