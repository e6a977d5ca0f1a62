"""Exports one scheme of a checkpoint as a .pte, and says what the manifest needs to know of it.

In: an ``ExportRequest``. Out: files under ``executorch/`` of its folder and an ``ExportedProgram``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lfm2_export import interrupts
from lfm2_export.backends.executorch.plan import MoeOp, PtePlan, make_plan
from lfm2_export.backends.executorch.stream import PteStream, read_bytes
from lfm2_export.backends.program import LOWERING, WEIGHTS, Estimate, ExportedProgram, ExportRequest
from lfm2_export.backends.weights.widths import describe
from lfm2_export.cache import CacheSpec
from lfm2_export.config import ModelConfig
from lfm2_export.errors import ExportError
from lfm2_export.heads import HIDDEN, LOGITS, SENTENCE, TOKENS
from lfm2_export.manifest import MODEL, StoredTensor, TensorSpec
from lfm2_export.messages import shown
from lfm2_export.models import get_encoder, get_net
from lfm2_export.resources import check_memory, export_memory_needed, usable_cores

if TYPE_CHECKING:
    from lfm2_export.backends.executorch.spill import Spill
    from lfm2_export.backends.executorch.trace import PteProgram
    from lfm2_export.backends.executorch.weights import ProgramWeights
    from lfm2_export.quant.schemes import Scheme

FOLDER = "executorch"
DEFAULT_MAX_CONTEXT = 4096
BOTH = "both"


def estimate(request: ExportRequest) -> Estimate:
    """Disk and memory that the export will need; refuses what cannot be lowered.

    Raises:
        QuantizationError: the scheme does not fit this checkpoint.
        ExportError: a layer or a setting that the operators cannot express.
    """
    plans = _plans(request)
    config = request.checkpoint.config
    state, tables = _buffer_bytes(config, max_context(config, request.options))
    streams = [_stream(request, plan, name, request.folder) for name, plan in plans.items()]
    largest = max(prod(tensor.shape[-2:]) for tensor in request.checkpoint.model_tensors.values())
    at_once = usable_cores() * max(piece.values for stream in streams for piece in stream.pieces)
    held = max(plan.held_bytes() for plan in plans.values()) + tables
    share = _Share(request, streams)
    # Beside what a tensor takes on its way, the weights are held: once as maps of the stream's files, once in the
    # program that is put together, once more while it is written. The state is twice there, as buffers and as
    # write_state's arguments, and none of it in the file.
    return Estimate(
        disk_bytes=sum(plan.program_bytes() + tables for plan in plans.values())
        + sum(map(PteStream.missing_bytes, streams)),
        memory_bytes=export_memory_needed(max(largest, at_once)) + 3 * held + 2 * state,
        done_bytes=share.of(sum(read_bytes(stream.done, request.checkpoint) for stream in streams)),
    )


def _buffer_bytes(config: ModelConfig, context: int) -> tuple[int, int]:
    """Bytes of the state's buffers, and of RoPE's two tables, which are constants of the program.

    Raises:
        ResourceError: the buffers alone are too much for this machine.
    """
    from lfm2_export.backends.executorch.trace import buffer_positions

    positions = buffer_positions(context)
    cache = CacheSpec.from_config(config, "float32", bounded=True)
    state = cache.fixed_bytes() + cache.bytes_per_token() * positions
    tables = len(config.ropes) * 2 * 4 * config.head_dim * positions
    check_memory(
        2 * state + 3 * tables, purpose=f"a context of {context} (--max-context)", remedy="pass a smaller --max-context"
    )
    return state, tables


class _Share:
    """What was read as a share of the checkpoint, which is what progress is counted in: a tied token table is read
    twice, and all of it again for each way to run experts. Its calls tell the request of that much more."""

    def __init__(self, request: ExportRequest, streams: Sequence[PteStream]):
        self._report, self._total = request.progress, request.checkpoint.total_bytes
        self._planned = sum(read_bytes(stream.pieces, request.checkpoint) for stream in streams)
        self._read = 0

    def of(self, nbytes: int) -> int:
        return nbytes * self._total // self._planned

    def __call__(self, nbytes: int) -> None:
        before = self.of(self._read)
        self._read += nbytes
        self._report(self.of(self._read) - before)


def _stream(request: ExportRequest, plan: PtePlan, name: str, root: Path) -> PteStream:
    """The stream of one file; ``root`` is where its files go if the request is not to be continued."""
    ledger = None if request.ledgers is None else request.ledgers / f"{name}.ledger"
    return PteStream(
        plan,
        request.algorithm,
        name=name,
        root=request.ledgers or root,
        ledger=ledger,
        statistics=request.statistics,
    )


def max_context(config: ModelConfig, options: Mapping[str, int | str]) -> int:
    """Positions that the buffers hold: what was asked for, else 4096 or the model's limit.

    Raises:
        ExportError: not positive, or beyond the model's limit.
    """
    limit, asked = config.max_position_embeddings, options.get("max_context")
    if asked is None:
        return min(DEFAULT_MAX_CONTEXT, limit)
    if type(asked) is not int or not 1 < asked <= limit:
        raise ExportError(f"--max-context {shown(asked)}: pass 2 to {limit}, the model's max_position_embeddings")
    return asked


def export_program(request: ExportRequest) -> ExportedProgram:
    """Writes the .pte.

    Raises:
        ExportError, QuantizationError: the checkpoint cannot be lowered under this scheme.
        CheckpointError: a tensor is damaged.
    """
    config = request.checkpoint.config
    plans, context = _plans(request), max_context(config, request.options)
    cache = CacheSpec.from_config(config, "float32", bounded=True)
    (request.folder / FOLDER).mkdir(exist_ok=True)
    with _scratch(request) as root:
        streams = {name: _stream(request, plan, name, root) for name, plan in plans.items()}
        report = _Share(request, list(streams.values()))
        made = {name: _export_one(request, stream, report, cache, context, name) for name, stream in streams.items()}
    first = next(iter(made.values()))
    graphs = {_role(index, plan): f"{FOLDER}/{name}" for index, (name, plan) in enumerate(plans.items())}
    return ExportedProgram(
        graphs=graphs,
        files=tuple(graphs.values()),
        context_length=context,
        inputs=_inputs(config),
        outputs=_outputs(config),
        cache=cache,
        options=_options(request, context, plans, made),
        operators=first.operators,
        tensors=first.tensors,
        kind=request.kind,
    )


def _inputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    row: tuple[int | str, ...] = (1, "sequence_length")
    if config.encoder is not None:
        return tuple(TensorSpec(name=name, dtype="int64", shape=row) for name in ("input_ids", "attention_mask"))
    return (
        TensorSpec(name="tokens", dtype="int64", shape=row),
        TensorSpec(name="start_pos", dtype="int64", shape=(1,)),
    )


def _outputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    if config.encoder is None:
        return (TensorSpec(name="logits", dtype="float32", shape=(1, 1, config.vocab_size)),)
    head, width = config.encoder, config.hidden_size
    row: tuple[int | str, ...] = (1, "sequence_length")
    shapes = {
        HIDDEN: (*row, width),
        SENTENCE: (1, width),
        TOKENS: (*row, head.projection or 0),
        LOGITS: (*row, config.vocab_size),
    }
    return tuple(TensorSpec(name=name, dtype="float32", shape=shapes[name]) for name in head.outputs)


def _role(index: int, plan: PtePlan) -> str:
    """The first file is what any runtime opens; the other way to run experts is a variant of it."""
    assert index == 0 or plan.moe_op is not None
    return MODEL if index == 0 else str(plan.moe_op)


def _options(
    request: ExportRequest, context: int, plans: Mapping[str, PtePlan], made: Mapping[str, Made]
) -> dict[str, Any]:
    """Settings, and per file what was made: its delegates, operators, and where its weights lie."""
    plan = next(iter(plans.values()))
    return {
        **request.describe_algorithm(),
        **request.describe_kind(),
        "max_context": context,
        "moe_op": {name: str(plan.moe_op) for name, plan in plans.items() if plan.moe_op is not None},
        "delegates": {name: one.delegates for name, one in made.items()},
        "operators": {name: dict(one.operators) for name, one in made.items()},
        "weights": {name: one.places for name, one in made.items()},
        **plan.scheme.options(),
        **describe(plan),
    }


@dataclass(frozen=True, kw_only=True)
class Made:
    """One .pte."""

    delegates: int
    operators: Mapping[str, int]
    tensors: tuple[StoredTensor, ...]
    places: Mapping[str, Any]


@contextmanager
def _scratch(request: ExportRequest) -> Iterator[Path]:
    """A folder of its own for the streams' files; where the export may be continued they are beside its ledgers."""
    if request.ledgers is not None:
        yield request.ledgers
        return
    folder = request.folder / FOLDER
    with tempfile.TemporaryDirectory(prefix="weights.", dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _export_one(
    request: ExportRequest, stream: PteStream, report: Callable[[int], None], cache: CacheSpec, context: int, name: str
) -> Made:
    from lfm2_export.backends.executorch.spill import Spill
    from lfm2_export.backends.executorch.weights import ProgramWeights

    plan = stream.plan
    request.phase(WEIGHTS)
    tensors = stream.write(request.checkpoint, report)
    request.phase(LOWERING)
    spill = Spill(stream.paths)
    weights = ProgramWeights(plan, stream.places, spill)
    made = _encoder_program if plan.config.encoder is not None else _decoder_program
    program = made(request, plan.config, weights, spill, cache, context)
    interrupts.check()
    with open(request.folder / FOLDER / name, "wb") as file:
        program.manager.write_to_file(file)
    return Made(
        delegates=program.delegates,
        operators=program.operators,
        tensors=tensors,
        places=weights.places(),
    )


def _decoder_program(
    request: ExportRequest, config: ModelConfig, weights: ProgramWeights, spill: Spill, cache: CacheSpec, context: int
) -> PteProgram:
    from lfm2_export.backends.executorch.lower import Lowering
    from lfm2_export.backends.executorch.trace import buffer_positions, make_pte

    with torch.device("meta"):
        causal_lm = get_net(config.model_type)(config).eval()
    Lowering(config, weights, buffer_positions(context)).lower_(causal_lm)
    spill.let_go()
    interrupts.check()
    told = replace(config, eos_token_id=request.checkpoint.stop_token_ids)
    return make_pte(causal_lm, told, cache, context, spill)


def _encoder_program(
    request: ExportRequest, config: ModelConfig, weights: ProgramWeights, spill: Spill, cache: CacheSpec, context: int
) -> PteProgram:
    from lfm2_export.backends.executorch.lower_encoder import EncoderLowering
    from lfm2_export.backends.executorch.trace import make_encoder_pte

    with torch.device("meta"):
        encoder = get_encoder(config.model_type)(config).eval()
    EncoderLowering(config, weights, context).lower_(encoder)
    spill.let_go()
    interrupts.check()
    return make_encoder_pte(encoder, context, spill)


def _plans(request: ExportRequest) -> dict[str, PtePlan]:
    """By file name, the portable way to run experts first."""
    wanted = _moe_ops(request.options)
    config, name = request.checkpoint.config, request.file_name
    stem, suffix = name.rsplit(".", 1)
    return {
        f"{stem}_lfm2.{suffix}" if op is MoeOp.LFM2 else name: make_plan(
            config, request.scheme, moe_op=op, embedding_bits=_embedding_bits(request.options)
        )
        for op in wanted
    }


def plan_to_mix(config: ModelConfig, scheme: Scheme, options: Mapping[str, int | str]) -> PtePlan:
    """The plan of the first file, for those who choose widths: it takes what all files take.

    Raises:
        QuantizationError, ExportError, ResourceError: as ``estimate``.
    """
    first, *others = _moe_ops(options)
    plan = make_plan(
        config, scheme, moe_op=first, embedding_bits=_embedding_bits(options), also=others[0] if others else None
    )
    _, tables = _buffer_bytes(config, max_context(config, options))
    return replace(plan, table_bytes=tables)


def _embedding_bits(options: Mapping[str, int | str]) -> int | None:
    bits = options.get("embedding_bits")
    return bits if isinstance(bits, int) else None


def _moe_ops(options: Mapping[str, int | str]) -> tuple[MoeOp | None, ...]:
    """How experts are to run, in a file for each way; None: as the plan says."""
    offered, name = (MoeOp.STOCK, MoeOp.LFM2), options.get("moe_op")
    if name == BOTH:
        return offered
    if name is None:
        return (None,)
    if name not in offered:
        raise ExportError(f"--moe-op {name}: pass one of {', '.join(offered)} or {BOTH}")
    return (MoeOp(name),)
