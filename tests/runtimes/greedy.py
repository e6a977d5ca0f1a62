"""What our runner continues prompts with, greedily: the tokens that another runtime must give from the same folder.

Runtimes bring kernels of their own, and releases differ in how they round activations to int8. So a token may differ
where our own two likeliest tokens are closer than such rounding moves them, and nowhere else; what follows such a tie
is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

import lfm2_export
from lfm2_export.text import Tokenizer

FAMILIES = ("tiny-moe", "tiny-dense")
SCHEMES = ("fp32", "q8", "q4")
STEPS = 48
# The least gap between the two likeliest tokens, in logits, at which every runtime must choose as we do. Measured for
# q8 and q4 as the change of that gap between onnxruntime's kernels and ours over 1,000 tokens of each bundled
# checkpoint: 99 % below 0.044, on the dense one all below 0.057; a mixture's router may tie as well, which moves the
# gap by up to 0.44, once in 1,000.
TIE = {"fp32": 1e-3, "fp16": 0.05, "q8": 0.1, "q4": 0.1, "q4f16": 0.2}
# The part of all tokens that must be the same whatever the ties.
SHARE = 0.5

PROMPTS = (
    "The str type is",
    "Return a list of",
    "import os\n\ndef",
    "If the argument is not a",
    "The following example shows how to use",
)


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Prompts as token ids, and per prompt ``STEPS`` tokens with the gap that each was chosen by."""

    label: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    gaps: list[list[float]]
    tie: float

    def part(self, prompts: int, steps: int) -> Greedy:
        """The first of the prompts and steps, for runtimes that are slow."""
        tokens, gaps = ([row[:steps] for row in rows[:prompts]] for rows in (self.tokens, self.gaps))
        return replace(self, prompts=self.prompts[:prompts], tokens=tokens, gaps=gaps)

    def check(self, runtime: str, found: list[list[int]]) -> None:
        """Raises AssertionError at the first token that differs and is no tie."""
        assert len(found) == len(self.tokens)
        same = 0
        for index, (ours, theirs, gaps) in enumerate(zip(self.tokens, found, self.gaps, strict=True)):
            assert len(theirs) == len(ours), f"{runtime} {self.label}, prompt {index}: {len(theirs)} tokens"
            place = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), len(ours))
            same += place
            assert place == len(ours) or gaps[place] < self.tie, (
                f"{runtime} {self.label}, prompt {index}: token {place} is {theirs[place]}, ours {ours[place]} by "
                f"{gaps[place]:.3f} logits"
            )
        total = sum(map(len, self.tokens))
        print(f"{runtime} {self.label}: {same} of {total} greedy tokens are the same")
        assert same >= SHARE * total


@cache
def greedy(folder: Path, scheme: str, steps: int = STEPS) -> Greedy:
    """Our runner's greedy tokens; stop tokens do not stop it."""
    tokenizer = Tokenizer.from_dir(folder)
    runner = lfm2_export.load_runner(folder, scheme=scheme, threads=1)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    tokens, gaps = [], []
    for prompt in prompts:
        runner.reset()
        logits, chosen, gap = runner.prefill([prompt])[0], [], []
        while len(chosen) < steps:
            best, second = np.partition(logits, (-1, -2))[[-1, -2]]
            chosen.append(int(logits.argmax()))
            gap.append(float(best - second))
            logits = runner.decode([chosen[-1]])[0]
        tokens.append(chosen)
        gaps.append(gap)
    return Greedy(label=f"{folder.name} {scheme}", prompts=prompts, tokens=tokens, gaps=gaps, tie=TIE[scheme])
