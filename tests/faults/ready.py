"""What exports in forks need not do again: the graphs, which take nineteen twentieths of a small export's time.

They are made for ``RAW_CONFIG`` before any fork; each fork has them to itself, since an export writes places into them.
No file is read or written for them, so a fault meets the same calls. A .pte is a few bytes here: making one takes
seconds, and what matters is where it is written.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.checkpoints import tiny_config, write_random_checkpoint

RAW_CONFIG = tiny_config("lfm2_moe", num_hidden_layers=2, layer_types=["conv", "full_attention"])
SCHEMES = ("q4", "q8", "fp16")


def warm_up() -> None:
    """The commands that are run later import here what they import."""
    from lfm2_export import cli

    _leave_out_programs()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_random_checkpoint(Path(folder) / "checkpoint", RAW_CONFIG, seed=0)
        out = f"{folder}/out"
        assert cli.main(["export", str(checkpoint), "-o", out]) == 0
        if _has_executorch():
            executorch = ("--backend", "executorch", "--scheme", "8da4w")
            assert cli.main(["export", str(checkpoint), "-o", out, *executorch]) == 0
        assert cli.main(["inspect", out]) == 0
        _keep_graphs(checkpoint)


def _has_executorch() -> bool:
    return importlib.util.find_spec("executorch") is not None


def _keep_graphs(checkpoint: Path) -> None:
    from lfm2_export.backends.onnx import export
    from lfm2_export.backends.onnx.plan import make_plan
    from lfm2_export.cache import CacheSpec
    from lfm2_export.checkpoint import open_checkpoint
    from lfm2_export.quant.schemes import get_scheme

    real, kept = export.make_graphs, dict[str, Any]()
    config = open_checkpoint(checkpoint).config
    for scheme in map(get_scheme, SCHEMES):
        arguments = (config, make_plan(config, scheme), CacheSpec.from_config(config, scheme.activation_dtype))
        kept[repr(arguments)] = real(*arguments)
    export.make_graphs = lambda *arguments: kept.pop(repr(arguments), None) or real(*arguments)


def _leave_out_programs() -> None:
    if not _has_executorch():
        return
    from lfm2_export.backends.executorch import trace

    manager = SimpleNamespace(write_to_file=lambda file: file.write(b"a program"))
    trace.make_pte = lambda *_: SimpleNamespace(manager=manager, delegates=0, operators={})  # type: ignore[assignment,return-value]
