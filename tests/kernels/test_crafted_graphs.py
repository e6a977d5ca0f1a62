"""Shipped graphs whose operators were tampered with, hashed again so that the manifest agrees: refused, never run.

Each runs in a process of its own, which opens the graphs of our operators whatever the processor's fastest kernels are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from lfm2_export.kernels import build

pytestmark = pytest.mark.skipif(build.tools() is None, reason="no compiler for our operators")

FOLDER = Path(__file__).parents[2]
OURS = """
import sys
from lfm2_export.backends.onnx import variants
from lfm2_export.kernels import build
ours = variants.OwnKernels(library=build.onnx_library_path())  # on a processor without fast kernels too
variants.own_kernels = lambda: ours
"""
CLI = "from lfm2_export import cli; sys.exit(cli.main(sys.argv[1:]))"
# At 32 tokens a FeedForward of a wrapped width once wrote out of bounds; at other lengths it ran out of memory.
LENGTHS = ("1", "31", "32", "33", "64")
PREFILL = """
import lfm2_export
from lfm2_export.errors import Lfm2ExportError
for length in map(int, sys.argv[2:]):
    try:
        lfm2_export.load_runner(sys.argv[1], scheme="q4", threads=1).prefill([[5] * length])
        print("ran")
    except Lfm2ExportError as error:
        print(error)
"""
# Every attribute of one node of each operator, raised until some product wraps.
EVERY_ATTRIBUTE = """
import os, onnx, onnxruntime
from lfm2_export.backends.onnx.session import session_options
path = sys.argv[1]
graph = onnx.load(path, load_external_data=False)
nodes = {node.op_type: node for node in graph.graph.node if node.domain == "lfm2"}
refused = 0
for op, node in nodes.items():
    for attribute in node.attribute:
        if attribute.type != onnx.AttributeProto.INT or attribute.name == "normalize":
            continue
        was = attribute.i
        for bit in (32, 61, 62, 63):
            attribute.i = (was + (1 << bit) + (1 << 63)) % (1 << 64) - (1 << 63)
            spoilt = f"{path}.spoilt.onnx"
            with open(spoilt, "wb") as file:
                file.write(graph.SerializeToString())
            try:
                onnxruntime.InferenceSession(spoilt, session_options(1, build.onnx_library_path()))
            except Exception as error:
                assert f"{op}: " in str(error), (op, attribute.name, bit, str(error))
                refused += 1
            else:
                raise AssertionError(f"{op} with {attribute.name} raised by 2^{bit} was opened")
        attribute.i = was
print(sorted(nodes), refused)
"""


def tampered(folder: Path, into: Path, graphs: tuple[str, ...], change: Callable[[Any], None]) -> Path:
    """A copy of an artifact with another graph and a manifest that agrees with it."""
    shutil.copytree(folder, into)
    manifest = json.loads((into / "lfm2_export.json").read_text())
    program = next(p for p in manifest["programs"] if (p["backend"], p["scheme"]) == ("onnx", "q4"))
    for role in graphs:
        name = program["graphs"][role]
        model = onnx.load(into / name, load_external_data=False)
        change(model)
        data = model.SerializeToString()
        (into / name).write_bytes(data)
        program["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (into / "lfm2_export.json").write_text(json.dumps(manifest))
    return into


def raised_inner(model: Any) -> None:
    found = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "FeedForward" and attribute.name == "inner":
                attribute.i += 1 << 62
                found += 1
    assert found


def in_a_process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OURS + code, *map(str, arguments)],
        cwd=FOLDER,
        env=os.environ | {"PYTHONPATH": str(FOLDER), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def crafted(artifact: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("crafted") / "artifact"
    return tampered(artifact("tiny-dense"), into, ("lfm2", "lfm2_kv8", "lfm2_scoring"), raised_inner)


def test_an_inner_width_that_wraps_is_refused_at_every_length(crafted: Path) -> None:
    done = in_a_process(PREFILL, crafted, *LENGTHS)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    print(lines[0])
    assert len(lines) == len(LENGTHS)
    assert all("FeedForward: inner is 4611686018427388" in line for line in lines)


@pytest.mark.parametrize("options", [(), ("--kv-cache", "int8")], ids=["float cache", "int8 cache"])
def test_the_command_line_says_so_in_one_line(crafted: Path, options: tuple[str, ...]) -> None:
    done = in_a_process(CLI, "run", crafted, "--scheme", "q4", "--raw", "--prompt", "a b c d e f g h", *options)
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    (line,) = done.stderr.splitlines()
    print(line)
    assert "FeedForward: inner is 4611686018427388" in line
    assert done.stdout == ""


def test_what_was_not_tampered_with_runs(artifact: Callable[[str], Path]) -> None:
    """The control."""
    done = in_a_process(PREFILL, artifact("tiny-dense"), "32")
    assert done.stdout.split() == ["ran"], done.stderr[-2000:]


@pytest.mark.parametrize(("checkpoint", "role"), [("tiny-dense", "lfm2"), ("tiny-moe", "lfm2_kv8")])
def test_every_attribute_that_wraps_is_refused_when_the_graph_is_opened(
    artifact: Callable[[str], Path], tmp_path: Path, checkpoint: str, role: str
) -> None:
    folder = artifact(checkpoint) / "onnx"
    for file in folder.glob("model_q4*"):
        if "_data" in file.name or file.name == f"model_q4_{role}.onnx":
            shutil.copy(file, tmp_path)
    done = in_a_process(EVERY_ATTRIBUTE, tmp_path / f"model_q4_{role}.onnx")
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout.strip())
    assert "MatMulNBits" in done.stdout
    assert ("AttentionInt8" if role == "lfm2_kv8" else "'Attention'") in done.stdout
