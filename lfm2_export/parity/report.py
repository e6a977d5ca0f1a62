"""The result of ``measure_parity``: verdicts for programs, as JSON, as rows of a table, as lines.

In: hops. Out: what the CLI prints and the manifest records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lfm2_export import notebook
from lfm2_export.manifest import DECODER, ENCODER, Program
from lfm2_export.parity.figures import FULL_PRECISION, KL, Hop, finite


@dataclass(frozen=True, kw_only=True)
class ProgramParity:
    """Hops 2 and 3 of one program."""

    program: Program
    lowering: Hop
    quantization: Hop

    @property
    def hops(self) -> tuple[Hop, Hop]:
        return self.lowering, self.quantization

    @property
    def passed(self) -> bool:
        return all(hop.passed for hop in self.hops)

    @property
    def cost(self) -> str:
        """What quantization costs: a KL divergence, or an encoder's cosine to the model in fp32."""
        summary = self.quantization.summary
        return f"{summary['kl']:.1e}" if self.program.kind == DECODER else f"{summary['cosine']:.6f}"

    @property
    def only_int8_activations(self) -> bool:
        """Whether nothing but divergences of the shipped kernels is too large, while the same graph is right where
        they compute at full precision."""
        exact = [figure.passed for figure in self.lowering.figures if figure.name.startswith(FULL_PRECISION)]
        failed = {figure.measure for hop in self.hops for figure in hop.figures if not figure.passed}
        return bool(exact) and all(exact) and failed == {KL}

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.program.backend,
            "scheme": self.program.scheme,
            "passed": self.passed,
            "lowering": self.lowering.to_json(),
            "quantization": self.quantization.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything that was measured. ``text`` says in words on what."""

    COLUMNS: ClassVar[tuple[str, ...]] = ("program", "hop", "compared", "figure", "tolerance", "verdict")

    artifact: str
    checkpoint: str
    text: str
    model: Hop
    programs: tuple[ProgramParity, ...]
    versions: Mapping[str, str]

    def __repr__(self) -> str:
        programs = ", ".join(str(measured.program) for measured in self.programs)
        verdict = "passed" if self.passed else f"{len(self.failures())} figures fell short"
        return f"ParityReport({self.artifact} and {self.checkpoint}: {programs}: {verdict})"

    def _repr_html_(self) -> str:
        return notebook.table(self.verdict(), self.COLUMNS, self.rows())

    @property
    def passed(self) -> bool:
        """Whether every figure is within its tolerance and every control fails."""
        return self.model.passed and all(program.passed for program in self.programs)

    @property
    def is_encoder(self) -> bool:
        """Whether vectors were compared, not logits; an artifact is of one checkpoint."""
        return any(measured.program.kind == ENCODER for measured in self.programs)

    def failures(self) -> list[str]:
        """One line for each thing that fell short."""
        lines = list(self.model.failures())
        for measured in self.programs:
            lines += [f"{measured.program}, {line}" for hop in measured.hops for line in hop.failures()]
        return lines

    def remarks(self) -> list[str]:
        """What a reader should know of a program that fell short."""
        return [
            f"{measured.program}: at full precision its graph agrees with the eager model, so the lowering is right; "
            "the difference comes from the kernels' int8 activations, which weights like these amplify"
            for measured in self.programs
            if not measured.passed and measured.only_int8_activations
        ]

    def above(self, greatest_kl: float) -> list[str]:
        """A line for each program that quantization takes further from the model in fp32, or nobody knows how far."""
        found = [(str(measured.program), float(measured.quantization.summary["kl"])) for measured in self.programs]
        return [f"{program}: KL {kl:.2e} is above {greatest_kl:g}" for program, kl in found if not kl <= greatest_kl]

    def verdict(self) -> str:
        """What came out, and what the divergence means, in a few sentences."""
        costs = ", ".join(f"{measured.cost} ({measured.program})" for measured in self.programs)
        short = len(self.failures())
        result = f"fell short: {short} of the figures above" if short else "passed: the programs compute the model"
        if self.is_encoder:
            return f"{result}. The vectors' mean cosine to the model's in fp32 is {costs}; 1 is no difference"
        return (
            f"{result}. Quantization costs a KL divergence of {costs}: how far, in nats a token, the probabilities of "
            "the next token are from the model's in fp32; 0 is no difference"
        )

    def rows(self, *, details: bool = False) -> list[tuple[str, ...]]:
        """Cells by COLUMNS; without ``details``, figures under one tolerance share a row with the worst of them."""
        return list(self._rows(details))

    def _rows(self, details: bool) -> Iterator[tuple[str, ...]]:
        for row in self.model.rows(details=details):
            yield ("", self.model.name, *row)
        for measured in self.programs:
            for hop in measured.hops:
                for row in hop.rows(details=details):
                    yield (str(measured.program), hop.name, *row)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "artifact": self.artifact,
            "checkpoint": self.checkpoint,
            "text": self.text,
            "model": self.model.to_json(),
            "programs": [program.to_json() for program in self.programs],
            "failures": self.failures(),
            "versions": dict(self.versions),
        }

    def records(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What the manifest keeps of each program: the text, the figures that matter and the verdict of each hop."""
        return {
            measured.program.key: {
                "text": self.text,
                **{hop.name: {**finite(hop.summary), "passed": hop.passed} for hop in (self.model, *measured.hops)},
            }
            for measured in self.programs
        }
