"""Transformers.js opens an artifact's folder as it is and gives our runner's greedy tokens, in Node and as in a
browser.

Needs node, and the packages that ``examples/transformers_js/package-lock.json`` names:
``cd examples/transformers_js && ONNXRUNTIME_NODE_INSTALL=skip npm ci``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfm2_export.text import Tokenizer
from tests.runtimes.greedy import FAMILIES, PROMPTS, SCHEMES, Greedy, greedy
from tests.shows import of, shows

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers_js"
MODULES = EXAMPLE / "node_modules"
DRIVER = Path(__file__).with_name("transformers.mjs")
INSTALL = "cd examples/transformers_js && ONNXRUNTIME_NODE_INSTALL=skip npm ci"
WHERE = {"native": "js-node", "wasm": "js-wasm"}  # for ``shows``
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
TEXTS = [*PROMPTS[:3], "naïve café ✓ 日本", "  two  spaces\n\n\tand a tab"]

pytestmark = [
    pytest.mark.skipif(
        shutil.which("node") is None, reason="node is not installed (Transformers.js wants 20 or newer)"
    ),
    pytest.mark.skipif(
        not (MODULES / "@huggingface" / "transformers").is_dir(), reason=f"Transformers.js is not installed: {INSTALL}"
    ),
]


def run(folder: Path, dtype: str | None, expected: Greedy, where: str) -> dict[str, Any]:
    job = {
        "folder": str(folder),
        "dtype": dtype,
        "prompts": expected.prompts,
        "steps": len(expected.tokens[0]),
        "messages": MESSAGES,
        "texts": TEXTS,
    }
    command = ["node", DRIVER, MODULES, where]
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=240)
    if where == "webgpu" and "Failed to get a WebGPU adapter" in result.stderr:
        pytest.skip("no GPU that WebGPU could use; Mesa 25's software Vulkan driver (mesa-vulkan-drivers) is enough")
    # A minified source line precedes the message.
    assert result.returncode == 0, "\n".join(line[:300] for line in result.stderr.splitlines())
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@shows("js-node", "greedy", "chat", "padding", family=of("checkpoint"), scheme=of("scheme", lambda s: s or "q4"))
@pytest.mark.parametrize("scheme", [*SCHEMES, None], ids=str)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_same_greedy_tokens(artifact: Callable[[str], Path], checkpoint, scheme):
    """dtype None: what transformers.js_config in config.json names, q4."""
    folder = artifact(checkpoint)
    expected = greedy(folder, scheme or "q4")
    found = run(folder, scheme, expected, "native")
    expected.check("Transformers.js", found["tokens"])
    check_text(folder, found)


@shows("js-wasm", "greedy", "chat", "padding", family=of("checkpoint"), scheme=of("scheme"))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_same_greedy_tokens_on_wasm(artifact: Callable[[str], Path], checkpoint, scheme):
    folder = artifact(checkpoint)
    expected = greedy(folder, scheme).part(prompts=3, steps=16)
    found = run(folder, scheme, expected, "wasm")
    expected.check("Transformers.js on wasm", found["tokens"])
    check_text(folder, found)


@shows(of("where", WHERE.get), "greedy", family=of("checkpoint"), scheme=of("scheme"))
@pytest.mark.parametrize(
    ("checkpoint", "where"), [("tiny-moe", "native"), ("tiny-moe", "wasm"), ("tiny-dense", "native")]
)
@pytest.mark.parametrize("scheme", ["fp16", "q4f16"])
def test_float16_programs_run(artifact: Callable[[str], Path], scheme, checkpoint, where):
    folder = artifact(checkpoint)
    expected = greedy(folder, scheme).part(prompts=3, steps=16)
    found = run(folder, scheme, expected, where)
    expected.check(f"Transformers.js {where}", found["tokens"])


@shows("js-webgpu", "greedy", family=of("checkpoint"), scheme="q4f16")
@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_same_greedy_tokens_on_webgpu(artifact: Callable[[str], Path], checkpoint):
    """No dtype: what config.json names for this device, q4f16."""
    folder = artifact(checkpoint)
    expected = greedy(folder, "q4f16").part(prompts=3, steps=16)
    found = run(folder, None, expected, "webgpu")
    expected.check("Transformers.js on WebGPU", found["tokens"])


def check_text(folder: Path, found: dict[str, Any]) -> None:
    """Its tokenizer and chat template agree with ours, and a batch, padded by it, gives what each text gives alone."""
    tokenizer = Tokenizer.from_dir(folder)
    assert found["encoded"] == [tokenizer.encode(text) for text in TEXTS]
    assert found["rendered"] == tokenizer.render_chat(MESSAGES)
    assert found["chatIds"] == tokenizer.encode_chat(MESSAGES)
    assert found["together"] == found["alone"]
    assert all(text.startswith(prompt) for text, prompt in zip(found["alone"], TEXTS, strict=True))
    assert found["reply"]["role"] == "assistant"
    assert found["reply"]["content"]


def test_the_example_runs(artifact: Callable[[str], Path]):
    command = ["node", EXAMPLE / "generate.mjs", artifact("tiny-moe"), "What is a list?", "", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    print(result.stdout)
    assert result.stdout.strip()


def test_the_lock_file_names_the_tested_release():
    lock = json.loads((EXAMPLE / "package-lock.json").read_text())
    wanted = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]
    assert wanted == {"@huggingface/transformers": "4.3.1"}
    assert lock["packages"]["node_modules/@huggingface/transformers"]["version"] == "4.3.1"
    assert not [name for name, entry in lock["packages"].items() if name and not entry.get("integrity")]
