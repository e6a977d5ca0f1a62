"""``lfm2-export chat`` with a model whose replies are given: ``python -m tests.terminal.scripted JSON ARGUMENTS...``.

JSON is an object: "replies", said one a turn; "pause", seconds a token takes; "context", tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lfm2_export import cli
from lfm2_export.commands import chat, talk
from lfm2_export.generation_config import GenerationConfig
from tests.artifacts import program
from tests.hash_runner import TOKENIZER
from tests.server.script_runner import ScriptRunner


def opened(script: dict[str, Any], new_tokens: int | None = None) -> talk.Opened:
    runner = ScriptRunner(script["replies"], script.get("pause", 0.0))
    runner.context_length = script.get("context", runner.context_length)
    stops = (TOKENIZER.token_id("<|im_end|>"),)
    config = GenerationConfig(stop_token_ids=stops).override(max_new_tokens=new_tokens)
    return talk.Opened(program=program(), runner=runner, tokenizer=TOKENIZER, config=config)


def main() -> int:
    script, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    chat.open_for_text = lambda options: opened(script, options.max_new_tokens)  # type: ignore[assignment]
    sys.argv = ["lfm2-export", "chat", "DIR", *arguments]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
