"""Speculative decoding: what verifying costs, what prompt lookup gains on texts, and how often tokens differ.

    python -m benchmarks.speculative cost ARTIFACT          a pass over T tokens beside a step, all logits
    python -m benchmarks.speculative texts ARTIFACT         prompt lookup along given answers, beside plain decoding
    python -m benchmarks.speculative differing ARTIFACT     greedy tokens that differ from plain decoding's
    python -m benchmarks.speculative round ARTIFACT --drafter DIR    a drafter's block and its pass beside a step
    python -m benchmarks.speculative round 1.2b --keep FOLDER        the same, of random weights that it makes itself

``texts`` decodes answers that stand in speculative_texts.py, token by token, whatever the program makes of them: what
is proposed and accepted is that of a model that gives these answers, the speed that of the program, random weights too.
Everything alternates within one process, and figures are medians of rounds; on a machine that others use, too, only the
ratios mean something. ``differing`` is for programs that need --speculate-inexact. What a ``round`` gains follows from
the tokens that it gives, which trained drafters are published with, so random weights will do: for the name of a shape
it makes model and drafter under --keep, where they stay. The 350M's drafter is made up: none is published.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import programs
from benchmarks.speculative_texts import TEXTS, Text
from benchmarks.synthetic import DRAFTER_SHAPES, REAL_SHAPES
from lfm2_export.backends.base import Runner, TapsStreams
from lfm2_export.drafters import load_drafter
from lfm2_export.errors import Lfm2ExportError, RunnerError
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.resources import check_disk
from lfm2_export.runners import load_runner
from lfm2_export.source import ASSETS
from lfm2_export.speculation import PromptLookup, Report, SpeculativeRunner
from lfm2_export.speculation.controller import Always
from lfm2_export.text import Tokenizer

WIDTHS = (1, 2, 3, 4, 5, 8, 9, 12, 16)
CONTEXT, NEW_TOKENS = 256, 128
# Tokens of a round: as many positions of the target's go through the drafter with its block; and what is published of
# the 1.2B's drafter.
EMITTED, PUBLISHED = 4, 4.81
# Of a round: shapes and their drafters', and the group size of both.
_SHAPES, _GROUP = {shape.removesuffix("-dspark"): shape for shape in DRAFTER_SHAPES}, 32


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="lfm2-export-") as scratch:
            if options.measure == "round":
                options.artifact, options.drafter = _programs(options, Path(scratch))
            runner = load_runner(
                options.artifact,
                backend=options.backend,
                scheme=options.scheme,
                kernels=options.kernels,
                threads=options.threads,
            )
            found = MEASURES[options.measure](runner, options)
    except Lfm2ExportError as error:
        print(f"speculative: {error}", file=sys.stderr)
        return error.exit_code
    load = [round(value, 1) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []
    print(json.dumps({"measure": options.measure, "load": load, **found}, indent=1))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measure", choices=sorted(MEASURES))
    parser.add_argument(
        "artifact", help=f"a folder that `lfm2-export export` wrote; of round also a shape: {', '.join(_SHAPES)}"
    )
    parser.add_argument("--backend")
    parser.add_argument("--scheme")
    parser.add_argument("--kernels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--drafter", help="of round: the folder of the model's drafter")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where round's files are looked for, and left")
    return parser


def _programs(options: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """The folders of a round's model and drafter; of a shape they are made where they are not there."""
    shape = _SHAPES.get(options.artifact)
    if shape is None or Path(options.artifact).exists():
        if options.drafter is None:
            raise RunnerError("round: names no drafter; pass --drafter and its folder")
        return Path(options.artifact), Path(options.drafter)
    folder = (options.keep or scratch) / options.artifact
    model, drafter = REAL_SHAPES[options.artifact], DRAFTER_SHAPES[shape]
    check_disk(folder, programs.round_disk_needed(folder, model, drafter, _GROUP), purpose="this measurement")
    target = programs.onnx_program(folder, model, _GROUP)
    return target.path, programs.drafter_folder(folder, drafter, target)


