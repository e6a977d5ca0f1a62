"""The artifact's README: what it is, how to run it in each runtime, and its figures; only what the manifest knows.

In: the checkpoint's record and the programs. Out: Markdown with the front matter that the Hub reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lfm2_export.backends import BACKENDS
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.manifest import CheckpointRecord, Program
from lfm2_export.messages import one_line
from lfm2_export.resources import human_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MARKUP = re.compile(r"[\\`*\[\]<>|#&~]")
_NAME_LIMIT = 200


def render(record: CheckpointRecord, programs: Sequence[Program], checkpoint: Checkpoint) -> str:
    """The whole card."""
    by_backend: dict[str, list[Program]] = {}
    for program in programs:
        by_backend.setdefault(program.backend, []).append(program)
    sections = [_front_matter(record, checkpoint), _title(record, checkpoint), _programs(programs)]
    sections += [BACKENDS[name].how_to_run(own) for name, own in by_backend.items() if name in BACKENDS]
    figures = _figures(programs)
    return "\n".join([*sections, *([figures] if figures else []), _licence(checkpoint)])


def _plain(name: object) -> str:
    """A name that somebody gave, on one line and without Markdown, HTML or a table's borders in it."""
    return _MARKUP.sub(r"\\\g<0>", one_line(str(name), _NAME_LIMIT))


def _code(name: object) -> str:
    """The same between backquotes, where nothing is escaped by a backslash."""
    return f"`{one_line(str(name), _NAME_LIMIT).replace('`', chr(39)).replace('|', '/')}`"


def _front_matter(record: CheckpointRecord, checkpoint: Checkpoint) -> str:
    # A string of JSON is one of YAML's.
    name = record.name if _HUB_ID.fullmatch(record.name) else json.dumps(record.name)
    base = f"base_model: {name}\n" if record.revision else ""
    licence = "license: other\n" if any(p.name.startswith("LICENSE") for p in checkpoint.files()) else ""
    return (
        f"---\n{licence}{base}library_name: transformers.js\npipeline_tag: text-generation\ntags: [lfm2, onnx]\n---\n"
    )


def _title(record: CheckpointRecord, checkpoint: Checkpoint) -> str:
    total, active = checkpoint.parameter_count, checkpoint.active_parameter_count
    used = f", {active / 1e6:,.1f} M of them for one token" if active != total else ""
    return (
        f"# {_plain(record)} for on-device runtimes\n\n"
        f"Exported by lfm2-export from a {_code(record.model_type)} checkpoint with {total / 1e6:,.1f} M "
        f"parameters{used}. "
        "`lfm2_export.json` lists every file with its hash and every tensor with its quantization error.\n"
    )


def _programs(programs: Sequence[Program]) -> str:
    rows = [
        f"| {_plain(program.backend)} | {_plain(program.scheme)} | {_code(program.graphs['model'])} | "
        f"{human_bytes(sum(entry.bytes for entry in program.files.values()))} | {program.context_length:,} |"
        for program in programs
    ]
    head = "| Backend | Scheme | File | Size with weights | Context |\n|---|---|---|---|---|"
    notes = [f"{_plain(program)}: {_plain(made)}.\n" for program in programs if (made := program.calibration)]
    return "\n".join(["## Programs\n", head, *rows, "", *notes])


def _figures(programs: Sequence[Program]) -> str:
    """Parity figures, where ``lfm2-export parity`` has recorded them."""
    rows = []
    for program in programs:
        hops = program.parity or {}
        lowering, cost = hops.get("lowering", {}), hops.get("quantization", {})
        if lowering or cost:
            cells = (
                _figure(lowering, "max_abs_error", ".1e"),
                _figure(lowering, "kl", ".1e"),
                _figure(cost, "kl", ".4f"),
                _figure(cost, "top1_agreement", ".1%"),
                _figure(cost, "perplexity", ".2f"),
            )
            rows.append(f"| {_plain(program)} | {' | '.join(cells)} |")
    if not rows:
        return ""
    head = (
        "| Program | Lowering: max error | Lowering: KL | Quantization: KL | Same top token | Perplexity |\n"
        "|---|---|---|---|---|---|"
    )
    return "\n".join(["## Parity with the eager model\n", head, *rows, ""])


def _figure(figures: Mapping[str, Any], name: str, form: str) -> str:
    value = figures.get(name) if isinstance(figures, Mapping) else None
    return format(value, form) if isinstance(value, int | float) else "-"


def _licence(checkpoint: Checkpoint) -> str:
    names = [path.name for path in checkpoint.files() if path.name.startswith("LICENSE")]
    if not names:
        return "## Licence\n\nThe checkpoint came without a licence file; its licence applies to this artifact.\n"
    return f"## Licence\n\nThat of the base model: see {_code(names[0])}.\n"
