"""Programs that call the operator, in ExecuTorch's Python runtime."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lfm2_export.kernels import ops
from tests.kernels import toy_program


@pytest.fixture(scope="module")
def program(toy: Path):
    assert ops.load()
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.pybindings import portable_lib

    return portable_lib._load_for_executorch(str(toy))


def logits_of(program, tokens: list[int], start: int) -> torch.Tensor:
    return program.forward((torch.tensor([tokens]), torch.tensor([start])))[0].clone()


def test_the_program_computes_what_eager_computes(program):
    model, tokens = toy_program.Toy().eval(), [5, 17, 200, 3, 3, 99, 1]
    with torch.no_grad():
        want = [model(torch.tensor([tokens]), torch.tensor([0])), model(torch.tensor([[8]]), torch.tensor([7]))]
    got = [logits_of(program, tokens, 0), logits_of(program, [8], 7)]
    difference = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    print(f"greatest difference {difference:.1e}")
    assert difference < 1e-3


def test_lengths_change_from_call_to_call_and_position_0_starts_anew(program):
    tokens = list(range(1, 41))
    whole = logits_of(program, tokens, 0)
    for size in (1, 3, 39):
        pieces = [logits_of(program, tokens[at : at + size], at) for at in range(0, 40, size)]
        assert (pieces[-1] - whole).abs().max() < 1e-4
    assert torch.equal(logits_of(program, tokens, 0), whole)


def test_the_longest_call_works(program):
    assert logits_of(program, [7] * (toy_program.CONTEXT - 1), 0).isfinite().all()


def test_the_operator_is_loaded_once():
    assert ops.load()
    assert ops.load()
    assert ops.is_loaded()


IN_PLACE = """
import sys, warnings, logging
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
import numpy as np, torch
from executorch.exir import EdgeCompileConfig, to_edge
from lfm2_export.kernels import ops

EXPERTS, WIDTH, INNER = 16, 1024, 1024
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = torch.nn.Buffer(torch.zeros(EXPERTS, INNER // 16, WIDTH // 32, 576, dtype=torch.uint8))
        self.down = torch.nn.Buffer(torch.ones(EXPERTS, WIDTH // 32, INNER // 32, 576, dtype=torch.uint8))
    def forward(self, x, logits):
        return ops.moe_ffn(x, logits, None, self.gate_up, self.down, 2, True, 1.0)

def anonymous_mib():
    fields = dict(line.split()[:2] for line in open("/proc/self/smaps_rollup") if line.count(":") == 1 and "kB" in line)
    return int(fields["Anonymous:"]) / 1024

path = sys.argv[1]
inputs = torch.randn(1, 3, WIDTH), torch.randn(1, 3, EXPERTS)
with torch.no_grad():
    edge = to_edge(torch.export.export(Layer(), inputs), compile_config=EdgeCompileConfig(_check_ir_validity=False))
open(path, "wb").write(edge.to_executorch().buffer)
del edge
assert ops.load()
from executorch.extension.pybindings import portable_lib
before = anonymous_mib()
program = portable_lib._load_for_executorch(path)
program.forward(inputs)
print(f"{anonymous_mib() - before:.1f}")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_are_used_where_the_file_is_mapped(tmp_path: Path):
    path = tmp_path / "layer.pte"
    done = subprocess.run(
        [sys.executable, "-c", IN_PLACE, str(path)], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights, added = path.stat().st_size / 2**20, float(re.findall(r"[-\d.]+", done.stdout)[-1])
    print(f"weights {weights:.0f} MiB, memory added by loading and running {added:.1f} MiB")
    assert weights > 25
    assert added < 8


@pytest.mark.parametrize(("tokens", "start"), [([1] * 128, 10), ([1, 2], 10**6)], ids=["too long", "beyond"])
def test_a_bad_call_is_an_error_and_the_program_survives(program, tokens: list[int], start: int):
    before = logits_of(program, [1, 2, 3], 0)
    with pytest.raises(RuntimeError):
        logits_of(program, tokens, start)
    assert torch.equal(logits_of(program, [1, 2, 3], 0), before)
