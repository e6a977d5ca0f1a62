"""Replies that must call a tool, on any backend: the server's and the chat's ``tool_choice``.

In: tools, the prompt, the vocabulary's grammars. Out: a ``Constraint`` of the reply's tokens.
"""

from __future__ import annotations

from lfm2_export.constraints import After, Constraint, Grammars
from lfm2_export.errors import GenerationError
from lfm2_export.replies import Tools, opens_thinking
from lfm2_export.replies.call_grammar import call_grammar, can_force
from lfm2_export.replies.reply import END_THINK
from lfm2_export.text import Tokenizer


def forced_calls(
    grammars: Grammars, tokenizer: Tokenizer, tools: Tools, prompt: str, *, name: str = "", parallel: bool = True
) -> Constraint:
    """Of a reply to ``prompt`` that must call a tool: the one of that ``name``, or any. Where the prompt has opened
    thinking, the call comes behind it.

    Raises:
        GenerationError: this model writes calls between no markers that are known here, or a schema cannot be met.
    """
    if not can_force(tokenizer.token_id, tokenizer.chat_templates.values()):
        raise GenerationError(
            "a call cannot be forced on this model: its chat template has no form of calls that is known"
        )
    calls = grammars.of_grammar(call_grammar(tools, tokenizer.token_id, name=name, parallel=parallel))
    return behind_thinking(calls, tokenizer, prompt)


def behind_thinking(constraint: Constraint, tokenizer: Tokenizer, prompt: str) -> Constraint:
    """``constraint``, from the end of the thinking on where a prompt has opened it."""
    return After(END_THINK, constraint, tokenizer) if opens_thinking(prompt) else constraint
