"""Hop 1: transformers' eager model against ours, both in fp32 with the checkpoint's weights. Did we write it right?

In: a checkpoint, our eager model of it, a text. Out: the largest difference of a logit over prefill, chunked prefill,
decode, batches and padding. Each side reads the checkpoint with its own code, so reading is compared as well.

Both do the same steps, since float32 sums depend on what is computed at once: by the order alone, decoded logits of 20
differ from prefilled ones by 1e-5. Padded rows are compared with transformers' logits of the same row alone (its own
decode after right padding is off by 8e-4, as its conv states take in the pads), and there the order does differ: twice
what it makes of transformers' own decode and prefill is allowed.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import CheckpointError, Lfm2ExportError
from lfm2_export.families.reference import ReferenceConfig
from lfm2_export.families.tensors import HEAD
from lfm2_export.messages import listed
from lfm2_export.models.decoder import Cache, DecoderForCausalLM
from lfm2_export.parity.control import find_control, one_row
from lfm2_export.parity.divergence import largest
from lfm2_export.parity.figures import LARGEST_LOGIT, MAX_ABS, Figure, Hop, scaled
from lfm2_export.parity.sample import Sample
from lfm2_export.source import BUNDLED
from lfm2_export.transformers_names import cache_name

BUNDLED_TOLERANCE = 1e-5
# Other checkpoints have more and wider layers, or random weights, whose sums differ more with their order.
TOLERANCE = 1e-4
TITLE = "transformers' eager model and ours, fp32"

TOKENS = 128
CHUNKS = (37, 1, 64, 2, 24)  # and what is left in one
EDGE = 32
PROMPT, STEPS = 24, 24
DECODE = (PROMPT, *[1] * STEPS)
# Rows of different length, prefilled in one batch and then decoded.
LENGTHS = (24, 17, 12)
FEW_STEPS = 8


def measure_model(ours: DecoderForCausalLM, checkpoint: Checkpoint, sample: Sample) -> Hop:
    """Compares the two; ``ours`` holds the checkpoint's weights and is unchanged afterwards."""
    beyond = (ours.config.sliding_window or 0) + EDGE  # behind the first position that a sliding layer forgets
    length = min(max(TOKENS, beyond), *(len(window.inputs) for window in sample.windows))
    ids = torch.from_numpy(np.stack([sample.prompt(length, index=index) for index in range(3)]))
    with torch.inference_mode():
        theirs = _theirs(checkpoint, ids)
        gc.collect()  # transformers' models refer to themselves; this one is a full copy of the weights
        general = scaled(TOLERANCE, theirs.full.abs().max().item())
        return _compare(ours, theirs, ids, BUNDLED_TOLERANCE if checkpoint.name in BUNDLED else general, general)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Theirs:
    """Transformers' logits [B, T, V] of three rows: at once, in chunks, and decoded; and of each row by itself, its
    first LENGTHS tokens at once and FEW_STEPS one by one."""

    full: Tensor
    chunked: Tensor
    decoded: Tensor
    alone: list[Tensor]
    cached: bool
    note: str | None = None

    @property
    def order(self) -> float:
        """How far its decode is from its own prefill; 0 where it cannot decode."""
        return _error(self.decoded, self.full[:, : self.decoded.shape[1]])


def _theirs(checkpoint: Checkpoint, ids: Tensor) -> _Theirs:
    """Loads transformers' model and lets it go."""
    reference = checkpoint.family.reference_config(checkpoint.raw_config)
    with _quiet():
        model: Any = _their_model(checkpoint, reference).eval()
        full = model(ids, use_cache=False).logits
        cached = bool(checkpoint.config.attention_layers)

        def parts(rows: Tensor, sizes: tuple[int, ...], expected: Tensor) -> Tensor:
            return _their_parts(model, rows, sizes) if cached else expected

        decoded = sum(DECODE)
        totals = [length + FEW_STEPS for length in LENGTHS]
        return _Theirs(
            full=full,
            chunked=parts(ids, _chunks(ids), full),
            decoded=parts(ids[:, :decoded], DECODE, full[:, :decoded]),
            alone=[
                parts(ids[row : row + 1, :total], (total - FEW_STEPS, *[1] * FEW_STEPS), full[row : row + 1, :total])[0]
                for row, total in enumerate(totals)
            ],
            cached=cached,
            note=None if reference is None else reference.note,
        )


def _their_model(checkpoint: Checkpoint, reference: ReferenceConfig | None) -> Any:
    """As transformers loads it; what it does not read or rounds (quantized weights, those with an adapter) is given to
    it."""
    _check_known(checkpoint.config.model_type)
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
    if checkpoint.is_plain:
        if reference is not None:
            options["config"] = _their_config(reference.raw)
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, local_files_only=True, **options)
    config = _their_config(reference.raw if reference is not None else checkpoint.raw_config)
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}
    for fused_name, fused in checkpoint.family.fused_tensors(checkpoint.config).items():
        whole = torch.empty(fused.shape)
        for name, part in fused.parts.items():
            whole[part.expert, part.start : part.stop] = state.pop(name)
        state[fused_name] = whole
    model.load_state_dict(state, strict=False)
    if missing := model.state_dict().keys() - state.keys() - {HEAD}:
        raise CheckpointError(f"transformers' model has tensors that the file has not: {listed(missing)}")
    return model


