"""What the comparison found: figures of one run, medians as rows, the table, the ratios, the JSON.

``bits_per_weight``: bits that one decode step reads (layers, chosen experts, head; scales and zero points counted) by
weights that it uses. With it, a step's bytes are ``bits_per_weight / 8 * active weights``, whatever the system, and the
share of the read bandwidth follows from the JSON and the shape alone.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LLAMA_CPP, ONNX, EXECUTORCH = "llama.cpp", "onnx", "executorch"
SYSTEMS = (LLAMA_CPP, ONNX, EXECUTORCH)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process. ``foreign_cores``: how many cores others used meanwhile; ``version``: what the program says of
    itself, where it does."""

    load_s: float
    resident_bytes: int
    prefill_tps: float
    decode_tps: float
    foreign_cores: float = 0.0
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians of one system's runs; ``resident_bytes`` is the most that a process held."""

    system: str
    name: str
    bits_per_weight: float
    artifact_bytes: int
    resident_bytes: int
    load_s: float
    prefill_tps: float
    decode_tps: float

    @classmethod
    def of(cls, system: str, name: str, bits_per_weight: float, artifact_bytes: int, runs: Sequence[Run]) -> Row:
        return cls(
            system=system,
            name=name,
            bits_per_weight=round(bits_per_weight, 3),
            artifact_bytes=artifact_bytes,
            resident_bytes=int(statistics.median(run.resident_bytes for run in runs)),
            load_s=round(statistics.median(run.load_s for run in runs), 3),
            prefill_tps=round(statistics.median(run.prefill_tps for run in runs), 2),
            decode_tps=round(statistics.median(run.decode_tps for run in runs), 2),
        )

    @property
    def label(self) -> str:
        return f"{self.system} {self.name}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One shape on one machine; ``read_gb_per_s`` in 10^9 bytes."""

    shape: str
    date: str
    cpu: str
    threads: int
    versions: Mapping[str, str]
    read_gb_per_s: float
    rows: tuple[Row, ...]

    def write(self, path: Path) -> Path:
        """As JSON, renamed into place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Comparison:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**raw | {"rows": tuple(Row(**row) for row in raw["rows"])})

    def bandwidth_share(self, row: Row, active_weights: float) -> float:
        """Bytes that decoding read a second, of those that the machine can read."""
        return row.decode_tps * active_weights * row.bits_per_weight / 8 / (self.read_gb_per_s * 1e9)

    def ratios(self) -> dict[str, dict[str, float]]:
        """Every other row by llama.cpp's: {"onnx q4 group 32": {"prefill": 1.3, ...}}; empty where that did not run."""
        rival = next((row for row in self.rows if row.system == LLAMA_CPP), None)
        if rival is None:
            return {}
        return {
            row.label: {
                "prefill": row.prefill_tps / rival.prefill_tps,
                "decode": row.decode_tps / rival.decode_tps,
            }
            for row in self.rows
            if row is not rival
        }


def table(found: Comparison, active_weights: float) -> str:
    """The figures and the ratios in Markdown."""
    columns = (
        *("system", "bits a weight", "artifact", "load", "resident", "prefill 512", "decode 128", "of bandwidth"),
        *("prefill ratio", "decode ratio"),
    )
    ratios = found.ratios()
    lines = [_line(columns), _line(["---"] + ["---:"] * (len(columns) - 1))]
    for row in found.rows:
        ratio = ratios.get(row.label)
        cells = [row.label, f"{row.bits_per_weight:.2f}", _gb(row.artifact_bytes), f"{row.load_s:.2f} s"]
        cells += [_gb(row.resident_bytes), f"{row.prefill_tps:.1f} tok/s", f"{row.decode_tps:.1f} tok/s"]
        cells += [f"{found.bandwidth_share(row, active_weights):.0%}"]
        cells += [f"{ratio['prefill']:.2f}", f"{ratio['decode']:.2f}"] if ratio else ["1.00" if ratios else ""] * 2
        lines.append(_line(cells))
    return "\n".join(lines)


def spread(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """How far each system's runs lie apart: a line each, for judging how quiet the machine was."""
    return [
        f"{label}: prefill {_range(r.prefill_tps for r in one)}, decode {_range(r.decode_tps for r in one)} tok/s"
        for label, one in runs.items()
    ]


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.1f} to {found[-1]:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
