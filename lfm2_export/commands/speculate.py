"""``--speculate`` of ``run``, ``chat`` and ``serve``: its arguments, and what they put before a runner."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Runner, RunnerOptions
from lfm2_export.commands.base import given
from lfm2_export.errors import GenerationError
from lfm2_export.messages import listed, shown
from lfm2_export.speculation import DEFAULT_DRAFT_TOKENS, LOOKUP, speculating
from lfm2_export.text import Tokenizer


def add_speculation(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """``several``: of several models, one or all of which the option may be for."""
    what = (
        "verify several tokens at once that are proposed by what stood in the text before (lookup), or by a smaller "
        "artifact of the same vocabulary or a drafter for this model; turns itself off where that does not pay"
    )
    if several:
        what += "; MODEL=lookup or MODEL=DIR is for this one alone (may be given again); its requests take turns"
        parser.add_argument("--speculate", metavar="lookup|DIR", type=given, action="append", default=[], help=what)
    else:
        parser.add_argument("--speculate", metavar="lookup|DIR", type=given, help=what)
    parser.add_argument(
        "--draft-tokens", type=int, metavar="N", help=f"proposals at once, at most (default: {DEFAULT_DRAFT_TOKENS})"
    )
    parser.add_argument(
        "--speculate-inexact",
        action="store_true",
        help="speculate too where tokens may differ from plain decoding's: all but q4 and q8 on our operators",
    )


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """What was asked for. ``choices``: what proposes tokens, by the name of the model that it is for; "": for any."""

    choices: Mapping[str, str]
    draft_tokens: int | None
    inexact: bool
    threads: int | None

    @classmethod
    def asked(cls, options: argparse.Namespace, models: Collection[str] = ()) -> Speculation:
        """``models``: the names that a choice may be for.

        Raises:
            GenerationError: an option of it without ``--speculate``; a choice for no model, or two for one.
        """
        asked = options.speculate
        for name, value in (
            ("--draft-tokens", options.draft_tokens),
            ("--speculate-inexact", options.speculate_inexact),
        ):
            if value not in (None, False) and not asked:
                raise GenerationError(f"{name}: is for --speculate; name what proposes tokens, or leave it out")
        return cls(
            choices={"": asked} if isinstance(asked, str) else _by_model(asked or [], models),
            draft_tokens=options.draft_tokens,
            inexact=options.speculate_inexact,
            threads=options.threads,
        )

    def before(self, runner: Runner, artifact: Artifact, tokenizer: Tokenizer, model: str = "") -> Runner:
        """``runner``, with proposals where they were asked for.

        Raises:
            ArtifactError, RunnerError: as ``speculating``.
        """
        choice = self.choices.get(model, self.choices.get(""))
        if choice is None:
            return runner
        return speculating(
            runner,
            choice,
            tokenizer=tokenizer,
            options=RunnerOptions.parse(threads=self.threads),
            draft_tokens=self.draft_tokens,
            inexact=self.inexact,
            target=artifact.manifest.checkpoint,
        )


def _by_model(asked: Sequence[str], models: Collection[str]) -> dict[str, str]:
    if asked and not models:
        raise GenerationError(f"--speculate {shown(asked[0], 60)}: none of these generates text; leave it out")
    found: dict[str, str] = {}
    for text in asked:
        name, separator, choice = text.partition("=")
        if not separator or text == LOOKUP or os.path.exists(text):
            name, choice = "", text
        elif name not in models:
            raise GenerationError(
                f"--speculate {shown(text, 60)}: there is no model {shown(name, 40)} that generates text, only "
                f"{listed(models)}; give lookup, a folder, or one of these names and = before it"
            )
        if name in found:
            raise GenerationError(f"--speculate {shown(text, 60)}: is the second one for the same; give one of them")
        found[name] = choice
    return found
