"""The artifact's README: what it is, how to run it in each runtime, and its figures; only what the manifest knows.

In: the checkpoint's record and the programs. Out: Markdown, by ``templates/model_card.md``, with the front matter that
the Hub reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lfm2_export.backends import BACKENDS, tested_with
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.manifest import ENCODER, CheckpointRecord, Program
from lfm2_export.messages import one_line
from lfm2_export.resources import human_bytes
from lfm2_export.source import SUFFIX
from lfm2_export.templating import fill_in

_MARKUP = re.compile(r"[\\`*\[\]<>|#&~]")
_NAME_LIMIT = 200
_JS_LIBRARY = "transformers.js"  # the Hub's name for it
_FIGURE_NAMES = ("Lowering: max error", "Lowering: KL", "Quantization: KL", "Same top token", "Perplexity")
_ENCODER_FIGURE_NAMES = ("Lowering: max error", "Lowering: 1 - cosine", "Cosine to fp32, mean", "Least")


def render(record: CheckpointRecord, programs: Sequence[Program], checkpoint: Checkpoint) -> str:
    """The whole card."""
    by_backend: dict[str, list[Program]] = {}
    for program in programs:
        by_backend.setdefault(program.backend, []).append(program)
    total, active = checkpoint.parameter_count, checkpoint.active_parameter_count
    licences = [path.name for path in checkpoint.files() if path.name.startswith("LICENSE")]
    values = {
        "front_matter": _front_matter(record, programs, checkpoint, licences),
        "record": record,
        "total": _millions(total),
        "active": None if active == total else _millions(active),
        "programs": [_row(program) for program in programs],
        "how_to_run": [
            BACKENDS[name].how_to_run(own, record.model_type) for name, own in by_backend.items() if name in BACKENDS
        ],
        "widths": [row for program in programs if (row := _widths(program))],
        "figures": [row for program in programs if (row := _figures(program))],
        "figure_names": _FIGURE_NAMES if checkpoint.config.encoder is None else _ENCODER_FIGURE_NAMES,
        "texts": dict.fromkeys(str(text) for p in programs if (text := (p.parity or {}).get("text"))),
        "licence": licences[0] if licences else None,
    }
    return fill_in("model_card.md", values, filters={"plain": _plain, "code": _code})


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _plain(name: object) -> str:
    """A name that somebody gave, on one line and without Markdown, HTML or a table's borders in it."""
    return _MARKUP.sub(r"\\\g<0>", one_line(str(name), _NAME_LIMIT))


def _code(name: object) -> str:
    """The same between backquotes, where nothing is escaped by a backslash."""
    return f"`{one_line(str(name), _NAME_LIMIT).replace('`', chr(39)).replace('|', '/')}`"


def _front_matter(
    record: CheckpointRecord, programs: Sequence[Program], checkpoint: Checkpoint, licences: Sequence[str]
) -> str:
    """What the Hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    base = _base_model(record)
    quantized = any(tensor.granularity for program in programs for tensor in program.tensors)
    data = ModelCardData(
        license="other" if licences else None,
        license_link=licences[0] if licences else None,
        base_model=base,
        base_model_relation="quantized" if base and quantized else None,
        library_name=None if checkpoint.config.drafter is not None else _library(record, programs),
        pipeline_tag=_task(checkpoint),
        tags=_tags(record, programs),
    )
    return data.to_yaml()


def _base_model(record: CheckpointRecord) -> str | None:
    """The repository that the checkpoint came from; of a GGUF file, the one that holds it."""
    if not record.revision:
        return None
    return "/".join(record.name.split("/")[:2]) if record.name.lower().endswith(SUFFIX) else record.name


def _library(record: CheckpointRecord, programs: Sequence[Program]) -> str:
    """What the Hub shows how to open it with: Transformers.js where it does, else what its first program is for."""
    for program in programs:
        if program.backend in BACKENDS:
            opened_by = tested_with(BACKENDS[program.backend].TESTED_WITH, record.model_type, program.scheme)
            if _JS_LIBRARY in opened_by.lower():
                return _JS_LIBRARY
    return programs[0].backend


def _tags(record: CheckpointRecord, programs: Sequence[Program]) -> list[str]:
    """The family, the files' formats, and ours."""
    return list(dict.fromkeys(["lfm2-export", record.model_type, *(program.backend for program in programs)]))


def _task(checkpoint: Checkpoint) -> str:
    """The Hub's name for what the model does."""
    head = checkpoint.config.encoder
    if head is None:
        return "text-generation"
    return "fill-mask" if head.masked_lm else "feature-extraction"


def _row(program: Program) -> dict[str, Any]:
    """One of the table of programs."""
    return {
        "name": str(program),
        "backend": program.backend,
        "scheme": program.scheme,
        "file": program.graphs["model"],
        "size": human_bytes(sum(entry.bytes for entry in program.files.values())),
        "context": f"{program.context_length:,}",
        "calibration": program.calibration,
    }


def _widths(program: Program) -> dict[str, Any] | None:
    """Bits a weight, and what has which width, of a quantized program."""
    bits = program.options.get("bits_per_weight", {})
    stored = [row for row in program.options.get("widths", ()) if "groups" in row["format"]]
    if not stored or not bits:
        return None
    return {
        "name": str(program),
        "file": _figure(bits, "file", ".2f"),
        "step": _figure(bits, "step", ".2f"),
        "stored": [{**row, "tensors": f"{row['tensors']:,}"} for row in stored],
        "mixture": program.mixture,
    }


def _figures(program: Program) -> dict[str, Any] | None:
    """Parity figures, where ``lfm2-export parity`` has recorded them."""
    hops = program.parity or {}
    lowering, cost = hops.get("lowering", {}), hops.get("quantization", {})
    if not lowering and not cost:
        return None
    if program.kind == ENCODER:
        return {"name": str(program), "cells": _encoder_cells(lowering, cost)}
    cells = (
        _figure(lowering, "max_abs_error", ".1e"),
        _figure(lowering, "kl", ".1e"),
        _figure(cost, "kl", ".4f"),
        _figure(cost, "top1_agreement", ".1%"),
        _figure(cost, "perplexity", ".2f"),
    )
    return {"name": str(program), "cells": cells}


def _encoder_cells(lowering: Mapping[str, Any], cost: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _figure(lowering, "max_abs_error", ".1e"),
        _figure(lowering, "cosine_distance", ".1e"),
        _figure(cost, "cosine", ".6f"),
        _figure(cost, "least_cosine", ".6f"),
    )


def _figure(figures: Mapping[str, Any], name: str, form: str) -> str:
    value = figures.get(name) if isinstance(figures, Mapping) else None
    return format(value, form) if isinstance(value, int | float) else "-"
