"""Schemes as data: which format each kind of weight gets, and what runs in which dtype.

In: a scheme's name, and per weight what the family says of it. Out: the weight's format and the reason for it,
which goes into the manifest: no layer is left unquantized silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import EMBEDDING, HEAD, ModelTensor, TensorClass
from lfm2_export.messages import one_line, shown
from lfm2_export.quant.formats import FloatFormat, IntFormat, WeightFormat
from lfm2_export.registry import Registry
from lfm2_export.spelling import did_you_mean

# Of a pattern that a person types: as much of it is shown, and compared with the names.
_LONGEST_PATTERN = 120

NEVER_QUANTIZED: Mapping[TensorClass, str] = MappingProxyType(
    {
        TensorClass.ROUTER: "a router decides between experts, and a small error picks another one",
        TensorClass.EXPERT_BIAS: "expert biases decide between experts",
        TensorClass.SMALL: "norms, conv kernels and biases are small",
    }
)


_FORMAT_FIELDS = ("linear", "experts", "embedding", "head", "sensitive")


class FormatChoice(NamedTuple):
    """A weight's format, and why it is that one."""

    format: WeightFormat
    reason: str


class JudgedBy(StrEnum):
    """What the damage of a width was judged by."""

    WEIGHTS = "the weights alone"
    STATISTICS = "statistics of the layers' inputs"
    MEASUREMENT = "the KL divergence measured on a text"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How the widths of a scheme were chosen: ``within`` which budget, in words."""

    within: str
    judged_by: JudgedBy

    def __str__(self) -> str:
        return self.within if self.judged_by is JudgedBy.WEIGHTS else f"{self.within}, judged by {self.judged_by}"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Formats by class of weight, and how the program runs.

    ``embedding`` is also the head's where the two are tied. ``sensitive``: the format of the weights that match
    ``sensitive_patterns``, whatever their class; weights that match ``exclude`` stay in the activations' dtype.
    Patterns are published names with ``*`` and ``?`` as in a shell. ``accuracy_level``: MatMulNBits' and QMoE's, 4
    allows int8 activations inside the kernels. The state has the activations' dtype; logits are always float32.
    ``fits_groups``: where a format's group size divides no row, a backend may take a smaller one; else it refuses.
    ``choices``: the formats of single weights by their published names (``mixing``); only ``exclude`` goes before.
    ``mixed``: whether widths are chosen for each checkpoint where nobody asks for something else, within the size that
    it has without, if it ``keeps_size``; ``group_sizes``: from which; ``mixture``: how they were.
    ``preference`` orders programs where the caller names none: the lowest is taken.
    """

    name: str
    linear: WeightFormat
    experts: WeightFormat
    embedding: WeightFormat
    head: WeightFormat
    sensitive: WeightFormat
    activation_dtype: Literal["float32", "float16"]
    accuracy_level: Literal[0, 4]
    fits_groups: bool = False
    preference: int = 100
    sensitive_patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mixed: bool = False
    keeps_size: bool = False
    group_sizes: tuple[int, ...] = ()
    choices: Mapping[str, FormatChoice] = field(default_factory=dict, hash=False)
    mixture: Mixture | None = None

    @property
    def can_mix(self) -> bool:
        """Whether its linear layers have 4 bits and some of them may have 8, in groups of some sizes."""
        return bool(self.group_sizes) and [
            form.bits for form in (self.linear, self.sensitive) if isinstance(form, IntFormat)
        ] == [4, 8]

    @property
    def has_groups(self) -> bool:
        return bool(self._int_formats())

    def with_group_size(self, group_size: int) -> Scheme:
        """The scheme with every integer format in groups of ``group_size``, of 4 and of 8 bits, and in no others, but
        for those of whole rows.

        Raises:
            QuantizationError: the size is not supported, or the scheme has no groups.
        """
        changed: dict[str, Any] = {
            name: replace(format, group_size=group_size)
            for name, format in self._int_formats().items()
            if format.group_size is not None
        }
        if not changed:
            raise QuantizationError(f"scheme {self.name} has no groups; leave --group-size out")
        return replace(self, fits_groups=False, **changed)

    def with_exclude(self, patterns: Iterable[str]) -> Scheme:
        """The scheme with the weights that match ``patterns`` left in the activations' dtype."""
        return replace(self, exclude=(*self.exclude, *patterns))

    def format_for(self, tensor: ModelTensor) -> FormatChoice:
        """The format of a weight."""
        plain, kind = FloatFormat(dtype=self.activation_dtype), tensor.kind
        if kind in NEVER_QUANTIZED:
            return FormatChoice(plain, f"never quantized: {NEVER_QUANTIZED[kind]}")
        if pattern := _first_match(tensor.name, self.exclude):
            return FormatChoice(plain, f"excluded by --exclude {pattern}")
        if tensor.name in self.choices:
            return self.choices[tensor.name]
        if pattern := _first_match(tensor.name, self.sensitive_patterns):
            return FormatChoice(self.sensitive, f"sensitive: {pattern}")
        return FormatChoice(getattr(self, kind.value), f"scheme {self.name}: {kind.value}")

    def options(self) -> dict[str, Any]:
        """What the manifest says of the scheme beside its name."""
        formats = {name: getattr(self, name).to_json() for name in _FORMAT_FIELDS}
        return {"formats": formats, "sensitive": list(self.sensitive_patterns), "exclude": list(self.exclude)}

    def _int_formats(self) -> dict[str, IntFormat]:
        return {name: found for name in _FORMAT_FIELDS if isinstance(found := getattr(self, name), IntFormat)}


