"""Hop 2: our eager model with the artifact's own dequantized weights against the artifact in its runner.

In: that eager model and the program, both behind the Runner protocol, and a text. Out: how far their logits are apart
over prefill, chunked prefill, decode, rows of different length, every shipped graph, and all positions of the text.
Whatever quantization did to the weights is on both sides, so only lowering shows.

A program with float32 weights has to match to rounding errors and choose the same tokens. Other programs compute with
float16 or int8 activations, whose error is no defect: there the mean KL divergence over the text decides, and in each
case the median over a row's positions, which a wrong state or mask shifts and a rare token at a router's tie does
not. Where the kernels can be told to leave activations alone, the logits must match to rounding errors after all:
this is the comparison that finds a single wrong value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lfm2_export.backends import Backend, FullPrecision
from lfm2_export.backends.base import Runner, RunnerOptions
from lfm2_export.manifest import Program
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.parity.control import find_control, one_norm, one_row
from lfm2_export.parity.divergence import Divergence, compare, largest, max_abs_error
from lfm2_export.parity.figures import FULL_PRECISION, GREEDY, KL, MAX_ABS, Control, Figure, Hop, scaled
from lfm2_export.parity.sample import Sample, Window

TITLE = "our eager model with the artifact's weights and the artifact in its runner"
MAX_ABS_TOLERANCE = 1e-4
FLOAT16_KL_TOLERANCE = 1e-4
GREEDY_TOKENS = 64

PREFILLS = (1, 2, 3, 7, 16, 33, 64, 90)
CHUNK_SIZES = (7, 24)
RAGGED = (1, 40, 9, 23)
STEPS = 64
FEW_STEPS = 16
# Of the text's windows, what the controls and the comparison at full precision look at.
FEW_WINDOWS = 2

# Logits [positions, V] of each prompt or row.
Groups = list[np.ndarray]
Case = Callable[[Runner], Groups]


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """How a program's logits are judged: by the largest difference, or by KL divergence."""

    measure: str
    tolerance: float

    @classmethod
    def of(cls, program: Program, backend: Backend) -> Yardstick:
        """What the dtypes of a program's weights and activations allow."""
        dtypes = {tensor.dtype for tensor in program.tensors}
        dtypes |= {tensor.dtype for tensor in program.cache.tensors}
        if dtypes == {"float32"}:
            return cls(measure=MAX_ABS, tolerance=MAX_ABS_TOLERANCE)
        quantized = any(dtype.startswith("int") for dtype in dtypes)
        return cls(measure=KL, tolerance=backend.KL_TOLERANCE if quantized else FLOAT16_KL_TOLERANCE)

    @property
    def exact(self) -> bool:
        return self.measure == MAX_ABS

    def for_logits(self, largest_logit: float) -> Yardstick:
        return replace(self, tolerance=scaled(self.tolerance, largest_logit)) if self.exact else self

    def figure(self, name: str, expected: Groups, found: Groups) -> Figure:
        """One case: the largest difference, or the worst row's median divergence."""
        if self.exact:
            value = largest(max_abs_error(a, b) for a, b in zip(expected, found, strict=True))
        else:
            pairs = zip(expected, found, strict=True)
            value = largest(float(np.median(compare(a, b).kl)) for a, b in pairs)
        return Figure(name=name, measure=self.measure, value=value, tolerance=self.tolerance)

    def over_text(self, divergence: Divergence) -> float:
        return divergence.max_abs_error if self.exact else divergence.mean_kl


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The two models, and how to get at the program's other graphs."""

    eager: Runner
    model: DecoderForCausalLM
    runner: Runner
    backend: Backend
    folder: Path
    program: Program
    threads: int | None

    def other_graphs(self) -> dict[str, Program]:
        """Every graph that is shipped and runs here, as a program of its own; ``score`` compares those that score."""
        graphs = self.backend.runnable_graphs(self.program)
        return graphs if len(graphs) > 1 else {}


