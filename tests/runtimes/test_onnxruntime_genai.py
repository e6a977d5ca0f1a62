"""onnxruntime-genai opens an artifact's folder as it is and gives our runner's greedy tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx.variants import own_library
from lfm2_export.text import Tokenizer
from tests.runtimes.greedy import FAMILIES, SCHEMES, STEPS, Greedy, greedy
from tests.shows import of, shows

og = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "genai_chat.py"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]


def endless(folder: Path, expected: Greedy, graph: str, copy: Path, library: Path | None = None) -> Any:
    """genai's model on ``graph`` with a stop token that the expected texts do not contain.

    Only genai_config.json is changed; the rest of its folder are links to the artifact's files. ``library``: operators,
    which genai only takes from the folder itself.
    """
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "genai_config.json":
            (copy / path.name).symlink_to(path)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = graph
    if library is not None:
        shutil.copy(library, copy)
        config["model"]["decoder"]["session_options"]["custom_ops_library"] = library.name
    used = {token for tokens in expected.tokens for token in tokens}
    config["model"]["eos_token_id"] = [max(set(range(config["model"]["vocab_size"])) - used)]
    (copy / "genai_config.json").write_text(json.dumps(config))
    return og.Model(str(copy))


def generate(model: Any, rows: np.ndarray | list[int], steps: int, batch_size: int = 1) -> list[list[int]]:
    """Each row's new tokens."""
    parameters = og.GeneratorParams(model)
    length = np.shape(rows)[-1]
    parameters.set_search_options(max_length=length + steps, do_sample=False, batch_size=batch_size)
    generator = og.Generator(model, parameters)
    generator.append_tokens(rows)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[length:]] for row in range(batch_size)]


@shows("genai", "greedy", family=of("checkpoint"), scheme=of("scheme"))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_same_greedy_tokens(artifact: Callable[[str], Path], tmp_path, checkpoint, scheme):
    folder = artifact(checkpoint)
    program = Artifact.open(folder, verify=False).program("onnx", scheme)

    expected = greedy(folder, scheme)
    model = endless(folder, expected, program.graphs.get("cpu", program.graphs["model"]), tmp_path / "artifact")
    expected.check("onnxruntime-genai", [generate(model, prompt, STEPS)[0] for prompt in expected.prompts])


@shows("genai-own", "greedy", family=of("checkpoint"), scheme="q4")
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_our_operators_run_inside_genai(artifact: Callable[[str], Path], tmp_path: Path, checkpoint: str):
    """As docs/genai.md says: the library lies in the folder, and genai_config.json names it and the graph for it."""
    library = own_library()
    if library is None:
        pytest.skip("our operators cannot be built here: no compiler, or a processor without fast kernels")
    folder = artifact(checkpoint)
    expected = greedy(folder, "q4", kernels="lfm2")
    graph = Artifact.open(folder, verify=False).program("onnx", "q4").graphs["lfm2"]
    model = endless(folder, expected, graph, tmp_path / "artifact", library)
    found = [generate(model, prompt, STEPS)[0] for prompt in expected.prompts]
    same = sum(ours == theirs for ours, theirs in zip(expected.tokens, found, strict=True))
    print(f"{checkpoint}: {same} of {len(found)} continuations are the same to the last token")
    expected.check("onnxruntime-genai", found)


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_the_preferred_program_is_named(artifact: Callable[[str], Path], checkpoint):
    folder = artifact(checkpoint)
    config = json.loads((folder / "genai_config.json").read_text())
    name = config["model"]["decoder"]["filename"]
    program = Artifact.open(folder, verify=False).program("onnx", "q4")
    assert name == program.graphs.get("cpu", program.graphs["model"])
    assert name == {"tiny-moe": "onnx/model_q4_cpu.onnx", "tiny-dense": "onnx/model_q4.onnx"}[checkpoint]
    og.Model(str(folder))  # as it is


@shows("genai", "rows", "padding", family=of("checkpoint"), scheme="fp32")
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_rows_of_different_length(artifact: Callable[[str], Path], tmp_path, checkpoint):
    """genai pads on the right: to it, every token before a row's last one is real."""
    folder = artifact(checkpoint)
    expected = greedy(folder, "fp32")
    model = endless(folder, expected, "onnx/model.onnx", tmp_path / "artifact")
    width = max(map(len, expected.prompts))
    rows = np.array([prompt + [0] * (width - len(prompt)) for prompt in expected.prompts], np.int32)
    expected.check("onnxruntime-genai, a batch,", generate(model, rows, STEPS, batch_size=len(rows)))


@shows("genai", "states", family=of("checkpoint"), scheme="fp32")
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_a_second_turn_goes_on_from_the_state(artifact: Callable[[str], Path], tmp_path, checkpoint):
    folder = artifact(checkpoint)
    expected = greedy(folder, "fp32")
    model = endless(folder, expected, "onnx/model.onnx", tmp_path / "artifact")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=100, do_sample=False)
    generator = og.Generator(model, parameters)
    for turn in (expected.prompts[0], expected.prompts[1][1:]):
        generator.append_tokens(turn)
        for _ in range(4):
            generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    assert found == found[:-4] + generate(model, found[:-4], 4)[0]


@shows("genai", "chat", family=of("checkpoint"), scheme="q4")
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_chat_template_and_tokenizer(artifact: Callable[[str], Path], checkpoint):
    folder = artifact(checkpoint)
    theirs, ours = og.Tokenizer(og.Model(str(folder))), Tokenizer.from_dir(folder)
    text = theirs.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
    assert text == ours.render_chat(MESSAGES)
    assert [int(token) for token in theirs.encode(text)] == ours.encode_chat(MESSAGES)


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_the_example_runs_as_a_program(artifact: Callable[[str], Path], checkpoint):
    command = [sys.executable, EXAMPLE, artifact(checkpoint), "What is a list?", "--max-new-tokens", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert result.stdout.strip()
