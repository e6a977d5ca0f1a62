"""A chat template: it is code from a stranger, rendered with a conversation that has what templates look for."""

from __future__ import annotations

from typing import Any

from lfm2_export import chat_template
from lfm2_export.chat_template import RenderLimits
from tests.fuzz.findings import attempt
from tests.fuzz.template_mutation import mutate_template

mutate = mutate_template
# Many a changed template works without end: one limit stands for another.
LIMITS = RenderLimits(seconds=0.2, characters=1 << 18)

_MESSAGES: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "Answer shortly."},
    {"role": "user", "content": "What is the weather in Zürich? 天气"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"at": "ZRH"}}}]},
    {"role": "tool", "content": "12 °C", "name": "weather"},
    {"role": "assistant", "content": "<think>12</think> Cool.", "reasoning_content": "It is cold."},
    {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}]},
)
_TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
_VARIABLES = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}


def fuzz_one(data: bytes) -> None:
    template = data.decode("utf-8", "replace")
    attempt(
        chat_template.render,
        template,
        _MESSAGES,
        tools=_TOOLS,
        add_generation_prompt=True,
        variables=_VARIABLES,
        limits=LIMITS,
    )
