"""The three hops of an encoder: vectors in the place of logits, cosines in the place of KL divergence.

In: an artifact of an encoder and its checkpoint. Out: hops.

    1 model          our eager model, padded on either side, and each row alone: transformers has no class to compare
                     with, so that the tests compare with one that they spell out (tests/models/test_encoder.py)
    2 lowering       ours with the artifact's weights and the artifact, row by row and in padded batches
    3 quantization   the checkpoint's model and the artifact

Every output of the program is compared; a program with float32 weights has to match to rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lfm2_export.backends import get_backend
from lfm2_export.backends.base import RunnerOptions
from lfm2_export.backends.encoder import EncoderRunner
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.heads import ATTENDED, HIDDEN, LOGITS, PADDING, SENTENCE
from lfm2_export.manifest import Program
from lfm2_export.models.lfm2_bidirectional import Lfm2BidirectionalModel
from lfm2_export.models.loading import load_encoder_model
from lfm2_export.parity.control import find_control, one_norm, one_row
from lfm2_export.parity.figures import COSINE, COSINE_DISTANCE, TOP1, VECTOR_ERROR, Control, Figure, Hop
from lfm2_export.parity.report import ProgramParity
from lfm2_export.parity.sample import Sample
from lfm2_export.parity.storage import ComparedWeights

MAX_ABS_TOLERANCE = 1e-5
# Up to this size of an output's values its tolerance is absolute; beyond it grows with them, as float32's own spacing
# does: hidden states of 20 leave 1.1e-5 (.pte), normalized vectors 2e-7.
LARGEST_VALUE = 8.0
# Mean 1 - cosine that float16 and int8 activations may leave. A trained model of 256 values a token: 1e-7 for fp16,
# 1.2e-4 for q4 (onnx), 2.3e-4 for 8da4w.
FLOAT16_DISTANCE, INT8_DISTANCE = 1e-5, 1e-3
# Mean 1 - cosine to the checkpoint in fp32, by the narrowest weights. The same model: 1e-7 for fp16, 6.4e-5 for q8,
# 1.9e-3 for q4, 4.1e-3 for 8da4w.
QUANTIZATION = {"float32": 1e-6, "float16": 1e-5, "int8": 1e-3, "int4": 2e-2}
# Tokens of the rows that are compared, over and over: each window of the text is cut to the next of these.
LENGTHS = (512, 1, 130, 17, 300, 64, 2, 96)
BATCH = 4

Row = Mapping[str, np.ndarray]
Rows = Sequence[Row]


def measure(
    folder: Path,
    programs: Sequence[Program],
    checkpoint: Checkpoint,
    sample: Sample,
    threads: int | None,
    progress: Callable[[str], None],
) -> tuple[Hop, tuple[ProgramParity, ...]]:
    """Hop 1, and hops 2 and 3 of each program."""
    rows = [window.inputs[: LENGTHS[i % len(LENGTHS)]] for i, window in enumerate(sample.windows)]
    rows += [sample.prompt(length, index=i) for i, length in enumerate(LENGTHS[1:])]
    progress("model: padding")
    model = load_encoder_model(checkpoint)
    reference = eager(model, rows)
    hop = _model_hop(model, rows, reference)
    del model
    measured = []
    for program in programs:
        progress(f"{program}: lowering and quantization")
        measured.append(_measure_program(folder, program, checkpoint, sample, rows, reference, threads))
    return hop, tuple(measured)


@torch.no_grad()
def eager(model: Lfm2BidirectionalModel, rows: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The eager model's outputs of each row alone."""
    outputs = (model(torch.from_numpy(row)[None]).named() for row in rows)
    return [{name: value[0].numpy() for name, value in one.items()} for one in outputs]


