"""ONNX folders of others, in the layout that Liquid and onnx-community publish: opened without a manifest of ours.

In: a folder with ``config.json`` and ``onnx/model*.onnx``. Out: a ``ForeignArtifact``, which opens like one of ours.
There are no hashes to check: config.json is read as a stranger's, files are regular ones of the folder, and the graph's
inputs, outputs and sizes are compared with the config when a program is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lfm2_export import files, paths
from lfm2_export.artifact import Artifact
from lfm2_export.backends import BACKENDS
from lfm2_export.backends.base import Runner, RunnerOptions
from lfm2_export.cache import CacheSpec
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ArtifactError
from lfm2_export.families import find_family
from lfm2_export.manifest import MANIFEST, MODEL, CheckpointRecord, FileEntry, Manifest, Program

BACKEND, FOLDER, CONFIG = "onnx", "onnx", "config.json"
SHARED = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_NO_HASH = "0" * 64


@dataclass(frozen=True, kw_only=True)
class ForeignArtifact(Artifact):
    """``config``: what config.json says that the graphs are."""

    config: ModelConfig

    def verify(self, *programs: Program, hashes: bool = True) -> None:
        """That the files of ``programs`` are regular ones of the folder; nobody has written down what they hold."""
        for program in programs or self.manifest.programs:
            for name in program.files:
                with files.open_regular(self.path / name, self.path, ArtifactError):
                    pass

    def load_runner(self, program: Program, options: RunnerOptions) -> Runner:
        from lfm2_export.backends.onnx.foreign_runner import ForeignRunner

        return ForeignRunner.from_program(self.path, program, self.config, options)


def foreign_schemes() -> list[str]:
    """Those whose files have names in this layout."""
    return list(BACKENDS[BACKEND].SCHEMES)


def file_names(scheme: str) -> tuple[str, str]:
    """A scheme's graph, and what the names of its data files begin with."""
    name = f"{FOLDER}/{BACKENDS[BACKEND].SCHEMES[scheme]}"
    return name, f"{name}_data"


def is_foreign(folder: Path) -> bool:
    """Whether a folder has programs of this layout, and no manifest of ours."""
    graphs = (folder / file_names(scheme)[0] for scheme in foreign_schemes())
    there = paths.is_folder(folder / FOLDER, ArtifactError) and not paths.exists(folder / MANIFEST, ArtifactError)
    return there and any(paths.exists(graph, ArtifactError) for graph in graphs)


def open_foreign(folder: Path) -> ForeignArtifact:
    """The programs of a folder, by the names of their files.

    Raises:
        ArtifactError: config.json is missing or damaged, or of no model that this package runs.
        CheckpointError, ConfigError: it is of another kind of model, or a value in it is out of range.
    """
    raw = files.read_json_object(folder / CONFIG, folder, ArtifactError)
    place = paths.shown(folder / CONFIG)
    config = find_family(raw, place).parse_config(raw)
    if config.encoder is not None:
        raise ArtifactError(f"{place}: is an encoder's; of others' folders only decoders are opened: export it instead")
    sizes = _sizes(folder)
    programs = tuple(
        _program(scheme, {name: size for name, size in sizes.items() if _belongs(name, scheme)}, config)
        for scheme in foreign_schemes()
        if file_names(scheme)[0] in sizes
    )
    record = CheckpointRecord(
        name=folder.name, revision=None, model_type=config.model_type, config_sha256=_NO_HASH, shards={}
    )
    return ForeignArtifact(path=folder, manifest=Manifest(checkpoint=record, programs=programs), config=config)


def _belongs(name: str, scheme: str) -> bool:
    graph, data = file_names(scheme)
    return name in (graph, data) or name.startswith(f"{data}_")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that lie beside the graphs."""
    names = paths.names(folder / FOLDER, ArtifactError)
    found = {f"{FOLDER}/{name}": paths.status(folder / FOLDER / name, ArtifactError) for name in names}
    return {name: status.st_size for name, status in found.items() if status is not None}


def _program(scheme: str, sizes: Mapping[str, int], config: ModelConfig) -> Program:
    """What is known before the graph is opened."""
    return Program(
        backend=BACKEND,
        scheme=scheme,
        graphs={MODEL: file_names(scheme)[0]},
        files={name: FileEntry(bytes=size, sha256=_NO_HASH) for name, size in sizes.items()},
        context_length=config.max_position_embeddings,
        inputs=(),
        outputs=(),
        cache=CacheSpec.from_config(config),
        options={},
        operators={},
        tensors=(),
        versions={},
    )
