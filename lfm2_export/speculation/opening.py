"""Puts a drafter before a runner, by what a user asked for.

In: "lookup", or the folder of an artifact. Out: a SpeculativeRunner.
"""

from __future__ import annotations

import os
from pathlib import Path

from lfm2_export import paths
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Runner, RunnerOptions
from lfm2_export.drafters import check_target, open_drafter
from lfm2_export.errors import ArtifactError
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.manifest import DRAFTER, CheckpointRecord, Program
from lfm2_export.runners import open_runner
from lfm2_export.speculation.drafters import Drafter
from lfm2_export.speculation.dspark import StreamDrafter
from lfm2_export.speculation.lookup import PromptLookup
from lfm2_export.speculation.model import ModelDrafter
from lfm2_export.speculation.runner import DEFAULT_DRAFT_TOKENS, SpeculativeRunner, check_draft_tokens
from lfm2_export.text import Tokenizer

LOOKUP = "lookup"


def speculating(
    runner: Runner,
    choice: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    options: RunnerOptions | None = None,
    draft_tokens: int | None = None,
    inexact: bool = False,
    target: CheckpointRecord | None = None,
) -> SpeculativeRunner:
    """``runner`` with proposals.

    Args:
        runner: the program that decides; it belongs to what is returned.
        choice: "lookup": what stood in the text before; else a smaller artifact with the same vocabulary, or a drafter
            for this model.
        tokenizer: the one of ``runner``'s artifact.
        options: how the smaller artifact's program is run.
        draft_tokens: proposals of a pass at most; default: 8.
        inexact: also where a pass gives other bits than single steps do.
        target: which checkpoint ``runner``'s program is of; a drafter must be of the same.

    Raises:
        ArtifactError: there is no such artifact, or its vocabulary is another one.
        RunnerError: the program cannot verify, or only inexactly; or ``draft_tokens`` is out of range.
    """
    count = check_draft_tokens(DEFAULT_DRAFT_TOKENS if draft_tokens is None else draft_tokens)
    drafter: Drafter = PromptLookup() if choice == LOOKUP else _opened(choice, tokenizer, options, target)
    return SpeculativeRunner(runner, drafter, draft_tokens=count, inexact=inexact)


def _opened(
    choice: str | os.PathLike[str],
    tokenizer: Tokenizer,
    options: RunnerOptions | None,
    target: CheckpointRecord | None,
) -> Drafter:
    artifact = open_artifact(choice if isinstance(choice, str) else Path(choice))
    options, program = options or RunnerOptions(), artifact.program(None, None)
    if program.kind == DRAFTER:
        drafter = open_drafter(artifact, program, options)
        if target is not None:
            check_target(drafter, target, paths.shown(artifact.path))
        return StreamDrafter(drafter, f"drafter {program}")
    return _model(artifact, program, tokenizer, options)


def _model(artifact: Artifact, program: Program, tokenizer: Tokenizer, options: RunnerOptions) -> ModelDrafter:
    folder = artifact.path
    if Tokenizer.from_dir(folder).vocabulary() != tokenizer.vocabulary():
        raise ArtifactError(
            f"{paths.shown(folder)}: has another vocabulary than the model that it is to draft for; name an artifact "
            "of the same family, or lookup"
        )
    return ModelDrafter(open_runner(artifact, program, options), str(program))
