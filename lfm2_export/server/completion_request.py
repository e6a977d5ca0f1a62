"""The body of a plain completion."""

from __future__ import annotations

from dataclasses import dataclass

from lfm2_export.messages import shown
from lfm2_export.server.errors import invalid
from lfm2_export.server.fields import Body, integer, refuse_unless, text
from lfm2_export.server.sampling_request import Sampling, parse_sampling

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """``prompt``: text, or token ids as they are."""

    model: str | None
    prompt: str | list[int]
    top_logprobs: int | None
    sampling: Sampling


def parse_completion(body: Body) -> CompletionRequest:
    """Raises: ApiError."""
    refuse_unless(body, "echo", (False,), "the prompt is not repeated")
    refuse_unless(body, "suffix", ("",), "text is continued only")
    refuse_unless(body, "best_of", (1,), "one answer a request is given")
    refuse_unless(body, "response_format", ({"type": "text"},), "use /v1/chat/completions")
    return CompletionRequest(
        model=text(body, "model"),
        prompt=_prompt(body),
        top_logprobs=integer(body, "logprobs", 0, 5),
        sampling=parse_sampling(body),
    )


def _prompt(body: Body) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list):
        raise invalid("prompt", f"{len(prompt)} prompts; give one a request")
    raise invalid("prompt", f"{shown(prompt, 40)} is not usable; give some text, or a list of token ids")