def measure_lowering(subject: Subject, sample: Sample, text: Divergence, scored: Sequence[np.ndarray]) -> Hop:
    """The whole hop.

    Args:
        text: the eager model against the runner over all windows.
        scored: the runner's logits of the first FEW_WINDOWS windows.
    """
    windows = sample.windows[:FEW_WINDOWS]
    largest_logit = max(float(np.abs(logits).max()) for logits in scored)
    yardstick = Yardstick.of(subject.program, subject.backend).for_logits(largest_logit)
    figures = [_over_text(yardstick, text)]
    for name, case in _cases(sample, subject.runner).items():
        figures.append(yardstick.figure(name, case(subject.eager), case(subject.runner)))
    figures += _graph_figures(subject, sample, yardstick)
    if subject.runner.can_score:
        figures.append(_scoring_figure(subject.runner, sample, yardstick))
    figures.append(_greedy_figure(subject, sample, yardstick))
    controls = [_control(subject, windows, scored, yardstick)]
    precise = subject.backend.score_at_full_precision(
        subject.folder, subject.program, [window.inputs for window in windows], threads=subject.threads
    )
    if precise is not None:
        figure, control = _full_precision(subject, windows, precise, largest_logit)
        figures.append(figure)
        controls.append(control)
    return Hop(
        name="lowering", title=TITLE, figures=tuple(figures), controls=tuple(controls), summary=_summary(figures, text)
    )


def _summary(figures: Sequence[Figure], text: Divergence) -> dict[str, float]:
    """``max_abs_error`` only of kernels that leave activations alone: of others it says how a rare token fared."""
    exact = [figure.value for figure in figures if figure.measure == MAX_ABS]
    summary = {"kl": text.mean_kl, "top1_agreement": text.top1_agreement}
    return {"max_abs_error": largest(exact), **summary} if exact else summary


def _over_text(yardstick: Yardstick, text: Divergence) -> Figure:
    return Figure(
        name=f"text, {text.count} positions",
        measure=yardstick.measure,
        value=yardstick.over_text(text),
        tolerance=yardstick.tolerance,
    )


def _cases(sample: Sample, runner: Runner) -> dict[str, Case]:
    cases: dict[str, Case] = {
        "prefill": lambda r: [np.concatenate([_prefill(r, sample.prompt(n)) for n in PREFILLS])],
        "chunked prefill": lambda r: [_chunked(r, sample, size) for size in CHUNK_SIZES],
        "decode": lambda r: _decode(r, [sample.prompt(4 + STEPS)], [4]),
    }
    if runner.max_batch_size is None or runner.max_batch_size >= len(RAGGED):
        rows = [sample.prompt(length + FEW_STEPS, index=index) for index, length in enumerate(RAGGED)]
        cases["rows of different length"] = lambda r: _decode(r, rows, RAGGED)
    return cases


def _prefill(runner: Runner, prompt: np.ndarray) -> np.ndarray:
    runner.reset()
    return runner.prefill([prompt])


def _chunked(runner: Runner, sample: Sample, chunk_size: int) -> np.ndarray:
    """A prompt in chunks, then some decode steps on the state that this left."""
    tokens = sample.prompt(64 + FEW_STEPS)
    runner.reset()
    logits = [runner.prefill([tokens[:64]], chunk_size=chunk_size)]
    logits += [runner.decode(tokens[step : step + 1]) for step in range(64, 64 + FEW_STEPS)]
    return np.concatenate(logits)


def _decode(runner: Runner, rows: Sequence[np.ndarray], lengths: Sequence[int]) -> Groups:
    """Prefills the first ``lengths[b]`` tokens of each row and feeds it the others one by one."""
    runner.reset(len(rows))
    logits = [runner.prefill([row[:length] for row, length in zip(rows, lengths, strict=True)])]
    for step in range(len(rows[0]) - lengths[0]):
        logits.append(runner.decode([int(row[length + step]) for row, length in zip(rows, lengths, strict=True)]))
    stacked = np.stack(logits, axis=1)
    return list(stacked)


def _graph_figures(subject: Subject, sample: Sample, yardstick: Yardstick) -> list[Figure]:
    """Every graph by itself: a runtime other than our runner may open another one than we do."""
    rows = [sample.prompt(16 + FEW_STEPS, index=1)]
    figures = []
    for name, program in subject.other_graphs().items():
        runner = subject.backend.load_runner(subject.folder, program, RunnerOptions(threads=subject.threads))
        figures.append(yardstick.figure(name, _decode(subject.eager, rows, [16]), _decode(runner, rows, [16])))
    return figures


