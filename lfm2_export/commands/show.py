"""``lfm2-export inspect`` and ``support``: what something is, what can be done."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from lfm2_export import console
from lfm2_export.commands.base import add_json, add_source, given, source_options
from lfm2_export.messages import listed, one_line
from lfm2_export.resources import human_bytes


class InspectCommand:
    name = "inspect"
    help = "show parameters, layers, bytes per part and state size of an artifact or a checkpoint"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        what = "an artifact, or a checkpoint; also on the Hub"
        parser.add_argument("what", metavar="DIR|CHECKPOINT", type=given, help=what)
        add_source(parser)
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.inspection import inspect

        found = inspect(options.what, **source_options(options))
        if options.json:
            console.print_json(found)
        elif found["kind"] == "checkpoint":
            _print_checkpoint(found)
        else:
            _print_artifact(found)
        return 0


def _print_checkpoint(found: dict[str, Any]) -> None:
    layers = found["layers"]
    sliding = f" ({found['sliding_layers']} of them sliding, window {found['sliding_window']})"
    sliding = sliding if found["sliding_layers"] else ""
    bounded = (
        f", {human_bytes(found['state_bytes_at_32k_bounded'])} where sliding layers keep their window alone (.pte), "
        f"{human_bytes(found['state_bytes_at_32k_rings'])} where that and room for a block (ONNX, our operators)"
    )
    rows = [
        ("family", found["family"]),
        ("parameters", f"{found['parameters']:,} ({found['active_parameters']:,} for one token)"),
        (
            "layers",
            f"{layers['conv']} conv, {layers['attention']} attention{sliding}; {found['moe_layers']} with experts",
        ),
        ("stored as", ", ".join(f"{dtype} ({n} tensors)" for dtype, n in found["dtypes"].items())),
        ("size", human_bytes(found["bytes"])),
        *_state_rows(found, bounded if sliding else ""),
        ("context", f"{found['context_length']:,} tokens"),
    ]
    console.print_table(found["name"], ("what", "value"), rows)
    parts = [(part, f"{v['parameters']:,}", human_bytes(v["bytes"])) for part, v in found["parts"].items()]
    console.print_table("parts", ("part", "parameters", "size"), parts)


def _state_rows(found: dict[str, Any], bounded: str) -> list[tuple[str, str]]:
    """What a decoder keeps; an encoder keeps nothing, and gives this."""
    if found["encoder"]:
        return [("gives", f"encoder: {found['encoder']}")]
    per_token, fixed = found["state_bytes_per_token"], found["state_bytes_fixed"]
    return [
        ("state (fp32)", f"{per_token:,} bytes per token and {fixed:,} more"),
        ("at 32k of context", human_bytes(found["state_bytes_at_32k"]) + bounded),
    ]


def _print_artifact(found: dict[str, Any]) -> None:
    console.print_table(
        f"{found['name']}: {found['family']}, made of {found['checkpoint']}",
        ("program", "file", "size", "weights", "largest error", "state bytes per token"),
        [_program_row(program) for program in found["programs"] if program["here"]],
    )
    widths = [row for program in found["programs"] if program["here"] for row in _width_rows(program)]
    if widths:
        console.print_table("widths", ("program", "part", "stored as", "tensors", "weights"), widths)
    for program in found["programs"]:
        if bits := program["bits_per_weight"]:
            counted = ", ".join(f"{bits[name]:.2f} of {what}" for name, what in _COUNTED.items() if name in bits)
            console.print_line(f"{program['backend']} {program['scheme']}: bits a weight: {counted}")
    for program in found["programs"]:
        if program["state_bytes_at_32k_rings"] is not None:
            print(
                f"{program['backend']} {program['scheme']}: state at 32k of context: "
                f"{human_bytes(program['state_bytes_at_32k'])}, "
                f"{human_bytes(program['state_bytes_at_32k_rings'])} on our operators"
            )
    for program in found["programs"]:
        for said in filter(None, (program["mixture"], program["calibration"])):
            console.print_line(one_line(f"{program['backend']} {program['scheme']}: {said}"))
    absent = [f"{program['backend']} {program['scheme']}" for program in found["programs"] if not program["here"]]
    for note, names in (
        ("not in this folder", absent),
        ("edited since the export", found["edited_files"]),
        ("adopted", found["adopted_files"]),
        ("missing", found["missing_files"]),
    ):
        if names:
            console.print_line(f"{note}: {listed(names)}")


# What bits a weight are counted of.
_COUNTED = {"file": "the file", "step": "what a decode step reads"}


def _width_rows(program: dict[str, Any]) -> list[tuple[str, ...]]:
    """How many tensors of each part have which width; of quantized parts alone."""
    name = f"{program['backend']} {program['scheme']}"
    return [
        (name, row["part"], row["format"], f"{row['tensors']:,}", f"{row['weights']:,}")
        for row in program["widths"]
        if "groups" in row["format"]
    ]


def _program_row(program: dict[str, Any]) -> tuple[str, ...]:
    total = sum(program["weights_by_dtype"].values()) or 1  # tensors may be empty
    weights = ", ".join(f"{dtype} {n / total:.1%}" for dtype, n in sorted(program["weights_by_dtype"].items()))
    worst = program["largest_error"]
    return (
        f"{program['backend']} {program['scheme']}",
        program["graphs"]["model"],
        human_bytes(program["bytes"]),
        weights,
        f"{worst['relative_error']:.3f} {worst['tensor']}" if worst and worst["relative_error"] else "none",
        f"{program['state_bytes_per_token']:,}",
    )


class SupportCommand:
    name = "support"
    help = "list what can be exported: families, schemes, backends, as tested"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_json(parser)

    def run(self, options: argparse.Namespace) -> int:
        from lfm2_export.families import DRAFTERS, FAMILIES
        from lfm2_export.support import DELEGATES, schemes_by_runtime, supported
        from lfm2_export.tested import results

        rows = [asdict(row) for row in supported()]
        delegates = [asdict(row) for row in DELEGATES]
        if options.json:
            console.print_json({"supported": rows, "delegates": delegates, "tested": results().to_json()})
        else:
            columns = ("family", "backend", "scheme", "file", "opened in tests by")
            console.print_table("support", columns, [tuple(row.values()) for row in rows])
            ran = results().ran
            console.print_table(
                f"opened in the tests of {ran['date']}, {ran['system']}",
                ("runtime", *FAMILIES, *DRAFTERS),
                list(schemes_by_runtime()),
            )
            console.print_table(
                "ExecuTorch's delegates beside XNNPACK",
                ("delegate", "dense", "mixture of experts", "because"),
                [tuple(row.values()) for row in delegates],
            )
        return 0
