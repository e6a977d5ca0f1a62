"""OnnxRunner, generation and conversations on a really exported program (tiny-moe, fp32) against transformers'
model."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.chat import Chat
from lfm2_export.generation import complete
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.text import Tokenizer
from tests.checkpoints import tiny_config
from tests.shows import shows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHECKPOINT = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(artifact) -> Path:
    return artifact("tiny-moe")


@pytest.fixture(scope="module")
def loaded(folder) -> Runner:
    return lfm2_export.load_runner(folder, scheme="fp32", threads=1)


@pytest.fixture
def runner(loaded) -> Runner:
    loaded.reset()
    return loaded


@pytest.fixture(scope="module")
def eager():
    """Logits [T, V] of a row by transformers' own model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    return logits


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(16, 2660, length).tolist()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    worst = np.abs(found - expected).max()
    print(f"max abs error {worst:.1e}")
    assert worst <= TOLERANCE


@shows("ours", "logits", "chunks", family="lfm2_moe", scheme="fp32")
@pytest.mark.parametrize("chunk_size", [None, 16, 1])
def test_prefill_and_decode_equal_transformers(runner, eager, chunk_size):
    tokens = prompt(60)
    expected = eager(tokens)
    assert_close(runner.prefill([tokens[:40]], chunk_size=chunk_size)[0], expected[39])
    for position in range(40, 60):
        assert_close(runner.decode([tokens[position]])[0], expected[position])


@shows("ours", "rows", family="lfm2_moe", scheme="fp32")
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_rows_of_different_length_equal_transformers(runner, eager, chunk_size):
    rows = [prompt(30, 1), prompt(7, 2), prompt(90, 3), prompt(1, 4)]
    runner.reset(4)
    assert_close(runner.prefill(rows, chunk_size=chunk_size), np.stack([eager(row)[-1] for row in rows]))
    for step in range(20):
        tokens = prompt(4, 100 + step)
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        found = runner.decode(tokens)
    assert_close(found, np.stack([eager(row)[-1] for row in rows]))
    more = [prompt(1, 5), prompt(40, 6), prompt(3, 7), prompt(20, 8)]
    found = runner.prefill(more, chunk_size=chunk_size)
    assert_close(found, np.stack([eager(row + tail)[-1] for row, tail in zip(rows, more, strict=True)]))
    runner.reorder([3, 1, 3])
    found = runner.decode([20, 21, 22])
    rows = [row + tail for row, tail in zip(rows, more, strict=True)]
    assert_close(found, np.stack([eager([*rows[i], t])[-1] for i, t in ((3, 20), (1, 21), (3, 22))]))


def test_every_position_equals_transformers(runner, eager):
    rows = [prompt(50, 1), prompt(50, 2)]
    assert_close(runner.score(rows, chunk_size=16), np.stack([eager(row) for row in rows]))


@shows("ours", "states", family="lfm2_moe", scheme="fp32")
def test_snapshot_and_rewind_equal_transformers(folder, runner, eager):
    start = prompt(25, 1)
    runner.prefill([start])
    snapshot, mark = runner.snapshot(), runner.mark()
    runner.prefill([prompt(70, 2)])
    runner.rewind(mark)
    expected = eager([*start, 33])[-1]
    assert_close(runner.decode([33])[0], expected)
    other = lfm2_export.load_runner(folder, scheme="fp32", threads=1)
    for target in (runner, other):
        target.restore(snapshot)
        assert_close(target.decode([33])[0], expected)


def test_the_whole_context_can_be_used(runner, eager):
    tokens = prompt(runner.context_length)
    runner.prefill([tokens[:-1]])
    assert_close(runner.decode([tokens[-1]])[0], eager(tokens)[-1])


@shows("ours", "greedy", "chat", family="lfm2_moe", scheme="fp32")
def test_greedy_generation_equals_transformers(folder, runner, eager):
    tokenizer = Tokenizer.from_dir(folder)
    row = tokenizer.encode_chat([{"role": "user", "content": "What is a list?"}])
    config = GenerationConfig.from_file(folder / "generation_config.json").override(
        max_new_tokens=32, stop_token_ids=()
    )
    (result,) = complete(runner, [row], config)
    for _ in range(32):
        row.append(int(eager(row)[-1].argmax()))
    assert result.tokens == row[-32:]


def test_a_conversation_that_keeps_its_state_equals_one_that_does_not(folder, runner):
    tokenizer = Tokenizer.from_dir(folder)
    config = GenerationConfig.from_file(folder / "generation_config.json").override(max_new_tokens=24)
    chat = Chat(runner, tokenizer, config)
    replies = ["".join(chat.send(text)) for text in ("What is a list?", "And a tuple?")]
    assert chat.prefilled_tokens < 30
    again = "".join(chat.regenerate())
    edited = "".join(chat.edit("And a dict?"))
    other = Chat(lfm2_export.load_runner(folder, scheme="fp32", threads=1), tokenizer, config)
    assert ["".join(other.send("What is a list?")), "".join(other.send("And a tuple?"))] == replies
    assert again == replies[1]
    other.clear()
    assert ["".join(other.send("What is a list?")), "".join(other.send("And a dict?"))] == [replies[0], edited]


SHAPES = {
    "no_attention": {"layer_types": ["conv"] * 3, "num_hidden_layers": 3},
    "no_conv": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
    "wide_conv": {"conv_L_cache": 7, "conv_bias": True, "num_key_value_heads": 1},
}


@shows("ours", "logits", "chunks", "rows", "states", family="lfm2", scheme="fp32")
@pytest.mark.parametrize("shape", SHAPES)
def test_states_of_other_shapes_equal_transformers(random_artifact, shape):
    """Without attention transformers cannot generate, but its forward pass is there to compare with."""
    made = random_artifact(tiny_config("lfm2", **SHAPES[shape]))
    model = transformers.AutoModelForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32).eval()
    runner = lfm2_export.load_runner(made.artifact, threads=1)
    rows = [np.random.default_rng(seed).integers(3, 131, size).tolist() for seed, size in enumerate((80, 9, 1))]

    def expected() -> np.ndarray:
        with torch.no_grad():
            return np.stack([model(torch.tensor([row]), use_cache=False).logits[0, -1].numpy() for row in rows])

    runner.reset(3)
    assert_close(runner.prefill(rows), expected())
    for token in (5, 6, 7):
        rows = [[*row, token] for row in rows]
        found = runner.decode([token] * 3)
    assert_close(found, expected())
    rows = [[*row, 8, 9, 10] for row in rows]
    assert_close(runner.prefill([[8, 9, 10]] * 3, chunk_size=2), expected())
    snapshot = runner.snapshot()
    runner.reset()
    runner.restore(snapshot)
    runner.reorder([2, 0])
    rows = [[*rows[2], 11], [*rows[0], 12]]
    assert_close(runner.decode([11, 12]), expected())


def test_running_an_artifact_imports_no_torch(folder):
    program = f"""
        import sys, lfm2_export
        from lfm2_export.generation import complete
        runner = lfm2_export.load_runner({str(folder)!r}, scheme="fp32", threads=1)
        tokenizer = lfm2_export.Tokenizer.from_dir({str(folder)!r})
        config = lfm2_export.GenerationConfig(max_new_tokens=4)
        print("".join(lfm2_export.Chat(runner, tokenizer, config).send("Hello")))
        heavy = {{"torch", "transformers", "onnx", "safetensors", "huggingface_hub"}} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)