def padded(rows: Sequence[np.ndarray], *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a batch of one length, with noise where there is no token, and its mask."""
    longest = max(map(len, rows))
    ids = np.random.default_rng(0).integers(0, 2, (len(rows), longest))
    mask = np.full((len(rows), longest), PADDING, np.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[index, place], mask[index, place] = row, ATTENDED
    return ids, mask


def unpadded(outputs: Row, mask: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The outputs of a batch row by row, without padding."""
    return [
        {name: value[i] if name == SENTENCE else value[i][mask[i] != PADDING] for name, value in outputs.items()}
        for i in range(len(mask))
    ]


def _model_hop(model: Lfm2BidirectionalModel, rows: Sequence[np.ndarray], alone: Rows) -> Hop:
    """Padding changes nothing, whatever stands in it; attended to, it does."""
    few, expected = rows[:BATCH], alone[:BATCH]

    def batch(*, left: bool, attended: bool = False) -> Rows:
        ids, mask = padded(few, left=left)
        with torch.no_grad():
            outputs = model(torch.from_numpy(ids), None if attended else torch.from_numpy(mask)).named()
        return unpadded({name: one.numpy() for name, one in outputs.items()}, mask)

    sides = {side: batch(left=side == "left") for side in ("left", "right")}
    figures = tuple(
        Figure(
            name=f"{name}, {side} padding",
            measure=VECTOR_ERROR,
            value=max_abs_error(found, expected, name),
            tolerance=_tolerance(expected, name),
        )
        for side, found in sides.items()
        for name in expected[0]
    )
    name = vectors(expected[0])
    control = Control(
        change="padding attended to",
        measure=VECTOR_ERROR,
        value=max_abs_error(batch(left=False, attended=True), expected, name),
        tolerance=_tolerance(expected, name),
    )
    return Hop(
        name="model",
        title="our eager model, rows padded in a batch and each alone",
        figures=figures,
        controls=(control,),
        summary={"max_abs_error": max(figure.value for figure in figures)},
        notes=("transformers has no class of this model: the tests compare with a spelled-out one",),
    )


def _measure_program(
    folder: Path,
    program: Program,
    checkpoint: Checkpoint,
    sample: Sample,
    rows: Sequence[np.ndarray],
    reference: Rows,
    threads: int | None,
) -> ProgramParity:
    backend = get_backend(program.backend)
    weights = ComparedWeights(backend.stored_weights(folder, program, checkpoint.config), checkpoint)
    model = load_encoder_model(weights)
    runner = backend.load_encoder(folder, program, RunnerOptions(threads=threads))
    found = [_alone(runner, row) for row in rows]
    lowering = _lowering_hop(program, model, runner, rows, found)
    return ProgramParity(
        program=program,
        lowering=lowering,
        quantization=_quantization_hop(program, model, sample, weights, rows, reference, found),
    )


def _alone(runner: EncoderRunner, row: np.ndarray) -> Row:
    ids, mask = padded([row], left=False)
    return unpadded(runner.run(ids, mask), mask)[0]


@dataclass(frozen=True, kw_only=True)
class _Yardstick:
    """By what an output of two models is compared, and how far it may be apart."""

    output: str
    measure: str
    tolerance: float

    @classmethod
    def of(cls, program: Program, expected: Rows, output: str) -> _Yardstick:
        dtypes = {tensor.dtype for tensor in program.tensors}
        if dtypes == {"float32"}:
            return cls(output=output, measure=VECTOR_ERROR, tolerance=_tolerance(expected, output))
        tolerance = FLOAT16_DISTANCE if dtypes <= {"float32", "float16"} else INT8_DISTANCE
        return cls(output=output, measure=COSINE_DISTANCE, tolerance=tolerance)

    def __call__(self, found: Rows, expected: Rows) -> float:
        if self.measure == VECTOR_ERROR:
            return max_abs_error(found, expected, self.output)
        return float(cosine_distances(found, expected, self.output).mean())

    def figure(self, case: str, found: Rows, expected: Rows) -> Figure:
        return Figure(
            name=f"{self.output}, {case}",
            measure=self.measure,
            value=self(found, expected),
            tolerance=self.tolerance,
        )


def _lowering_hop(
    program: Program,
    model: Lfm2BidirectionalModel,
    runner: EncoderRunner,
    rows: Sequence[np.ndarray],
    found: Rows,
) -> Hop:
    expected = eager(model, rows)
    cases = {f"text of {sum(map(len, rows))} positions": found}
    for side in ("left", "right"):
        ids, mask = padded(rows[:BATCH], left=side == "left")
        cases[f"{side} padding"] = unpadded(runner.run(ids, mask), mask)
    yardsticks = {name: _Yardstick.of(program, expected, name) for name in expected[0]}
    name = vectors(expected[0])
    yardstick = yardsticks[name]
    control = find_control(
        model,
        one_row(model) if yardstick.measure == VECTOR_ERROR else one_norm(model),
        lambda: yardstick(found[:BATCH], eager(model, rows[:BATCH])),
        measure=yardstick.measure,
        tolerance=yardstick.tolerance,
    )
    return Hop(
        name="lowering",
        title="our eager model with the artifact's weights and the artifact in its runner",
        figures=tuple(
            one.figure(case, outputs, expected[: len(outputs)])
            for case, outputs in cases.items()
            for one in yardsticks.values()
        ),
        controls=(control,),
        summary={
            "max_abs_error": max_abs_error(found, expected, name),
            "cosine_distance": float(cosine_distances(found, expected, name).mean()),
        },
    )


def _quantization_hop(
    program: Program,
    model: Lfm2BidirectionalModel,
    sample: Sample,
    weights: ComparedWeights,
    rows: Sequence[np.ndarray],
    reference: Rows,
    found: Rows,
) -> Hop:
    name = vectors(reference[0])
    distances = cosine_distances(found, reference, name)
    tolerance = tolerance_of(program)

    def perturbed() -> float:
        return float(cosine_distances(eager(model, rows[:BATCH]), reference[:BATCH], name).mean())

    figures = [
        Figure(
            name=f"{name}, mean of {len(distances)}",
            measure=COSINE_DISTANCE,
            value=distances.mean(),
            tolerance=tolerance,
        ),
        Figure(name=f"{name}, mean", measure=COSINE, value=1 - distances.mean()),
        Figure(name=f"{name}, least", measure=COSINE, value=1 - distances.max()),
        *_agreement(found, reference),
        *weights.figures(),
    ]
    control = find_control(model, one_norm(model), perturbed, measure=COSINE_DISTANCE, tolerance=tolerance)
    return Hop(
        name="quantization",
        title="the checkpoint in fp32 and the artifact",
        figures=tuple(figures),
        controls=(weights.control(one_row(model)), control),
        summary={
            "cosine": float(1 - distances.mean()),
            "least_cosine": float(1 - distances.max()),
            "weight_error": {dtype: worst.error for dtype, worst in sorted(weights.worst().items())},
            "tokens": sum(map(len, rows)),
            "text": sample.description,
        },
    )


def _agreement(found: Rows, reference: Rows) -> list[Figure]:
    """Of an encoder for masked text: how often the most likely token is the same."""
    if LOGITS not in reference[0]:
        return []
    same = [one[LOGITS].argmax(-1) == other[LOGITS].argmax(-1) for one, other in zip(found, reference, strict=True)]
    return [Figure(name="most likely token", measure=TOP1, value=float(np.concatenate(same).mean()))]


def tolerance_of(program: Program) -> float:
    """Of the mean distance to the checkpoint, by the narrowest weights."""
    return max(QUANTIZATION[tensor.dtype] for tensor in program.tensors)


def vectors(row: Row) -> str:
    """The output that users of an encoder take: the last one, but of one for masked text its hidden states."""
    name = list(row)[-1]
    return HIDDEN if name == LOGITS else name


def max_abs_error(found: Rows, expected: Rows, name: str) -> float:
    """The largest difference between any values of an output; NaN where there is one."""
    return float(np.max([np.abs(one[name] - other[name]).max() for one, other in zip(found, expected, strict=True)]))


def cosine_distances(found: Rows, expected: Rows, name: str) -> np.ndarray:
    """1 - cosine of each vector of an output, float64."""
    one, other = (
        np.concatenate([np.atleast_2d(row[name]) for row in rows]).astype(np.float64) for rows in (found, expected)
    )
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    distances: np.ndarray = 1 - (one * other).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return distances


def _tolerance(expected: Rows, name: str) -> float:
    largest = max(float(np.abs(row[name]).max()) for row in expected)
    return MAX_ABS_TOLERANCE * max(1.0, largest / LARGEST_VALUE)
