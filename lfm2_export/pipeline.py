"""From a checkpoint to an artifact: the only file that names every stage.

In: a checkpoint, a backend, one or more schemes, a folder. Out: an ``Artifact``: all of it, or nothing and what was
there before. What can be refused is refused before the first weight is read: names, widths, companion files, disk,
memory, the output folder. An export that was killed is continued by the next one that would make the same.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from lfm2_export import companions, interrupts, model_card
from lfm2_export.artifact import Artifact, ArtifactWriter
from lfm2_export.backends import BACKENDS, Backend, get_backend, option_flag
from lfm2_export.backends.program import Estimate, ExportedProgram, ExportRequest
from lfm2_export.background import Background
from lfm2_export.calibration.request import Calibration, choose_algorithm
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import ExportError
from lfm2_export.leftovers import swept
from lfm2_export.manifest import CheckpointRecord, Program
from lfm2_export.messages import shown
from lfm2_export.mixing import check_mixable, make_budget, mixed
from lfm2_export.packages import recorded_versions
from lfm2_export.progress import Progress
from lfm2_export.quant.schemes import Scheme, get_scheme
from lfm2_export.resources import check_disk, check_memory, disk_needed
from lfm2_export.takeover import check_nothing_chosen, taken_over

logger = logging.getLogger(__name__)


def export(
    checkpoint: str | Path,
    *,
    backend: str = "onnx",
    scheme: str | Sequence[str] = "q4",
    output: str | Path,
    group_size: int | None = None,
    exclude: str | Sequence[str] = (),
    algorithm: str | None = None,
    calibrate: str | Path | None = None,
    statistics: str | Path | None = None,
    target_bits: float | None = None,
    target_size: str | int | None = None,
    budget: str | None = None,
    measure: str | Path | None = None,
    config_from: str | Path | None = None,
    requantize_table: bool = False,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    **options: int | str | None,
) -> Artifact:
    """Exports a checkpoint under one or more schemes into a folder.

    Args:
        checkpoint: a directory, a Hub id, a bundled name ("tiny-moe", "tiny-dense"), or a GGUF file, which is taken
            over bit for bit where its types are grids of ours (Q4_0, Q8_0, Q6_K).
        scheme: one name or several.
        output: a folder that does not exist, is empty, or is an artifact of the same checkpoint, which is added to.
        group_size: weights that share a scale, in the schemes that have groups; default: the scheme's.
        exclude: one or several patterns of tensor names (as in ``fnmatch``) to leave unquantized in those schemes.
        algorithm: how integer weights are fitted: "refit" (least squared error), "round" (plain rounding, faster) or
            "gptq" (least error of the layers' outputs on a text). Default: gptq with ``calibrate`` or ``statistics``,
            else refit.
        calibrate: the text that gptq measures the layers' inputs on: "default" (comes with this package), "self" (what
            the model itself writes) or a UTF-8 file.
        statistics: a file for what was measured: written with ``calibrate`` (and used again where it is there), read
            without.
        target_bits: mixes 4 and 8 bits and groups of 32 to 128 (``mixing``) within so many bits a weight, scales and
            token table included; q4 does so by itself, in the bytes of llama.cpp's Q4_K_M, unless ``group_size`` or
            ``exclude`` is given.
        target_size: the same within so many bytes of data, or "700MB", "1.2GB", "650MiB".
        measure: a file of text on which is measured what each tensor's width costs, with the model in memory as
            float32; None estimates it without data.
        budget: what these two count: "file" (default) or "step", what a decode step reads.
        config_from: for a GGUF file: the checkpoint whose config, tokenizer and templates count instead of the file's.
        requantize_table: for a GGUF file: a token table that is quantized already is so again, in the scheme's format;
            llama.cpp's 6 bits take 10 here, for exactness.
        options: the backend's own settings (``Backend.OPTIONS``), each of which is checked; None leaves one to the
            backend. executorch has ``max_context``, positions that the buffers hold (4096); ``moe_op``, how quantized
            experts run: "stock" (default: ExecuTorch's operator), "lfm2" (ours) or "both"; ``embedding_bits``, how
            wide the quantized token table is: 8 (default) or 4.

    Raises:
        Lfm2ExportError: the matching kind; what was there is unchanged. Nothing else is left behind, unless memory or
            disk ran out (ResourceError): then what is done waits beside ``output`` for the same call.
    """
    schemes_asked, excluded = _names("scheme", scheme), _names("exclude", exclude)
    _check_kinds((str, os.PathLike), "a name", checkpoint=checkpoint, output=output)
    _check_kinds(str, "a name", backend=backend)
    _check_kinds((str, NoneType), "a name or None", algorithm=algorithm, revision=revision)
    _check_kinds((str, os.PathLike, NoneType), "a name or None", calibrate=calibrate, statistics=statistics)
    _check_kinds((str, NoneType), "a name or None", budget=budget)
    _check_kinds((str, os.PathLike, NoneType), "a name or None", config_from=config_from)
    _check_kinds((str, os.PathLike, NoneType), "a file or None", measure=measure)
    _check_kinds((str, int, NoneType), "bytes, a size such as 700MB, or None", target_size=target_size)
    _check_kinds((int, float, NoneType), "a number or None", target_bits=target_bits)
    _check_kinds(
        (int, NoneType),
        "an integer or None",
        group_size=group_size,
    )
    if not str(output).strip():
        raise ExportError(f"output={str(output)!r} names no folder; give a name, or . for this one")
    lowering = get_backend(backend)
    options = _checked_options(backend, options)
    within = make_budget(target_bits, target_size, budget)
    algorithm = choose_algorithm(algorithm, calibrate, statistics)
    given: dict[str, object] = {"--group-size": group_size, "--exclude": " ".join(excluded) or None}
    given |= {"--calibrate": calibrate, "--statistics": statistics}
    schemes = _customized(_schemes(lowering, backend, schemes_asked), group_size, excluded, given)
    uniform = group_size is not None or bool(excluded)
    check_mixable(schemes, within, group_size, by_default=not uniform, text=measure)
    opened = open_checkpoint(checkpoint, revision=revision, offline=offline, config_from=config_from)
    companions.check(opened)
    if opened.exact_formats:
        check_nothing_chosen(opened, within, measure)
        schemes = [taken_over(opened, one, requantize_table=requantize_table) for one in schemes]
    else:
        schemes = mixed(
            opened, schemes, within, lowering.make_plan, algorithm=algorithm, by_default=not uniform, text=measure
        )
    progress = progress or Progress()
    calibration = Calibration.asked(opened, calibrate, statistics)
    asked = {} if calibration is None else {"calibration": calibration.key()}
    key = _key(opened, backend, schemes, {"algorithm": algorithm, **asked, **options})
    record = Background(lambda: writer.confirm(CheckpointRecord.of(opened)))
    # A backend's files lie in the folder of its name.
    writer = ArtifactWriter(output, record.result, into=[backend], key=key)
    with interrupts.lasting(), swept(), writer:
        if (finished := writer.finished()) is not None:
            return finished
        known = None if calibration is None else calibration.existing(writer.ledgers)
        requests = [
            ExportRequest(
                checkpoint=opened,
                scheme=one,
                file_name=lowering.SCHEMES[one.name],
                folder=writer.root,
                algorithm=algorithm,
                progress=progress.advance,
                options=options,
                ledgers=writer.ledgers,
                statistics=known,
            )
            for one in schemes
        ]
        estimates = [lowering.estimate(request) for request in requests]
        _check_resources(estimates, writer.folder, 0 if calibration is None else calibration.quantizing_memory())
        done = sum(estimate.done_bytes for estimate in estimates)
        if done:
            progress.continued(done, len(requests) * opened.total_bytes)
        # Hashing reads every shard: it runs beside the export, once nothing cheap can refuse the work any more.
        record.start()
        if calibration is not None and known is None:
            measured = calibration.collected(writer.ledgers, progress)
            requests = [replace(request, statistics=measured) for request in requests]
        for request in requests:
            logger.info("lowering %s to %s %s", opened.name, backend, request.scheme.name)
            progress.start(f"{backend} {request.scheme.name}", opened.total_bytes)
            made = lowering.export_program(request)
            interrupts.check()
            writer.add_program(_program(backend, request.scheme, made), made.files)
        companions.carry_over(opened, writer)
        lowering.runtime_files(opened, writer)
        writer.write_text("README.md", model_card.render(record.result(), writer.programs, opened))
        interrupts.check()
        return writer.commit()


def _checked_options(backend: str, options: dict[str, int | str | None]) -> dict[str, int | str | None]:
    """Those that were given, all of them the backend's."""
    given: dict[str, int | str | None] = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if option := get_backend(backend).OPTIONS.get(name):
            expected = "an integer or None" if option.kind is int else "a name or None"
            _check_kinds(option.kind, expected, **{name: value})
            continue
        owners = [other for other, one in BACKENDS.items() if name in one.OPTIONS]
        if not owners:
            known = sorted(get_backend(backend).OPTIONS) or ["none"]
            raise ExportError(f"export: {shown(name)} is no setting of backend {backend}; it has: {', '.join(known)}")
        raise ExportError(
            f"{option_flag(name)} {shown(value)}: is for backend {' or '.join(owners)}, not for {backend}; pass "
            f"--backend {owners[0]} or leave it out"
        )
    return given


def _names(what: str, value: str | Sequence[str]) -> list[str]:
    """One name or several; a text is one, not a list of its letters."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ExportError(f"{what}={shown(value)}: a name, or a list of names expected")
    return list(names)


def _check_kinds(kinds: type | tuple[type, ...], expected: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ExportError(f"{name}={shown(value)}: {expected} expected")


def _schemes(lowering: Backend, backend: str, names: Sequence[str]) -> list[Scheme]:
    if not names:
        raise ExportError("no scheme was given; pass --scheme q4, for instance")
    found = [get_scheme(name) for name in dict.fromkeys(names)]
    for one in found:
        if one.name not in lowering.SCHEMES:
            raise ExportError(
                f"scheme {one.name!r} is not for backend {backend}; its schemes: {', '.join(lowering.SCHEMES)}"
            )
    return found


def _customized(
    schemes: Sequence[Scheme], group_size: int | None, exclude: Sequence[str], given: Mapping[str, object]
) -> list[Scheme]:
    """The schemes with what was asked for in those that quantize; anything ``given`` is refused where none does."""
    if not any(scheme.has_groups for scheme in schemes):
        names = ", ".join(scheme.name for scheme in schemes)
        for option, value in given.items():
            if value is not None:
                raise ExportError(
                    f"{option} {value}: scheme {names} quantizes nothing; leave it out or ask for a quantized scheme"
                )
    return [_customize(scheme, group_size, exclude) if scheme.has_groups else scheme for scheme in schemes]


def _customize(scheme: Scheme, group_size: int | None, exclude: Sequence[str]) -> Scheme:
    grouped = scheme if group_size is None else scheme.with_group_size(group_size)
    return grouped.with_exclude(exclude)


def _key(checkpoint: Checkpoint, backend: str, schemes: Sequence[Scheme], options: dict[str, Any]) -> str:
    """All that the bytes of an export follow from, but for the weights themselves, which take long to hash: for those
    the size and the times of their files stand."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    stats = [(path.name, path.stat()) for path in files]
    return json.dumps(
        {
            "config": checkpoint.config_sha256,
            "shards": [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats],
            "backend": backend,
            "schemes": list(map(repr, schemes)),
            "options": options,
            "versions": recorded_versions(),
        }
    )


def _check_resources(estimates: Sequence[Estimate], folder: Path, more_memory: int) -> None:
    check_disk(folder, disk_needed(estimate.disk_bytes for estimate in estimates))
    check_memory(max(estimate.memory_bytes for estimate in estimates) + more_memory)


def _program(backend: str, scheme: Scheme, made: ExportedProgram) -> Program:
    return Program(
        backend=backend,
        scheme=scheme.name,
        graphs=made.graphs,
        files={},
        context_length=made.context_length,
        inputs=made.inputs,
        outputs=made.outputs,
        cache=made.cache,
        options=made.options,
        operators=made.operators,
        tensors=made.tensors,
        versions=recorded_versions(),
    )
