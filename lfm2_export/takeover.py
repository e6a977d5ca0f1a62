"""What is quantized already stays as it is: a scheme's choices for a GGUF file or a checkpoint of packed weights.

In: a checkpoint with exact formats, and a scheme. Out: the scheme, with those formats for the tensors that have them;
all other tensors get the scheme's own, from the values that the file stands for.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import ModelTensor, TensorClass
from lfm2_export.mixing import MixRequest
from lfm2_export.quant.formats import IntFormat, ScaleDtype
from lfm2_export.quant.schemes import FormatChoice, Scheme

logger = logging.getLogger(__name__)


def check_nothing_chosen(checkpoint: Checkpoint, widths: MixRequest) -> None:
    """Refuses what would choose other widths than the file's.

    Raises:
        QuantizationError: a budget was given, or a text to measure widths on.
    """
    if widths.budget is not None or widths.text is not None:
        raise QuantizationError(
            f"{checkpoint.source.path.name}: is quantized already, and its widths are taken over; leave --target-bits, "
            "--target-size and --measure out, or export from the unquantized checkpoint"
        )


def taken_over(checkpoint: Checkpoint, scheme: Scheme, *, requantize_table: bool) -> Scheme:
    """The scheme with a choice for every tensor that can be stored as it is."""
    if not scheme.has_groups:
        return scheme
    choices, again = {}, []
    for name, there in checkpoint.exact_formats.items():
        tensor = checkpoint.model_tensors[name]
        if not isinstance(scheme.format_for(tensor).format, IntFormat):
            continue  # its values are stored as the numbers that they are
        if tensor.kind is TensorClass.EMBEDDING and requantize_table:
            continue
        if (form := _format(scheme, tensor, there)) is None:
            again.append(name)
            continue
        choices[name] = FormatChoice(form, f"taken over from {checkpoint.tensors[name].dtype}")
    if again:
        logger.warning(
            "%s: %d of its quantized tensors are quantized again, since scheme %s has no grid like theirs; the error "
            "of each is in the manifest",
            checkpoint.source.path.name,
            len(again),
            scheme.name,
        )
    return replace(scheme, sensitive_patterns=(), choices=choices)


def _format(scheme: Scheme, tensor: ModelTensor, there: IntFormat) -> IntFormat | None:
    """The format in which the scheme's operators hold a tensor of another one exactly; None where they cannot."""
    own = scheme.format_for(tensor).format
    assert isinstance(own, IntFormat)
    if own.symmetric and not own.signed_scale:
        return None  # XNNPACK takes no negative scales, which every second group of llama.cpp's has
    if tensor.kind is TensorClass.EXPERTS and not there.symmetric and scheme.activation_dtype == "float16":
        return None  # WebGPU's QMoE takes no zero points
    dtypes: list[ScaleDtype] = [own.scale_dtype, "float32"] if scheme.activation_dtype == "float32" else ["float16"]
    found = (replace(there, scale_dtype=dtype) for dtype in dtypes)
    return next((form for form in found if form.holds(there)), None)
