"""Small artifacts for tests: files of a few bytes behind a real manifest, no runtime needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lfm2_export.artifact import Artifact
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.cache import CacheSpec, StateTensor
from lfm2_export.manifest import CheckpointRecord, Program, StoredTensor, TensorSpec

SUFFIX = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}


def record(name: str = "tiny-moe", weights: str = "a") -> CheckpointRecord:
    """A checkpoint whose only shard has a hash made of one letter."""
    return CheckpointRecord(
        name=name,
        revision=None,
        model_type="lfm2_moe",
        config_sha256="c" * 64,
        shards={"model.safetensors": weights * 64},
    )


def program(backend: str = "onnx", scheme: str = "q4", graph: str | None = None) -> Program:
    """A program without files, as a backend hands it to the writer."""
    state = StateTensor(
        layer=0,
        kind="conv",
        past_name="past_conv.0",
        present_name="present_conv.0",
        shape=("batch_size", 2, 64),
        dtype="float32",
    )
    return Program(
        backend=backend,
        scheme=scheme,
        graphs={"model": graph or graph_name(backend, scheme)},
        files={},
        context_length=512,
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch_size", 1, 131)),),
        cache=CacheSpec(tensors=(state,)),
        options={"group_size": 32, "exclude": [], "accuracy_level": None},
        operators={"QMoE": 4},
        tensors=(
            StoredTensor(name="a.weight", shape=(8, 64), dtype="int4", granularity="group 32", error=0.07),
            StoredTensor(name="a.norm.weight", shape=(64,), dtype="float32", reason="norms are never quantized"),
        ),
        versions={"onnxruntime": "1.31.1"},
    )


def graph_name(backend: str, scheme: str) -> str:
    if backend == "executorch":
        return f"executorch/model_{scheme}.pte"
    return f"onnx/model{SUFFIX.get(scheme, '_' + scheme)}.onnx"


def write_program(writer: ArtifactWriter, backend: str = "onnx", scheme: str = "q4", content: str = "weights") -> None:
    """A graph and a data file, claimed by a program."""
    graph = graph_name(backend, scheme)
    writer.write_text(graph, f"graph {scheme}")
    writer.write_text(f"{graph}_data", f"{content} {scheme}")
    writer.add_program(program(backend, scheme), [graph, f"{graph}_data"])


def write_artifact(
    folder: Path,
    schemes: Mapping[str, str] | None = None,
    *,
    checkpoint: CheckpointRecord | None = None,
    backend: str = "onnx",
) -> Artifact:
    """Exports ``schemes`` (scheme to content) into ``folder`` in one go, with a config and a model card."""
    with ArtifactWriter(folder, checkpoint or record()) as writer:
        for scheme, content in (schemes or {"q4": "weights"}).items():
            write_program(writer, backend, scheme, content)
        writer.write_json("config.json", {"schemes": [p.scheme for p in writer.programs]})
        writer.write_text("README.md", "a model card")
        return writer.commit()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
