"""What is compared: programs of artifacts in their runtimes, and GGUF files in llama.cpp or, where that is not
installed, their weights in the eager model.

In: folders and files. Out: ``Subject``s, opened one at a time: a name, what scores windows, its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lfm2_export import paths, source
from lfm2_export.artifact import Artifact
from lfm2_export.backends import get_backend
from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.eager import EagerRunner
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import ArtifactError, CheckpointError
from lfm2_export.families.tensors import EMBEDDING, TensorClass
from lfm2_export.gguf import names_tokenizer
from lfm2_export.hub_artifacts import name_of, open_programs
from lfm2_export.manifest import Program
from lfm2_export.models.loading import WeightSource, load_model
from lfm2_export.parity.hops import check_origin
from lfm2_export.parity.lowering import score
from lfm2_export.parity.sample import Window
from lfm2_export.quality.llama import LlamaModel
from lfm2_export.quality.llama import is_installed as llama_is_installed
from lfm2_export.quality.report import Size
from lfm2_export.source import SUFFIX

# Logits of every position of a window, float32 [T, V].
Scorer = Callable[[Window], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``weights``: what it computes with, dequantized. ``errors`` of stored tensors by name, relative to the
    checkpoint's."""

    name: str
    kind: str
    size: Size
    context_length: int
    open: Callable[[], Scorer]
    weights: Callable[[], WeightSource]
    errors: Mapping[str, float] = field(default_factory=dict)


def find_subjects(
    model: str | Path,
    checkpoint: Checkpoint,
    threads: int | None,
    *,
    config_from: str | Path | None = None,
    offline: bool = False,
) -> list[Subject]:
    """Every program of an artifact, or the one model of a GGUF file, with the config of ``config_from``; of the Hub's
    they are fetched, unless ``offline``.

    Raises:
        ArtifactError: it is neither, or a program was made of another checkpoint.
        CheckpointError: a GGUF file is damaged, of another shape than the checkpoint, or one that llama.cpp, where
            that is installed, cannot open.
    """
    if str(model).lower().endswith(SUFFIX):
        place = source.resolve(str(model), offline=offline).path
        return [_of_gguf(place, checkpoint, config_from, threads)]
    artifact = open_programs(model, offline=offline)
    check_origin(artifact, checkpoint)
    programs = [artifact.present(program) for program in artifact.select() if artifact.is_here(program)]
    if not programs:
        raise ArtifactError(f"{paths.shown(model)}: none of its programs is here; export or download one")
    artifact.verify(*programs)
    name = name_of(model, artifact.path)
    return [_of_program(name, artifact, program, checkpoint, threads) for program in programs]


def _of_program(
    name: str, artifact: Artifact, program: Program, checkpoint: Checkpoint, threads: int | None
) -> Subject:
    backend = get_backend(program.backend)

    return Subject(
        name=f"{name} {program.scheme}",
        kind=program.backend,
        size=_program_size(program, checkpoint),
        context_length=program.context_length,
        open=lambda: partial(score, backend.load_runner(artifact.path, program, RunnerOptions(threads=threads))),
        weights=lambda: backend.stored_weights(artifact.path, program, checkpoint.config),
        errors={tensor.name: tensor.error for tensor in program.tensors if tensor.error},
    )


def _program_size(program: Program, checkpoint: Checkpoint) -> Size:
    """By the manifest's bits a weight; of artifacts that were made before it had them, by the files."""
    counts = stored_size(checkpoint)
    bits = program.options.get("bits_per_weight", {})
    whole = sum(entry.bytes for name, entry in program.files.items() if not name.endswith(".onnx"))
    file_bytes = int(bits["file"] * counts.file_weights / 8) if "file" in bits else whole
    step_bytes = int(bits["step"] * counts.step_weights / 8) if "step" in bits else 0
    return Size(
        file_bytes=file_bytes,
        file_weights=counts.file_weights,
        step_bytes=step_bytes or file_bytes * counts.step_weights // counts.file_weights,
        step_weights=counts.step_weights,
    )


def _of_gguf(path: Path, checkpoint: Checkpoint, config_from: str | Path | None, threads: int | None) -> Subject:
    opened = open_checkpoint(path, config_from=config_from)
    shapes = {name: tensor.shape for name, tensor in opened.model_tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in checkpoint.model_tensors.items()}:
        raise CheckpointError(
            f"{paths.shown(path)}: is of another shape than {checkpoint.name}; give the checkpoint that it was made of"
        )

    if llama_is_installed() and not names_tokenizer(path):
        raise CheckpointError(
            f"{paths.shown(path)}: has no tokenizer.ggml.model, without which llama.cpp opens no file; convert the "
            "model again with its tokenizer, or pip uninstall llama-cpp-python to compare the weights alone"
        )

    def in_llama() -> Scorer:
        return LlamaModel(path, vocab_size=opened.config.vocab_size, threads=threads).logits

    return Subject(
        name=path.stem,
        kind="gguf, llama.cpp" if llama_is_installed() else "gguf, weights alone",
        size=stored_size(opened),
        context_length=opened.config.max_position_embeddings,
        open=in_llama if llama_is_installed() else lambda: partial(score, EagerRunner(load_model(opened))),
        weights=lambda: opened,
    )


def stored_size(checkpoint: Checkpoint) -> Size:
    """Of a checkpoint as it is stored. A step reads the experts that a token is sent to, and a token table as a whole
    where it is the head as well, else one row of it."""
    config = checkpoint.config
    sizes = [0, 0, 0, 0]
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.model_tensors[name]
        share = 1.0
        if tensor.kind is TensorClass.EXPERTS:
            share = config.num_experts_per_tok / config.num_experts
        elif name == EMBEDDING and not config.tie_word_embeddings:
            share = 1 / config.vocab_size
        for index, count in enumerate((info.nbytes, info.count)):
            sizes[index] += count
            sizes[2 + index] += int(count * share)
    return Size(file_bytes=sizes[0], file_weights=sizes[1], step_bytes=sizes[2], step_weights=sizes[3])
