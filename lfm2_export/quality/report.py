"""The figures of a comparison, and which of the models are worth their bytes.

In: per model the divergence at each position, by window, and its bytes. Out: ``Quality`` and ``QualityReport``, plain
numbers with a JSON form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lfm2_export import notebook
from lfm2_export.parity.divergence import Divergence
from lfm2_export.resources import human_bytes

_COLUMNS = (
    "model",
    "kind",
    "KL",
    "± of the mean",
    "KL, 99 %",
    "same top token",
    "perplexity",
    "weights",
    "bits",
    "bits, step",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of a model's weights, and how many weights these are: all, and those that a decode step reads."""

    file_bytes: int
    file_weights: int
    step_bytes: int
    step_weights: int

    @property
    def file_bits(self) -> float:
        return 8 * self.file_bytes / self.file_weights

    @property
    def step_bits(self) -> float:
        return 8 * self.step_bytes / self.step_weights


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One model. ``kl`` in nats is the mean over positions, ``kl_error`` its standard error, from the means of windows
    (positions next to each other are not independent), ``kl_p99`` the 99th percentile. ``errors``: of each stored
    tensor relative to the checkpoint's, where its record says so. ``same_experts``: by layer of a mixture, the share of
    tokens that its router, with the stored weights in fp32, sends to the same experts as the checkpoint's."""

    name: str
    kind: str
    kl: float
    kl_error: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    size: Size
    errors: Mapping[str, float]
    same_experts: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        kind: str,
        windows: Sequence[Divergence],
        size: Size,
        errors: Mapping[str, float] | None = None,
        same_experts: Mapping[int, float] | None = None,
    ) -> Quality:
        whole = Divergence.joined(windows)
        return cls(
            name=name,
            kind=kind,
            kl=whole.mean_kl,
            kl_error=_standard_error(windows),
            kl_p99=float(np.quantile(whole.kl, 0.99)),
            top1_agreement=whole.top1_agreement,
            perplexity=whole.perplexity,
            size=size,
            errors=errors or {},
            same_experts=same_experts or {},
        )

    def row(self) -> tuple[str, ...]:
        """The figures as a table shows them; of a mixture one more."""
        shown = (
            self.name,
            self.kind,
            f"{self.kl:.2e}",
            "" if math.isnan(self.kl_error) else f"{self.kl_error:.1e}",
            f"{self.kl_p99:.2e}",
            f"{self.top1_agreement:.2%}",
            f"{self.perplexity:.3f}",
            human_bytes(self.size.file_bytes),
            f"{self.size.file_bits:.2f}",
            f"{self.size.step_bits:.2f}",
        )
        return shown if self.mean_same_experts is None else (*shown, f"{self.mean_same_experts:.2%}")

    @property
    def mean_same_experts(self) -> float | None:
        """Over the layers; None for a dense model."""
        return sum(self.same_experts.values()) / len(self.same_experts) if self.same_experts else None


def _standard_error(windows: Sequence[Divergence]) -> float:
    """NaN for a single window, which says nothing of it."""
    means = np.array([window.mean_kl for window in windows])
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """``perplexity`` is the checkpoint's own in fp32."""

    checkpoint: str
    text: str
    tokens: int
    perplexity: float
    models: tuple[Quality, ...]
    versions: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of ``rows``: of a mixture one more."""
        return (
            _COLUMNS if all(model.mean_same_experts is None for model in self.models) else (*_COLUMNS, "same experts")
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The figures of every model as a table shows them."""
        return [model.row() for model in self.models]

    def __repr__(self) -> str:
        models = ", ".join(f"{model.name}: KL {model.kl:.2e}" for model in self.models)
        return f"QualityReport({self.checkpoint}, {self.tokens} tokens: {models})"

    def _repr_html_(self) -> str:
        return notebook.table(f"{self.checkpoint}: {self.text}", self.columns, self.rows())

    def frontier(self) -> tuple[Quality, ...]:
        """The models that no other one beats in both KL and bytes of the file, smallest first."""
        found: list[Quality] = []
        for model in sorted(self.models, key=lambda model: (model.size.file_bytes, model.kl)):
            if not found or model.kl < found[-1].kl:
                found.append(model)
        return tuple(found)

    def above(self, greatest_kl: float) -> tuple[Quality, ...]:
        """The models whose KL is greater, or no number."""
        return tuple(model for model in self.models if not model.kl <= greatest_kl)

    def to_json(self) -> dict[str, Any]:
        models = [
            {**asdict(model), "file_bits": model.size.file_bits, "step_bits": model.size.step_bits}
            for model in self.models
        ]
        return {
            "checkpoint": self.checkpoint,
            "text": self.text,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "models": models,
            "frontier": [model.name for model in self.frontier()],
            "versions": dict(self.versions),
        }