def cost(runner: Runner, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, and of passes over T tokens as shares of it."""
    rng = np.random.default_rng(0)
    runner.prefill([rng.integers(0, runner.vocab_size, CONTEXT)])
    mark = runner.mark()
    times: dict[int, list[float]] = {0: [], **{width: [] for width in WIDTHS}}
    for _ in range(options.rounds + 1):
        for width in times:
            tokens = rng.integers(0, runner.vocab_size, max(1, width))
            started = time.perf_counter()
            if width:
                runner.verify(tokens)
                runner.accept(width // 2)
            else:
                runner.decode(tokens)
            times[width].append(time.perf_counter() - started)
            runner.rewind(mark)
    medians = {width: statistics.median(values[1:]) for width, values in times.items()}
    shares = {str(width): round(medians[width] / medians[0], 2) for width in WIDTHS}
    return {"step_ms": round(1e3 * medians[0], 2), "pass_over_step": shares}


def round_(runner: Runner, options: argparse.Namespace) -> dict[str, Any]:
    """A drafter's block, and a round (block, pass, taking back what was wrong) with so many proposals, as shares of a
    step; and how many times plain decoding that is for each number of tokens that a round gives."""
    drafter = load_drafter(options.drafter, threads=options.threads, kernels=options.kernels)
    heard: list[np.ndarray] = []
    if not isinstance(runner, TapsStreams):
        raise RunnerError("round: this program gives no residual streams; export the model to onnx")
    listen = lambda before, streams: heard.append(streams)  # noqa: E731
    runner.tap(drafter.layers, listen)
    rng = np.random.default_rng(0)
    runner.prefill([rng.integers(0, runner.vocab_size, CONTEXT)])
    streams, mark = np.concatenate(heard), runner.mark()
    heard.clear()
    drafter.propose(streams[:-EMITTED], 0)
    widths = [count for count in (3, 5, 7, 9) if count <= drafter.block_size]
    steps, blocks, passes, rounds = [], [], {count: [] for count in widths}, {count: [] for count in widths}
    for _ in range(options.rounds + 1):
        for count in widths:
            runner.tap((), None)  # a plain step is that of plain decoding
            token = rng.integers(0, runner.vocab_size, 1)
            steps.append(_timed(lambda token=token: runner.decode(token)))
            runner.rewind(mark)
            runner.tap(drafter.layers, listen)
            drafter.cut(CONTEXT - EMITTED)
            blocks.append(_timed(lambda: drafter.propose(streams[-EMITTED:], 1)))
            tokens = rng.integers(0, runner.vocab_size, count + 1)
            passes[count].append(_timed(lambda tokens=tokens: _verified(runner, tokens)))
            rounds[count].append(blocks[-1] + passes[count][-1])
            runner.rewind(mark)
            heard.clear()
    step = statistics.median(steps[len(widths) :])
    over = {count: statistics.median(times[1:]) / step for count, times in rounds.items()}
    most = max(widths)
    return {
        "step_ms": round(1e3 * step, 2),
        "draft_over_step": round(statistics.median(blocks[len(widths) :]) / step, 2),
        "pass_over_step": {
            f"{count + 1} rows": round(statistics.median(times[1:]) / step, 2) for count, times in passes.items()
        },
        "round_over_step": {f"{count + 1} rows": round(share, 2) for count, share in over.items()},
        "times_plain_by_tokens_a_round": {
            str(tokens): round(tokens / over[most], 2) for tokens in (1, 2, 3, 4, PUBLISHED, 5, 6, 7, 8, 9)
        },
    }


def _verified(runner: Runner, tokens: np.ndarray) -> None:
    runner.verify(tokens)
    runner.accept(min(EMITTED, len(tokens)))


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def texts(runner: Runner, options: argparse.Namespace) -> dict[str, Any]:
    """Times as fast as plain decoding, and what was accepted, of each text."""
    tokenizer = Tokenizer.from_dir(ASSETS / "tiny-dense")
    return {"texts": {text.name: _along(runner, tokenizer, text, options.rounds) for text in TEXTS}}


def _along(runner: Runner, tokenizer: Tokenizer, text: Text, rounds: int) -> dict[str, Any]:
    prompt = tokenizer.encode(text.prompt)
    answer = tokenizer.encode(text.answer, add_special_tokens=False)
    ratios, plain_ms = [], []
    report = Report(drafter="")
    for _ in range(rounds):
        plain = _seconds(runner, prompt, answer)
        ours = SpeculativeRunner(runner, PromptLookup(), inexact=True)
        ratios.append(plain / _seconds(ours, prompt, answer))
        plain_ms.append(1e3 * plain / len(answer))
        report = ours.report
    return {
        "tokens": len(answer),
        "plain_ms": round(statistics.median(plain_ms), 2),
        "times_plain": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "acceptance": round(report.acceptance, 2),
        "tokens_per_step": round(report.tokens_per_step, 2),
    }


def _seconds(runner: Runner, prompt: list[int], answer: list[int]) -> float:
    """Of decoding ``answer`` behind ``prompt``; its prefill is not counted."""
    runner.reset()
    runner.prefill([prompt])
    started = time.perf_counter()
    for token in answer:
        runner.decode([token])
    return time.perf_counter() - started


def differing(runner: Runner, options: argparse.Namespace) -> dict[str, Any]:
    """Of greedy answers with proposals: up to where they are those of plain decoding, and how often they part."""
    folder = Path(options.artifact)
    tokenizer, config = Tokenizer.from_dir(folder), GenerationConfig(max_new_tokens=NEW_TOKENS)
    compared = parted = 0
    prompts = [(tokenizer.encode(text.prompt + text.answer), start) for text in TEXTS for start in (0, 40, 80, 120)]
    for tokens, start in prompts:
        prompt = tokens[start : start + 200]
        (plain,) = complete(runner, [prompt], config)
        controller = Always(most=7, report=Report(drafter="lookup"))
        ours = SpeculativeRunner(runner, PromptLookup(), inexact=True, controller=controller)
        (found,) = complete(ours, [prompt], config)
        same = _same(plain.tokens, found.tokens)
        compared += same + (same < len(plain.tokens))
        parted += same < len(plain.tokens)
    return {"tokens": compared, "differing": parted, "share": parted / compared, "exact": runner.verifies_exactly}


def _same(a: list[int], b: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


MEASURES = {"cost": cost, "texts": texts, "differing": differing, "round": round_}

if __name__ == "__main__":
    sys.exit(main())
