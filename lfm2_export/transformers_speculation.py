"""transformers' ``prompt_lookup_num_tokens`` and ``assistant_model`` for an exported program.

In: the options of one ``generate``. Out: the same call without them, on a runner that verifies proposals. transformers'
own assisted generation cuts caches back, which a conv state does not allow; here its plain loop runs, whatever its
processors and criteria do, and single steps come out of passes that verified several.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from lfm2_export.backends.drafter import DraftRunner
from lfm2_export.drafters import check_target
from lfm2_export.errors import GenerationError
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.speculation import (
    DEFAULT_DRAFT_TOKENS,
    Drafter,
    ModelDrafter,
    PromptLookup,
    Report,
    SpeculativeRunner,
    StreamDrafter,
)
from lfm2_export.transformers_cache import StateDesk

logger = logging.getLogger(__name__)

_LOOKUP, _ASSISTANT, _INEXACT = "prompt_lookup_num_tokens", "assistant_model", "speculate_inexact"


@dataclass(frozen=True, kw_only=True)
class Request:
    """``lookup``: proposals of a pass out of the text; ``assistant``: the desk of a smaller model; ``drafter``: one
    that reads what this model computes."""

    lookup: int | None = None
    assistant: StateDesk | None = None
    drafter: DraftRunner | None = None
    inexact: bool = False

    def __bool__(self) -> bool:
        return any(one is not None for one in (self.lookup, self.assistant, self.drafter))


def take_request(options: dict[str, Any], defaults: GenerationConfig) -> Request:
    """Takes what is about speculation out of ``generate``'s options; a configuration is replaced by one without it.

    Raises:
        GenerationError: both drafters at once, or an assistant that is no exported program.
    """
    config = options.get("generation_config")
    lookup = options.pop(_LOOKUP, None)
    if lookup is None:
        lookup = getattr(config or defaults, _LOOKUP, None)
    if getattr(config or defaults, _LOOKUP, None) is not None:
        config = options["generation_config"] = copy.deepcopy(config or defaults)
        setattr(config, _LOOKUP, None)
    assistant = options.pop(_ASSISTANT, None)
    drafter = assistant if isinstance(assistant, DraftRunner) else None
    desk = None if assistant is None or drafter is not None else getattr(assistant, "_desk", None)
    if assistant is not None and drafter is None and not isinstance(desk, StateDesk):
        raise GenerationError(
            f"generate: {_ASSISTANT} is a {type(assistant).__name__}; open an artifact with ExportedModelForCausalLM, "
            "or a drafter's with lfm2_export.load_drafter"
        )
    if lookup is not None and assistant is not None:
        raise GenerationError(f"generate: {_LOOKUP} and {_ASSISTANT} were both given; pass one of them")
    return Request(lookup=lookup, assistant=desk, drafter=drafter, inexact=bool(options.pop(_INEXACT, False)))


@contextmanager
def speculating(desk: StateDesk, request: Request, origin: CheckpointRecord | None = None) -> Iterator[Report | None]:
    """``desk``'s runner verifies proposals in the ``with`` block; what it did is in the report. ``origin``: the model's
    checkpoint, of which a drafter must be."""
    if not request:
        yield None
        return
    if request.drafter is not None and origin is not None:
        check_target(request.drafter, origin, f"generate: {_ASSISTANT}")
    with _drafter(desk, request) as drafter:
        count = DEFAULT_DRAFT_TOKENS if request.lookup is None else request.lookup
        with desk.lock:
            runner = SpeculativeRunner(desk.runner, drafter, draft_tokens=count, inexact=request.inexact)
            desk.runner = runner
        try:
            yield runner.report
        finally:
            with desk.lock:
                desk.runner = runner.release()
            logger.info("speculation, %s", runner.report.summary())


def _drafter(desk: StateDesk, request: Request) -> AbstractContextManager[Drafter]:
    if request.drafter is not None:
        return nullcontext(StreamDrafter(request.drafter, "assistant"))
    if request.assistant is None:
        return nullcontext(PromptLookup())
    if request.assistant is desk:
        raise GenerationError(f"generate: {_ASSISTANT} is the model itself; open a smaller artifact for it")
    theirs, own = request.assistant.runner.vocab_size, desk.runner.vocab_size
    if theirs != own:
        raise GenerationError(
            f"generate: {_ASSISTANT} has a vocabulary of {theirs} tokens, the model one of {own}; take one of the same "
            "family"
        )
    return _lent(request.assistant)


@contextmanager
def _lent(desk: StateDesk) -> Iterator[Drafter]:
    """A drafter on another model's runner, whose own state comes back afterwards."""
    with desk.lock:
        desk.put_away()
        yield ModelDrafter(desk.runner, "assistant")