def _check_known(model_type: str) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        raise Lfm2ExportError(
            f"transformers {transformers.__version__} has no {model_type} to compare with; pip install "
            "'transformers>=5.23'"
        )


def _their_config(raw: Mapping[str, Any]) -> Any:
    fields = copy.deepcopy(dict(raw))  # the constructor writes into nested objects
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def _chunks(ids: Tensor) -> tuple[int, ...]:
    return (*CHUNKS, max(0, ids.shape[1] - sum(CHUNKS)))


def _their_parts(model: Any, ids: Tensor, sizes: tuple[int, ...]) -> Tensor:
    cache, logits = None, []
    for part in _split(ids, sizes):
        out = model(part, use_cache=True, **{cache_name(): cache})
        cache = out[cache_name()]
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def our_parts(model: DecoderForCausalLM, ids: Tensor, sizes: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Logits of all positions, part by part over the cache."""
    cache: Cache | None = None
    logits, done = [], 0
    for part in _split(ids, sizes):
        done += part.shape[1]
        out = model(part, attention_mask=None if mask is None else mask[:, :done], cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def _split(ids: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """In parts of these sizes, as far as the tokens go."""
    stops = [min(stop, ids.shape[1]) for stop in accumulate(sizes)]
    return [ids[:, start:stop] for start, stop in pairwise([0, *stops]) if start < stop]


def _compare(ours: DecoderForCausalLM, theirs: _Theirs, ids: Tensor, tolerance: float, greatest: float) -> Hop:
    cases: dict[str, Callable[[], float]] = {
        "prefill": lambda: _error(ours(ids[:1], use_cache=False).logits, theirs.full[:1]),
        "batch": lambda: _error(ours(ids, use_cache=False).logits, theirs.full),
        "chunked prefill": lambda: _error(our_parts(ours, ids, _chunks(ids)), theirs.chunked),
        "decode": lambda: _error(our_parts(ours, ids[:, : sum(DECODE)], DECODE), theirs.decoded),
        "left padding": lambda: _padded_error(ours, ids, theirs.alone, left=True),
        "right padding": lambda: _padded_error(ours, ids, theirs.alone, left=False),
    }
    tolerances = dict.fromkeys(cases, tolerance)
    tolerances["left padding"] = tolerances["right padding"] = max(tolerance, min(2 * theirs.order, greatest))
    figures = tuple(
        Figure(name=name, measure=MAX_ABS, value=measured(), tolerance=tolerances[name])
        for name, measured in cases.items()
    )
    control = find_control(ours, one_row(ours), cases["prefill"], measure=MAX_ABS, tolerance=tolerance)
    largest_logit = theirs.full.abs().max().item()
    return Hop(
        name="model",
        title=TITLE,
        figures=figures,
        controls=(control,),
        summary={"max_abs_error": largest(figure.value for figure in figures), "largest_logit": largest_logit},
        notes=_notes(theirs, largest_logit),
    )


def _notes(theirs: _Theirs, largest_logit: float) -> tuple[str, ...]:
    notes = [f"logits reach {largest_logit:.1f}", *filter(None, [theirs.note])]
    if largest_logit > LARGEST_LOGIT:
        notes.append(f"beyond {LARGEST_LOGIT:g} the tolerance grows with them")
    if theirs.cached:
        notes.append(f"transformers' decode differs from its own prefill by {theirs.order:.1e}")
    else:
        notes.append("transformers cannot decode without an attention layer; its full forward stands for every case")
    return tuple(notes)


def _padded_error(model: DecoderForCausalLM, ids: Tensor, alone: list[Tensor], *, left: bool) -> float:
    """Rows of different length in one batch, prefilled and then decoded, against each row alone."""
    width = max(LENGTHS)
    padded, mask = torch.zeros(3, width, dtype=ids.dtype), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, width) if left else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    following = [ids[row, length : length + FEW_STEPS] for row, length in enumerate(LENGTHS)]
    everything = torch.cat([padded, torch.stack(following)], dim=1)
    mask = torch.cat([mask, torch.ones(3, FEW_STEPS, dtype=torch.long)], dim=1)
    logits = our_parts(model, everything, (width, *[1] * FEW_STEPS), mask)
    return largest(_error(logits[row][mask[row].bool()], expected) for row, expected in enumerate(alone))


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar, its advice to install a kernel, and the warnings of what it imports."""
    bar = transformers.utils.logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        if bar:
            transformers.utils.logging.enable_progress_bar()
