"""From a checkpoint to an artifact: the only file that names every stage.

In: a checkpoint, a backend, one or more schemes, a folder. Out: an ``Artifact``: all of it, or nothing and what was
there before. What can be refused is refused before the first weight is read: names, widths, companion files, disk,
memory, the output folder. An export that was killed is continued by the next one that would make the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lfm2_export import companions, interrupts, model_card
from lfm2_export.artifact import Artifact
from lfm2_export.artifact_writer import ArtifactWriter
from lfm2_export.backends.program import WEIGHTS, Estimate, ExportedProgram, ExportRequest
from lfm2_export.background import Background
from lfm2_export.calibration.request import Calibration
from lfm2_export.calibration.statistics import Statistics
from lfm2_export.checkpoint import Checkpoint, CheckpointRequest
from lfm2_export.choices import AlgorithmName, BackendName, BudgetName, SchemeName
from lfm2_export.export_settings import ExportChoice, ExportSettings
from lfm2_export.leftovers import swept
from lfm2_export.manifest import CheckpointRecord, Program
from lfm2_export.mixing import mixed
from lfm2_export.packages import explained, recorded_versions
from lfm2_export.progress import Progress
from lfm2_export.quant.schemes import Scheme, check_patterns
from lfm2_export.resources import check_disk, check_memory, disk_needed
from lfm2_export.takeover import check_nothing_chosen, taken_over

logger = logging.getLogger(__name__)


@explained
def export(
    checkpoint: str | Path,
    *,
    backend: BackendName | Sequence[BackendName] = "onnx",
    scheme: SchemeName | Sequence[SchemeName] | None = None,
    output: str | Path,
    group_size: int | None = None,
    exclude: str | Sequence[str] = (),
    algorithm: AlgorithmName | None = None,
    calibrate: str | Path | None = None,
    statistics: str | Path | None = None,
    target_bits: float | None = None,
    target_size: str | int | None = None,
    budget: BudgetName | None = None,
    measure: str | Path | None = None,
    config_from: str | Path | None = None,
    lora: str | Path | None = None,
    requantize_table: bool = False,
    target: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    **options: int | str | None,
) -> Artifact:
    """Exports a checkpoint for one or more backends under one or more schemes into a folder.

    Args:
        checkpoint: a directory, a Hub id, a bundled name ("tiny-moe", "tiny-dense", "tiny-lfm3"), or a GGUF file, which
            is taken over bit for bit where its types are grids of ours (Q4_0, Q8_0, Q6_K).
        backend: "onnx", "executorch", or several.
        scheme: one name or several, of which each backend makes those that it has; None: each backend's default (q4 for
            onnx, 8da4w for executorch).
        output: a folder that does not exist, is empty, or is an artifact of the same checkpoint, which is added to.
        group_size: weights that share a scale, in the schemes that have groups; default: the scheme's.
        exclude: one or several patterns of tensor names (as in ``fnmatch``) to leave unquantized in those schemes.
        algorithm: how integer weights are fitted: "refit" (least squared error), "round" (plain rounding, faster) or
            "gptq" (least error of the layers' outputs on a text). Default: gptq with ``calibrate`` or ``statistics``,
            else refit.
        calibrate: the text that gptq measures the layers' inputs on: "default" (comes with this package), "self" (what
            the model itself writes) or a UTF-8 file. What is measured also decides mixed widths.
        statistics: a file for what was measured: written with ``calibrate`` (and used again where it is there), read
            without.
        target_bits: mixes 4 and 8 bits and groups of 32 to 256 (``mixing``) within so many bits a weight, scales and
            token table included; q4 does so by itself, in the bytes of llama.cpp's Q4_K_M, and q4f16 in those of its
            own widths, unless ``group_size`` or ``exclude`` is given. In 8da4w 8 bits have a scale for each row, and
            experts keep 4.
        target_size: the same within so many bytes of data, or "700MB", "1.2GB", "650MiB".
        measure: a file of text on which is measured what each tensor's width costs, with the model in memory as
            float32; None estimates it by the statistics of ``calibrate``, else without data.
        budget: what these two count: "file" (default) or "step", what a decode step reads.
        config_from: for a GGUF file: the checkpoint whose config, tokenizer and templates count instead of the file's.
        lora: the folder of a LoRA adapter, as peft saves it (adapter_config.json, adapter_model.safetensors), which is
            merged into the weights as they are read.
        requantize_table: for a GGUF file: a token table that is quantized already is so again, in the scheme's format;
            llama.cpp's 6 bits take 10 here, for exactness.
        target: of a drafter, and only of one: the artifact of the model that it drafts for, whose token table and head
            it borrows.
        options: the backend's own settings (``Backend.OPTIONS``), each of which is checked; None leaves one to the
            backend. executorch has ``max_context``, positions that the buffers hold (4096); ``moe_op``, how quantized
            experts run: "stock" (default: ExecuTorch's operator), "lfm2" (ours) or "both"; ``embedding_bits``, how
            wide the quantized token table is: 8 (default) or 4.

    Raises:
        Lfm2ExportError: the matching kind; what was there is unchanged. Nothing else is left behind, unless memory or
            disk ran out (ResourceError): then what is done waits beside ``output`` for the same call.
    """
    settings = ExportSettings(
        source=CheckpointRequest(
            name=checkpoint,
            revision=revision,
            offline=offline,
            config_from=config_from,
            lora=lora,
            target=target,
        ),
        backend=backend,
        scheme=scheme,
        output=output,
        group_size=group_size,
        exclude=exclude,
        algorithm=algorithm,
        calibrate=calibrate,
        statistics=statistics,
        target_bits=target_bits,
        target_size=target_size,
        budget=budget,
        measure=measure,
        requantize_table=requantize_table,
        options=options,
    )
    return _run(settings, progress or Progress())


def estimate_export(settings: ExportSettings, checkpoint: Checkpoint) -> Estimate:
    """What an export would need, for whoever plans several; ``checkpoint`` is the one that the settings name. Mixed
    widths, which take long to choose, count as the scheme's own.

    Raises:
        Lfm2ExportError: as ``export``, for all that can be refused without reading weights or looking at the output.
    """
    choices = settings.choices()
    if checkpoint.config.drafter is not None:
        choices = tuple(settings.for_drafter(choice) for choice in choices)
    companions.check(checkpoint)
    if checkpoint.exact_formats:
        for choice in choices:
            check_nothing_chosen(checkpoint, choice.widths)
    calibration = Calibration.asked(checkpoint, settings.calibrate, settings.statistics)
    estimates = [
        choice.lowering.estimate(
            ExportRequest(
                checkpoint=checkpoint,
                scheme=scheme,
                file_name=choice.lowering.SCHEMES[scheme.name],
                folder=Path(settings.output),
                algorithm=choice.algorithm,
                progress=lambda nbytes: None,
                options=choice.options,
            )
        )
        for choice in choices
        for scheme in choice.schemes
    ]
    memory = max(one.memory_bytes for one in estimates)
    if calibration is not None:
        memory += calibration.quantizing_memory()
        if settings.calibrate is not None:
            memory = max(memory, calibration.estimate().memory_bytes)
    return Estimate(disk_bytes=disk_needed(one.disk_bytes for one in estimates), memory_bytes=memory)


def _run(settings: ExportSettings, progress: Progress) -> Artifact:
    asked = settings.choices()
    opened = settings.source.open()
    if opened.config.drafter is not None:
        asked = tuple(settings.for_drafter(choice) for choice in asked)
    companions.check(opened)
    # Every plan looks at these patterns, too; here they are refused before widths are chosen, which takes minutes.
    for scheme in (scheme for choice in asked for scheme in choice.schemes):
        check_patterns(scheme.exclude, opened.model_tensors)
    progress.phase("choosing what is stored how")
    choices = [replace(choice, schemes=_with_widths(settings, choice, opened)) for choice in asked]
    calibration = Calibration.asked(opened, settings.calibrate, settings.statistics)
    record = Background(lambda: writer.confirm(CheckpointRecord.of(opened)))
    # A backend's files lie in the folder of its name.
    backends = [choice.backend for choice in choices]
    writer = ArtifactWriter(
        settings.output,
        record.result,
        into=backends,
        key=_key(choices, opened, calibration),
        target=None if opened.target is None else opened.target.record,
    )
    with interrupts.lasting(), swept(), writer:
        if (finished := writer.finished()) is not None:
            return finished
        return _Export(
            choices=choices,
            checkpoint=opened,
            record=record,
            calibration=calibration,
            writer=writer,
            progress=progress,
        ).run()


def _with_widths(settings: ExportSettings, choice: ExportChoice, checkpoint: Checkpoint) -> tuple[Scheme, ...]:
    """The schemes with a format for every tensor: taken over from a file that is quantized already, or mixed."""
    if not checkpoint.exact_formats:
        return tuple(mixed(checkpoint, choice.schemes, choice.make_plan, choice.widths))
    check_nothing_chosen(checkpoint, choice.widths)
    again = settings.requantize_table
    return tuple(taken_over(checkpoint, scheme, requantize_table=again) for scheme in choice.schemes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Export:
    """All that the stages take, from the first weight on. ``record`` is the checkpoint's, once it is hashed;
    ``calibration`` is None where none was asked for."""

    choices: Sequence[ExportChoice]
    checkpoint: Checkpoint
    record: Background[CheckpointRecord]
    calibration: Calibration | None
    writer: ArtifactWriter
    progress: Progress

    def run(self) -> Artifact:
        known = None if self.calibration is None else self.calibration.existing(self.writer.ledgers)
        requests = self._requests(known)
        self._check_resources([choice.lowering.estimate(request) for choice, request in requests])
        # Hashing reads every shard: it runs beside the export, once nothing cheap can refuse the work any more.
        self.record.start()
        if self.calibration is not None and known is None:
            requests = self._requests(self.calibration.collected(self.writer.ledgers, self.progress))
        for choice, request in requests:
            self._add(choice, request)
        return self._finish()

    def _requests(self, statistics: Statistics | None) -> list[tuple[ExportChoice, ExportRequest]]:
        """One for each backend's schemes. Until there are statistics, widths are those that the weights alone suggest:
        in the same budget, so that the estimate of disk and memory holds."""
        found = []
        for choice in self.choices:
            schemes: Sequence[Scheme] = choice.schemes
            if statistics is not None and not self.checkpoint.exact_formats:
                schemes = mixed(self.checkpoint, schemes, choice.make_plan, choice.widths, statistics)
            found += [(choice, self._request(choice, scheme, statistics)) for scheme in schemes]
        return found

    def _request(self, choice: ExportChoice, scheme: Scheme, statistics: Statistics | None) -> ExportRequest:
        told = _Told(self.progress, f"{choice.backend} {scheme.name}", self.checkpoint.total_bytes)
        return ExportRequest(
            checkpoint=self.checkpoint,
            scheme=scheme,
            file_name=choice.lowering.SCHEMES[scheme.name],
            folder=self.writer.root,
            algorithm=choice.algorithm,
            progress=told.advance,
            phase=told.begin,
            options=choice.options,
            ledgers=self.writer.ledgers,
            statistics=statistics,
        )

    def _check_resources(self, estimates: Sequence[Estimate]) -> None:
        calibrated = 0 if self.calibration is None else self.calibration.quantizing_memory()
        check_disk(self.writer.folder, disk_needed(estimate.disk_bytes for estimate in estimates))
        check_memory(max(estimate.memory_bytes for estimate in estimates) + calibrated)
        if done := sum(estimate.done_bytes for estimate in estimates):
            self.progress.continued(done, len(estimates) * self.checkpoint.total_bytes)

    def _add(self, choice: ExportChoice, request: ExportRequest) -> None:
        logger.info("lowering %s to %s %s", self.checkpoint.name, choice.backend, request.scheme.name)
        made = choice.lowering.export_program(request)
        interrupts.check()
        self.writer.add_program(_program(choice.backend, request.scheme, made), made.files)

    def _finish(self) -> Artifact:
        self.progress.phase("hashing the checkpoint, putting files into place")
        companions.carry_over(self.checkpoint, self.writer)
        for choice in self.choices:
            choice.lowering.runtime_files(self.checkpoint, self.writer)
        card = model_card.render(self.record.result(), self.writer.programs, self.checkpoint)
        self.writer.write_text("README.md", card)
        interrupts.check()
        return self.writer.commit()


class _Told:
    """What one program's export says of itself, as the progress of the whole: a program may read weights several
    times, and a weight that two of its tensors share twice."""

    def __init__(self, progress: Progress, name: str, total: int):
        self._progress, self._name, self._total, self._read = progress, name, total, 0

    def begin(self, phase: str) -> None:
        label = f"{self._name}: {phase}"
        if phase != WEIGHTS:
            self._progress.phase(label)
            return
        self._progress.start(label, self._total)
        self._progress.advance(self._read)

    def advance(self, nbytes: int) -> None:
        new = min(nbytes, self._total - self._read)
        self._read += new
        self._progress.advance(new)


def _key(choices: Sequence[ExportChoice], checkpoint: Checkpoint, calibration: Calibration | None) -> str:
    """All that the bytes of an export follow from, but for the weights themselves, which take long to hash: for those
    the size and the times of their files stand."""
    stats = [(checkpoint.shard_name(path), path.stat()) for path in checkpoint.weight_files]
    adapter = checkpoint.adapter
    asked = {} if calibration is None else {"calibration": calibration.key()}
    return json.dumps(
        {
            "config": checkpoint.config_sha256,
            "shards": [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats],
            "programs": [
                (choice.backend, list(map(repr, choice.schemes)), {"algorithm": choice.algorithm, **choice.options})
                for choice in choices
            ],
            **asked,
            **({} if adapter is None else {"lora": adapter.settings_sha256}),
            "versions": recorded_versions(),
        }
    )


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
        kind=made.kind,
        own_cache=made.own_cache,
    )
