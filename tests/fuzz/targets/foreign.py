"""An ONNX folder that others exported: config.json and graphs, no manifest; opened, and run for a few tokens.

A change of a graph is nearly always told before it runs. What runs gives what it likes, which the runner has to notice.
"""

from __future__ import annotations

import onnx

from lfm2_export.backends.base import Runner
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.hub_artifacts import open_artifact
from lfm2_export.runners import load_runner
from lfm2_export.text import Tokenizer
from tests.fuzz.findings import attempt, attempt_command
from tests.fuzz.mutation import bundle_mutator, json_mutator, mutate_bytes
from tests.fuzz.protobuf_mutation import mutate_message
from tests.fuzz.targets.checkpoint import CONFIG_KEYS
from tests.fuzz.workspace import workspace

mutate = bundle_mutator(
    {
        "config.json": json_mutator(*CONFIG_KEYS),
        "*.json": json_mutator("eos_token_id", "chat_template", "added_tokens_decoder", "model", "vocab"),
        "*.onnx": lambda data, rng: mutate_message(data, rng, onnx.ModelProto),
        "*": mutate_bytes,
    },
    (
        *("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_q4.onnx_data", "onnx/model_q4.onnx_data_1"),
        *("lfm2_export.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"),
    ),
)


def fuzz_one(data: bytes) -> None:
    folder = workspace().empty() / "published"
    folder.mkdir()
    workspace().put_bundle(folder, data)
    attempt_command("inspect", str(folder))
    if attempt(open_artifact, folder) is None:
        return
    attempt(GenerationConfig.from_file, folder / "generation_config.json")
    attempt(Tokenizer.from_dir, folder)
    runner = attempt(load_runner, folder, threads=1)
    if runner is not None:
        attempt(_follow, runner)


def _follow(runner: Runner) -> None:
    """A prompt, steps, and back to where it was."""
    runner.prefill([[1, 2, 3]])
    mark, snapshot = runner.mark(), runner.snapshot()
    runner.decode([4])
    runner.rewind(mark)
    runner.prefill_scored([[4, 5]])
    runner.restore(snapshot)
    runner.score([[1, 2]])
