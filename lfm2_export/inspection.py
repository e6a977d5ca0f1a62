"""What a checkpoint or an artifact is, in numbers: parameters, layers, bytes per part, state bytes per token of
context.

In: a folder, Hub id or bundled name. Out: a JSON-like dict; the CLI prints it. Reads headers and manifests, no weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_export import mixups
from lfm2_export.artifact import Artifact
from lfm2_export.cache import CacheSpec
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.hub_artifacts import described
from lfm2_export.manifest import Program
from lfm2_export.messages import as_unicode, shown
from lfm2_export.packages import explained

if TYPE_CHECKING:
    from lfm2_export.checkpoint import CheckpointRequest

LONG_CONTEXT = 32768


@explained
def inspect(
    name: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    config_from: str | Path | None = None,
    lora: str | Path | None = None,
) -> dict[str, Any]:
    """Describes an artifact (a folder with a manifest, or a repository on the Hub that has one) or else a checkpoint;
    arguments as ``open_checkpoint``'s. Of a repository's artifact the manifest alone is fetched.

    Raises:
        Lfm2ExportError: it is neither, or damaged, or an artifact with what only a checkpoint has.
    """
    if mixups.is_artifact(name):
        _refuse(name, {"--revision": revision, "--config-from": config_from, "--lora": lora})
        return _artifact(Artifact.open(name))
    if (found := described(name, revision=revision, offline=offline)) is not None:
        _refuse(name, {"--config-from": config_from, "--lora": lora})
        return _artifact(found, repository=str(name))
    from lfm2_export.checkpoint import CheckpointRequest

    return _checkpoint(
        CheckpointRequest(name=name, revision=revision, offline=offline, config_from=config_from, lora=lora)
    )


def _refuse(artifact: str | Path, given: Mapping[str, object]) -> None:
    """Of an artifact nothing is read anew: what would change a checkpoint would go unheard."""
    for option, value in given.items():
        if value is not None:
            raise Lfm2ExportError(
                f"{option}: is for checkpoints, and {shown(str(artifact))} is an artifact; leave it out"
            )


def _checkpoint(request: CheckpointRequest) -> dict[str, Any]:
    checkpoint = request.open()
    config = checkpoint.config
    cache = CacheSpec.from_config(config)
    moved = CacheSpec.from_config(config, bounded=True)
    return {
        "kind": "checkpoint",
        "name": as_unicode(checkpoint.name),
        "family": config.model_type,
        "parameters": checkpoint.parameter_count,
        "active_parameters": checkpoint.active_parameter_count,
        "bytes": checkpoint.total_bytes,
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        "layers": {"conv": len(config.conv_layers), "attention": len(config.attention_layers)},
        "moe_layers": len(config.moe_layers),
        "parts": {part: {"parameters": n, "bytes": size} for part, (n, size) in checkpoint.parts().items()},
        "state_bytes_per_token": cache.bytes_per_token(),
        "state_bytes_fixed": cache.fixed_bytes(),
        "state_bytes_at_32k": cache.state_bytes(LONG_CONTEXT),
        # In programs that keep no more of a sliding layer than its window: a .pte, and ONNX graphs on our operators.
        "state_bytes_at_32k_bounded": moved.state_bytes(LONG_CONTEXT),
        "state_bytes_at_32k_rings": cache.with_rings(config).state_bytes(LONG_CONTEXT),
        "sliding_layers": len(config.sliding_layers),
        "sliding_window": config.sliding_window,
        "context_length": config.max_position_embeddings,
        "encoder": None if config.encoder is None else config.encoder.describe(config.hidden_size),
    }


def _artifact(artifact: Artifact, repository: str | None = None) -> dict[str, Any]:
    """``repository``: it is on the Hub, whose files are all there and as they were pushed."""
    record = artifact.manifest.checkpoint
    return {
        "kind": "artifact",
        "name": as_unicode(str(artifact.path) if repository is None else repository),
        "family": record.model_type,
        "checkpoint": str(record),
        "programs": [
            _program(program, here=repository is not None or artifact.is_here(program)) for program in artifact.select()
        ],
        "edited_files": [] if repository else [as_unicode(name) for name in artifact.edited()],
        "adopted_files": [as_unicode(name) for name in artifact.manifest.adopted_files],
        "missing_files": [] if repository else [as_unicode(name) for name in artifact.missing()],
    }


def _program(program: Program, *, here: bool) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for tensor in program.tensors:
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    own = program.own_cache
    worst = max(program.tensors, key=lambda tensor: tensor.error or 0.0, default=None)
    return {
        "backend": program.backend,
        "scheme": program.scheme,
        "graphs": dict(program.graphs),
        "here": here,
        "kind": program.kind,
        "outputs": [output.name for output in program.outputs],
        "bytes": sum(entry.bytes for entry in program.files.values()),
        "weights_by_dtype": dict(dtypes),
        "bits_per_weight": dict(program.options.get("bits_per_weight", {})),
        "widths": list(program.options.get("widths", ())),
        "mixture": program.mixture,
        "calibration": program.calibration,
        "largest_error": None if worst is None else {"tensor": worst.name, "relative_error": worst.error},
        "operators": dict(program.operators),
        "state_bytes_per_token": program.cache.bytes_per_token(),
        "state_bytes_fixed": program.cache.fixed_bytes(),
        "state_bytes_at_32k": program.cache.state_bytes(LONG_CONTEXT),
        # Of its graphs on our operators, where that is another one.
        "state_bytes_at_32k_rings": None if own is None else own.state_bytes(LONG_CONTEXT),
        "context_length": program.context_length,
        "parity": program.parity,
    }
