"""How likely tokens were, in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence

from lfm2_export.logprobs import Choice, TokenLogprob


def chat_json(choices: Sequence[Choice]) -> list[dict[str, object]]:
    """As chat completions give them."""
    return [_entry(choice.chosen) | {"top_logprobs": [_entry(one) for one in choice.top]} for choice in choices]


def _entry(one: TokenLogprob) -> dict[str, object]:
    return {"token": one.text, "logprob": one.logprob, "bytes": one.utf8}


def completion_json(choices: Sequence[Choice], offset: int) -> dict[str, object]:
    """As plain completions give them; ``offset``: characters before the first of them."""
    offsets = [offset + sum(len(c.chosen.text) for c in choices[:index]) for index in range(len(choices))]
    return {
        "tokens": [choice.chosen.text for choice in choices],
        "token_logprobs": [choice.chosen.logprob for choice in choices],
        "top_logprobs": [{one.text: one.logprob for one in choice.top} for choice in choices],
        "text_offset": offsets,
    }
