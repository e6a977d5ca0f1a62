"""Hop 3: the checkpoint's model in fp32 against the artifact. What did quantization cost?

In: both models' logits over the text and both models' weights. Out: KL divergence, agreement of the top token, the
perplexity of both, the worst row of the stored weights. What integer weights cost depends on the model and is reported
without a verdict; what is judged is whether every row is as near to the checkpoint's as its format allows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lfm2_export.manifest import Program
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.parity.control import find_control, one_norm, one_row
from lfm2_export.parity.divergence import Divergence
from lfm2_export.parity.figures import KL, PERPLEXITY, TOP1, Figure, Hop
from lfm2_export.parity.sample import Sample
from lfm2_export.parity.storage import ComparedWeights

TITLE = "the checkpoint in fp32 and the artifact"
# Of a program whose weights are all floats, by the narrowest of them.
KL_TOLERANCES = {"float16": 1e-3, "float32": 1e-6}
_CURVE_POINTS = 64


def measure_quantization(
    program: Program,
    model: DecoderForCausalLM,
    sample: Sample,
    text: Divergence,
    weights: ComparedWeights,
    perturbed_kl: Callable[[], float],
) -> Hop:
    """The whole hop.

    Args:
        model: the eager model that ``perturbed_kl`` compares with the checkpoint's logits.
        text: the checkpoint's model against the program over all windows.
        weights: what ``model`` was loaded from.
    """
    tolerance = tolerance_of(program)
    figures = (
        Figure(name=f"text, {text.count} positions", measure=KL, value=text.mean_kl, tolerance=tolerance),
        Figure(name="most likely token", measure=TOP1, value=text.top1_agreement),
        Figure(name="checkpoint in fp32", measure=PERPLEXITY, value=text.reference_perplexity),
        Figure(name="artifact", measure=PERPLEXITY, value=text.perplexity),
        *weights.figures(),
    )
    controls = [weights.control(one_row(model))]
    if tolerance is not None:
        controls.append(find_control(model, one_norm(model), perturbed_kl, measure=KL, tolerance=tolerance))
    return Hop(
        name="quantization",
        title=TITLE,
        figures=figures,
        controls=tuple(controls),
        summary={
            "kl": text.mean_kl,
            "kl_standard_error": float(text.kl.std() / np.sqrt(text.count)),
            "top1_agreement": text.top1_agreement,
            "perplexity": text.perplexity,
            "reference_perplexity": text.reference_perplexity,
            "max_abs_error": text.max_abs_error,
            "weight_error": {dtype: worst.error for dtype, worst in sorted(weights.worst().items())},
            "tokens": text.count,
            "text": sample.description,
        },
        curve=_curve(sample, text.kl),
    )


def tolerance_of(program: Program) -> float | None:
    """None where a weight is an integer."""
    dtypes = {tensor.dtype for tensor in program.tensors}
    if dtypes - KL_TOLERANCES.keys():
        return None
    return max(KL_TOLERANCES[dtype] for dtype in dtypes)


def _curve(sample: Sample, kl: np.ndarray) -> tuple[float, ...]:
    """Mean KL by position in a window, in at most _CURVE_POINTS bins."""
    length = len(sample.windows[0].inputs)
    by_position = kl[: len(kl) // length * length].reshape(-1, length).mean(axis=0)
    bins = np.array_split(by_position, min(_CURVE_POINTS, length))
    return tuple(float(part.mean()) for part in bins)