def _scoring_figure(runner: Runner, sample: Sample, yardstick: Yardstick) -> Figure:
    """The graph with the logits of every position against the one that is shipped, on the same prompts."""
    shipped, scored = [], []
    for length in PREFILLS:
        prompt = sample.prompt(length)
        shipped.append(_prefill(runner, prompt))
        runner.reset()
        scored.append(runner.prefill_scored([prompt])[0][-1:])
    strict = yardstick if yardstick.exact else replace(yardstick, tolerance=FLOAT16_KL_TOLERANCE)
    return strict.figure("scoring graph and shipped graph", shipped, scored)


def _greedy_figure(subject: Subject, sample: Sample, yardstick: Yardstick) -> Figure:
    """How many of the eager model's greedy tokens the program would have said in their place, given those before: a
    tie that falls the other way counts once, not for all that follows."""
    prompt = sample.prompt(16)
    expected = greedy(subject.eager, prompt)
    equal = int(np.equal(expected, likeliest_after(subject.runner, prompt, expected)).sum())
    return Figure(
        name=f"greedy decoding of {len(expected)}",
        measure=GREEDY,
        value=float(equal),
        tolerance=float(len(expected)) if yardstick.exact else None,
        at_least=True,
    )


def greedy(runner: Runner, prompt: np.ndarray, count: int = GREEDY_TOKENS) -> list[int]:
    """The most likely tokens after ``prompt``, whatever they are; as many as the context holds."""
    runner.reset()
    logits = runner.prefill([prompt])
    tokens = [int(logits[0].argmax())]
    while len(tokens) < min(count, runner.context_length - len(prompt)):
        logits = runner.decode(tokens[-1:])
        tokens.append(int(logits[0].argmax()))
    return tokens


def likeliest_after(runner: Runner, prompt: np.ndarray, tokens: Sequence[int]) -> list[int]:
    """The most likely token in the place of each of ``tokens``, after ``prompt`` and those before it."""
    runner.reset()
    found = [int(runner.prefill([prompt])[0].argmax())]
    found += [int(runner.decode([token])[0].argmax()) for token in tokens[:-1]]
    return found


def score(runner: Runner, window: Window) -> np.ndarray:
    """Logits of every position of a window, float32 [T, V]; step by step where the program has no scoring graph."""
    runner.reset()
    if runner.can_score:
        return runner.prefill_scored([window.inputs])[0]
    logits = [runner.prefill([window.inputs[:1]])]
    logits += [runner.decode([int(token)]) for token in window.inputs[1:]]
    return np.concatenate(logits)


def _control(
    subject: Subject, windows: Sequence[Window], scored: Sequence[np.ndarray], yardstick: Yardstick
) -> Control:
    """The text's figure, on few windows, with the eager model's weights changed."""

    def measured() -> float:
        parts = (compare(score(subject.eager, w), logits) for w, logits in zip(windows, scored, strict=True))
        return yardstick.over_text(Divergence.joined(parts))

    perturbation = one_row(subject.model) if yardstick.exact else one_norm(subject.model)
    return find_control(subject.model, perturbation, measured, measure=yardstick.measure, tolerance=yardstick.tolerance)


def _full_precision(
    subject: Subject, windows: Sequence[Window], precise: FullPrecision, largest_logit: float
) -> tuple[Figure, Control]:
    exact = Yardstick(measure=MAX_ABS, tolerance=MAX_ABS_TOLERANCE).for_logits(largest_logit)
    yardstick = exact if precise.exact else Yardstick(measure=KL, tolerance=FLOAT16_KL_TOLERANCE)
    expected = [score(subject.eager, window) for window in windows]
    text = Divergence.joined(compare(a, b) for a, b in zip(expected, precise.logits, strict=True))
    figure = Figure(
        name=f"{FULL_PRECISION}, {text.count} positions",
        measure=yardstick.measure,
        value=yardstick.over_text(text),
        tolerance=yardstick.tolerance,
    )
    return figure, _control(subject, windows, precise.logits, yardstick)
