"""The runner without Python: the same tokens as the Python runtime, and clear errors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lfm2_export.kernels import build, ops
from tests.kernels import toy_program

PROMPT = [5, 17, 200, 3, 3, 99, 1]


@pytest.fixture(scope="module")
def folder(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """toy.pte and ids.txt."""
    path = tmp_path_factory.mktemp("native")
    shutil.copy(toy, path)
    (path / "ids.txt").write_text(" ".join(map(str, PROMPT)) + "\n")
    return path


def run(
    folder: Path, *arguments: str, model: str = "toy.pte", ids: str = "ids.txt"
) -> subprocess.CompletedProcess[str]:
    command = [str(build.runner_path()), model, "--ids", ids, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)


def greedy_in_python(path: Path, count: int) -> list[int]:
    assert ops.load()
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.pybindings import portable_lib

    program, made, tokens, position = portable_lib._load_for_executorch(str(path)), [], PROMPT, 0
    while len(made) < count and toy_program.END not in made:
        logits = program.forward((torch.tensor([tokens]), torch.tensor([position])))[0]
        position += len(tokens)
        tokens = [int(logits.argmax())]
        made += tokens
    return made


@pytest.mark.parametrize("threads", ["1", "2"])
def test_it_makes_the_tokens_that_the_python_runtime_makes(folder: Path, threads: str):
    done = run(folder, "--max-new-tokens", "60", "--threads", threads)
    assert done.returncode == 0, done.stderr
    made = [int(token) for token in done.stdout.split()]
    assert made == greedy_in_python(folder / "toy.pte", 60)
    assert "tokens/s" in done.stderr
    print(done.stderr)


def test_it_stops_where_the_program_says(folder: Path):
    done = run(folder, "--max-new-tokens", "100")
    made = [int(token) for token in done.stdout.split()]
    assert len(made) < 100
    assert made.index(toy_program.END) == len(made) - 1


@pytest.mark.parametrize(
    ("arguments", "files", "message"),
    [
        (["--max-new-tokens", "4"], {"model": "none.pte"}, "none.pte: no such file"),
        (["--max-new-tokens", "4"], {"ids": "none.txt"}, "none.txt: cannot be read"),
        (["--max-new-tokens", "4"], {"ids": "empty.txt"}, "empty.txt: holds no token ids"),
        (["--max-new-tokens", "4"], {"ids": "words.txt"}, "words.txt: 'two' is not a whole number"),
        (["--max-new-tokens", "4"], {"ids": "high.txt"}, "high.txt: token 251 is beyond the vocabulary of 251"),
        (["--max-new-tokens", "4"], {"model": "cut.pte"}, "cut.pte: is damaged"),
        (["--max-new-tokens", "4"], {"model": "noise.pte"}, "noise.pte: is damaged"),
        (["--max-new-tokens", "122"], {}, "7 tokens and 122 new ones exceed the program's context of 128"),
        (["--max-new-tokens", "4", "--threads", "4096"], {}, "--threads 4096: this machine has"),
        (["--max-new-tokens", "-1"], {}, "--max-new-tokens: '-1' is not a whole number"),
        (["--max-new-tokens"], {}, "--max-new-tokens: has no value"),
        (["--max-new-tokens", "4", "--colour", "red"], {}, "--colour: is not an option"),
        ([], {}, "usage: lfm2_native_run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, arguments: list[str], files: dict, message: str):
    whole = (folder / "toy.pte").read_bytes()
    for name, content in {
        "empty.txt": b"", "words.txt": b"1 two", "high.txt": b"1 251", "cut.pte": whole[: len(whole) // 2],
        "noise.pte": bytes(range(256)) * 99,
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    done = run(folder, *arguments, **files)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lfm2_native_run: ")
    assert message in last


class Hadamard(torch.nn.Module):
    """Calls an operator of ExecuTorch's that the runner does not have."""

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        return torch.ops.llama.fast_hadamard_transform(tokens.float())[None]


class Sum(torch.nn.Module):
    """Has another signature."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


def export_plain(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    from executorch.exir import EdgeCompileConfig, to_edge

    edge = to_edge(torch.export.export(module, inputs), compile_config=EdgeCompileConfig(_check_ir_validity=False))
    path.write_bytes(edge.to_executorch().buffer)


def test_a_missing_operator_is_named(folder: Path):
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    inputs = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    export_plain(Hadamard(), inputs, folder / "hadamard.pte")
    done = run(folder, "--max-new-tokens", "4", model="hadamard.pte")
    assert done.returncode == 2
    assert "llama::fast_hadamard_transform.out" in done.stderr
    assert "hadamard.pte: calls operators that this program was built without" in done.stderr.splitlines()[-1]


def test_a_program_of_another_kind_is_refused(folder: Path):
    export_plain(Sum(), (torch.zeros(2),), folder / "sum.pte")
    done = run(folder, "--max-new-tokens", "4", model="sum.pte")
    assert done.returncode == 2
    assert "sum.pte: is no language model forward(tokens, start_pos) -> logits" in done.stderr