def check_patterns(patterns: Iterable[str], fqns: Iterable[str]) -> None:
    """Refuses ``--exclude`` patterns that match none of the weights: a typo would otherwise pass unseen.

    Raises:
        QuantizationError: with all such patterns.
    """
    names = list(fqns)
    idle = [pattern for pattern in patterns if not any(fnmatchcase(fqn, pattern) for fqn in names)]
    if idle:
        hints = "; ".join(dict.fromkeys(_hint(pattern[:_LONGEST_PATTERN], names) for pattern in idle[:2]))
        raise QuantizationError(f"--exclude {one_line(' '.join(idle), _LONGEST_PATTERN)}: matches no weight; {hints}")


def _hint(pattern: str, names: list[str]) -> str:
    """What may have been meant by a pattern that matches none of ``names``."""
    if fnmatchcase(HEAD, pattern):
        return f"the head is tied to the token table: exclude {EMBEDDING}"
    return f"closest to {one_line(pattern, 40)}: {', '.join(get_close_matches(pattern, names, n=3, cutoff=0.0))}"


def get_scheme(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        QuantizationError: there is none; the message lists those that are.
    """
    if name not in SCHEMES:
        raise QuantizationError(
            f"scheme {shown(name)} is unknown{did_you_mean(name, SCHEMES)}; known schemes: {', '.join(SCHEMES)}"
        )
    return SCHEMES[name]


def _first_match(fqn: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(fqn, pattern)), None)


def _float_scheme(name: str, dtype: Literal["float32", "float16"], preference: int) -> Scheme:
    plain = FloatFormat(dtype=dtype)
    return Scheme(
        name=name,
        linear=plain,
        experts=plain,
        embedding=plain,
        head=plain,
        sensitive=plain,
        activation_dtype=dtype,
        accuracy_level=0,
        preference=preference,
    )


# Measured on the bundled checkpoints (KL to fp32 over 6,144 held-out tokens, everything else as q4): the short
# convs' out_proj are a twentieth of the weights and a fifth to a quarter of the damage, more per byte than any
# other class but the mixture's few dense w2. Experts, half of the weights, do 4 % of it; the tied embedding in int8
# does 0 to 2 %.
Q4_SENSITIVE = ("*.conv.out_proj.weight",)


def _onnx_int_scheme(
    name: str, bits: Literal[4, 8], activations: Literal["float32", "float16"], preference: int
) -> Scheme:
    """Scales are float16 in the file; where activations are float32, a Cast in the graph restores them.

    In q4, 8-bit weights lose nothing in groups of 128, experts without zero points 1 % in groups of 64 (KL, measured on
    three models). In q8 rounding activations to int8 costs more than rounding weights, and onnxruntime's kernels do
    that in the weights' groups: tiny-moe loses 4.1e-4 in groups of 32, 6.0e-4 and 7.3e-4 in those of 64 and 128.
    WebGPU, for which q4f16 is meant, has its fast kernels for groups of 32, and its QMoE takes no zero points. So many
    small groups do not fit llama.cpp's Q4_K_M's bytes as well, so that it is mixed within its own."""
    wide, middle = (128, 64) if (bits, activations) == (4, "float32") else (32, 32)
    int8 = IntFormat(bits=8, group_size=wide, symmetric=True, signed_scale=True, scale_dtype="float16")
    linear = int8 if bits == 8 else IntFormat(bits=4, symmetric=False, scale_dtype="float16")
    return Scheme(
        name=name,
        linear=linear,
        experts=int8 if bits == 8 else replace(int8, bits=4, group_size=middle),
        embedding=int8,
        head=int8,
        sensitive=int8,
        activation_dtype=activations,
        accuracy_level=4,
        fits_groups=True,
        preference=preference,
        sensitive_patterns=Q4_SENSITIVE if bits == 4 else (),
        mixed=bits == 4,
        keeps_size=activations == "float16",
        group_sizes=() if bits == 8 else (16, 32, 64, 128, 256) if activations == "float32" else (32,),
    )


def _executorch_int4_scheme() -> Scheme:
    """Symmetric with positive scales: XNNPACK takes no others, and keeps them as bfloat16; it multiplies by 8 bits only
    with a scale for a whole row. Experts have float16 ones, which both operators for them hold exactly."""
    int8 = IntFormat(bits=8, symmetric=True)
    int4 = IntFormat(bits=4, symmetric=True, scale_dtype="bfloat16")
    return Scheme(
        name="8da4w",
        linear=int4,
        experts=replace(int4, scale_dtype="float16"),
        embedding=int8,
        head=int4,
        sensitive=replace(int8, group_size=None),
        activation_dtype="float32",
        accuracy_level=4,
        preference=1,
        keeps_size=True,
        group_sizes=(32, 64, 128, 256),
    )


# Smallest that keeps quality first; q4f16 is for WebGPU, so a CPU's runner takes it last.
SCHEMES: Registry[Scheme] = Registry(
    {
        scheme.name: scheme
        for scheme in (
            _float_scheme("fp32", "float32", preference=4),
            _float_scheme("fp16", "float16", preference=3),
            _onnx_int_scheme("q8", 8, "float32", preference=2),
            _onnx_int_scheme("q4", 4, "float32", preference=0),
            _onnx_int_scheme("q4f16", 4, "float16", preference=5),
            _executorch_int4_scheme(),
        )
    }
)
