"""Exported graphs under every kind of padding and batching, driven by onnxruntime alone, over the families' configs.

In fp32 the reference is our eager model on each row alone; the other schemes are compared with their own graph on each
row alone, one token a call, because what they cost in accuracy is measured elsewhere (parity).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lfm2_export.backends.onnx import variants
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import ExportError
from lfm2_export.models import get_net
from lfm2_export.models.decoder import DecoderForCausalLM
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.graphs import Graph, State, pad
from tests.shows import of, shows

CONTEXT = 40
CONV, ATTENTION, SLIDING = "conv", "full_attention", "sliding_attention"

# Few layers, for each trace takes seconds; each config combines features that do not hide each other's errors.
CONFIGS: dict[str, dict[str, Any]] = {
    "moe": tiny_config(
        "lfm2_moe",
        layer_types=[CONV, ATTENTION, CONV],
        num_hidden_layers=3,
        moe_intermediate_size=64,
    ),
    "moe-bare-router": tiny_config(
        "lfm2_moe",
        layer_types=[CONV, ATTENTION, CONV],
        num_hidden_layers=3,
        conv_L_cache=7,
        conv_bias=True,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        use_expert_bias=False,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        num_experts_per_tok=1,
        tie_word_embeddings=False,
    ),
    "moe-every-expert": tiny_config(
        "lfm2_moe",
        layer_types=[ATTENTION, CONV],
        num_hidden_layers=2,
        conv_L_cache=4,
        num_key_value_heads=1,
        head_dim=24,
        num_experts_per_tok=4,
        routed_scaling_factor=0.7,
        num_dense_layers=0,
    ),
    "moe-all-dense": tiny_config(
        "lfm2_moe",
        layer_types=[CONV, ATTENTION],
        num_hidden_layers=2,
        num_dense_layers=2,
        conv_L_cache=5,
        tie_word_embeddings=False,
    ),
    "dense": tiny_config(
        "lfm2",
        layer_types=[ATTENTION, CONV, ATTENTION],
        num_hidden_layers=3,
        conv_L_cache=2,
        conv_bias=True,
        num_key_value_heads=1,
        head_dim=16,
    ),
    "no-conv": tiny_config(
        "lfm2",
        layer_types=[ATTENTION, ATTENTION],
        num_hidden_layers=2,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "lfm3": tiny_config("lfm3", layer_types=[CONV, SLIDING, ATTENTION, SLIDING], num_hidden_layers=4, sliding_window=5),
    "lfm3-bare": tiny_config(
        "lfm3",
        layer_types=[SLIDING, CONV],
        num_hidden_layers=2,
        sliding_window=3,
        head_dim=24,
        conv_bias=True,
        attention_bias=True,
        use_attention_gate=False,
        use_sandwich_norm=False,
        tie_word_embeddings=False,
    ),
    "no-attention": tiny_config("lfm2", layer_types=[CONV, CONV], num_hidden_layers=2, conv_L_cache=6),
}
CONFIGS = {name: config | {"max_position_embeddings": CONTEXT} for name, config in CONFIGS.items()}

# Largest logit difference allowed between a row in a batch and the row alone, as a share of the logits' spread. In int8
# kernels a last bit can push an activation over a rounding step, and that makes a random router pick another expert at
# one position in ten: hence CLEAR, the share of positions that must be so close. Padding concerns three rows of four.
CLEAR = 0.5
TOLERANCE = {"fp16": 0.02, "q8": 0.05, "q4": 0.05, "q4f16": 0.05}
FP32_TOLERANCE = 1e-4

Logits = Callable[[np.ndarray], np.ndarray]


class Case:
    """A graph, and what its logits [T, V] must be on one row alone."""

    def __init__(self, name: str, graph: Graph, alone: Logits, tolerance: float):
        self.name, self.graph, self.alone, self.tolerance = name, graph, alone, tolerance
        self.vocab_size = CONFIGS[name.split()[0]]["vocab_size"]

    def rows(self, *lengths: int) -> list[np.ndarray]:
        rng = np.random.default_rng(sum(lengths))
        return [rng.integers(0, self.vocab_size, length) for length in lengths]

    def check(self, what: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        found, expected = (np.stack(part) for part in zip(*pairs, strict=True))
        assert np.isfinite(found).all()
        exact = self.tolerance == FP32_TOLERANCE
        errors = np.abs(found - expected).reshape(-1, found.shape[-1]).max(-1)
        print(f"{self.name}: {what}: largest logit error {errors.max():.2e}, logits spread {np.ptp(expected):.1f}")
        close = errors <= self.tolerance * (1.0 if exact else np.ptp(expected))
        assert close.all() if exact else close.mean() >= CLEAR


def eager_logits(checkpoint: Path) -> Logits:
    opened = open_checkpoint(checkpoint)
    model: DecoderForCausalLM = get_net(opened.config.model_type).from_pretrained(checkpoint)

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    return logits


@pytest.fixture(scope="module", params=CONFIGS)
def fp32(request: pytest.FixtureRequest, random_artifact: Callable[..., Any]) -> Case:
    made = random_artifact(CONFIGS[request.param])
    return Case(request.param, Graph(made.artifact, "fp32"), eager_logits(made.checkpoint), FP32_TOLERANCE)


QUANTIZED = [
    *(("moe", scheme) for scheme in TOLERANCE),
    ("moe-bare-router", "q8"),
    ("moe-bare-router", "q4f16"),
    ("moe-every-expert", "q4"),
    ("dense", "q4"),
    ("dense", "q8"),
    ("no-conv", "q4f16"),
    ("no-attention", "fp16"),
    ("lfm3", "q4"),
    ("lfm3", "q4f16"),
]
# Graphs on our operators; the keys and values of a row are the same numbers in int8 too, whatever stands beside it.
OWN = [("moe", "q4", "lfm2"), ("moe", "q8", "lfm2_kv8"), ("dense", "q4", "lfm2_kv8"), ("dense", "q8", "lfm2")]
OWN += [("lfm3", "q4", "lfm2"), ("lfm3", "q4", "lfm2_kv8")]
OTHERS = [*((*case, "model") for case in QUANTIZED), *OWN]


@pytest.fixture(scope="module", params=OTHERS, ids="-".join)
def other(request: pytest.FixtureRequest, random_artifact: Callable[..., Any]) -> Case:
    name, scheme, role = request.param
    if role != "model" and variants.own_library() is None:
        pytest.skip("our operators cannot be had here")
    made = random_artifact(CONFIGS[name], [s for n, s in QUANTIZED if n == name])
    graph = Graph(made.artifact, scheme, role)
    return Case(f"{name} {scheme} {role}", graph, graph.alone, TOLERANCE[scheme])


# For ``shows``: which of the families a config is of.
FAMILY = of("fp32", lambda name: CONFIGS[name]["model_type"])


def prefill_and_decode(case: Case) -> None:
    (row,) = case.rows(17)
    expected = case.alone(row)
    logits, state = case.graph(row[None, :9], np.ones((1, 9)), case.graph.empty(1))
    pairs = [(logits[0, 0], expected[8])]
    for position in range(9, 17):
        logits, state = case.graph(row[None, position : position + 1], np.ones((1, position + 1)), state)
        pairs.append((logits[0, 0], expected[position]))
    case.check("prefill and decode", pairs)


def chunks(case: Case) -> None:
    (row,) = case.rows(19)
    expected, state, end, pairs = case.alone(row), case.graph.empty(1), 0, []
    for count in (3, 1, 2, 1, 7, 5):
        ids = row[None, end : end + count]
        end += count
        logits, state = case.graph(ids, np.ones((1, end)), state)
        pairs.append((logits[0, 0], expected[end - 1]))
    case.check("chunks of one row", pairs)


def padded_rows(case: Case, side: str, lengths: tuple[int, ...] = (11, 4, 1, 7), steps: int = 9) -> None:
    """A padded prefill, then decoding as transformers does it: one more column of ones a step."""
    rows = case.rows(*(length + steps for length in lengths))
    expected = [case.alone(row) for row in rows]
    ids, mask = pad([row[:length] for row, length in zip(rows, lengths, strict=True)], side)
    logits, state = case.graph(ids, mask, case.graph.empty(len(rows)))
    pairs = [(logits[b, 0], expected[b][length - 1]) for b, length in enumerate(lengths)]
    for step in range(steps):
        mask = np.concatenate([mask, np.ones((len(rows), 1), mask.dtype)], axis=1)
        ids = np.array([[row[length + step]] for row, length in zip(rows, lengths, strict=True)])
        logits, state = case.graph(ids, mask, state)
        pairs += [(logits[b, 0], expected[b][length + step]) for b, length in enumerate(lengths)]
    case.check(f"{side} padding {lengths}", pairs)


def compact_rows(case: Case, lengths: tuple[int, ...] = (11, 4, 1, 7), steps: int = 9) -> None:
    """A right padded prefill, then decoding in shared buffers: each row's token goes to the row's own next slot."""
    rows = case.rows(*(length + steps for length in lengths))
    expected = [case.alone(row) for row in rows]
    ids, mask = pad([row[:length] for row, length in zip(rows, lengths, strict=True)], "right")
    state: State
    _, state = case.graph(ids, mask, case.graph.empty(len(rows)))
    state, pairs = case.graph.with_capacity(state, CONTEXT), []
    for step in range(steps):
        held = np.array(lengths) + step + 1
        ids = np.array([[row[length + step]] for row, length in zip(rows, lengths, strict=True)])
        logits, state = case.graph.in_place(ids, np.arange(held.max()) < held[:, None], state)
        pairs += [(logits[b, 0], expected[b][length + step]) for b, length in enumerate(lengths)]
    case.check("rows of different length in shared buffers", pairs)


def up_to_the_last_position(case: Case) -> None:
    (row,) = case.rows(CONTEXT)
    expected = case.alone(row)
    logits, _ = case.graph(row[None], np.ones((1, CONTEXT)), case.graph.empty(1))
    pairs = [(logits[0, 0], expected[-1])]
    _, state = case.graph(row[None, :-2], np.ones((1, CONTEXT - 2)), case.graph.empty(1))
    state = case.graph.with_capacity(state, CONTEXT)
    for position in (CONTEXT - 2, CONTEXT - 1):
        ids, mask = row[None, position : position + 1], np.ones((1, position + 1))
        logits, state = case.graph.in_place(ids, mask, state)
        pairs.append((logits[0, 0], expected[position]))
    case.check("last position of the context", pairs)


@shows("onnxruntime", "logits", family=FAMILY, scheme="fp32")
def test_prefill_and_decode(fp32):
    prefill_and_decode(fp32)


@shows("onnxruntime", "chunks", family=FAMILY, scheme="fp32")
def test_chunked_prefill(fp32):
    chunks(fp32)


@shows("onnxruntime", "padding", family=FAMILY, scheme="fp32")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_then_decode(fp32, side):
    padded_rows(fp32, side)


def test_rows_of_one_token(fp32):
    padded_rows(fp32, "left", lengths=(1, 1, 1), steps=3)


@shows("onnxruntime", "rows", family=FAMILY, scheme="fp32")
def test_rows_of_different_length_in_shared_buffers(fp32):
    compact_rows(fp32)


def test_rows_of_one_token_in_shared_buffers(fp32):
    compact_rows(fp32, lengths=(1, 1), steps=3)


def test_last_position_of_the_context(fp32):
    up_to_the_last_position(fp32)


@shows(
    of("other", lambda case: "onnxruntime" if case[2] == "model" else "onnxruntime-own"),
    "chunks",
    "padding",
    "rows",
    family=of("other", lambda case: CONFIGS[case[0]]["model_type"]),
    scheme=of("other", lambda case: case[1]),
)
def test_other_schemes_give_each_row_what_it_gets_alone(other):
    prefill_and_decode(other)
    chunks(other)
    padded_rows(other, "left")
    padded_rows(other, "right")
    compact_rows(other)
    up_to_the_last_position(other)
    every_position(other)


def every_position(case: Case) -> None:
    """The scoring graph, which has the kernels of the graph that ships for CPUs."""
    program, folder = case.graph.program, case.graph.path.parents[1]
    own = case.graph.role in ("lfm2", "lfm2_kv8")
    scoring = Graph(folder, program.scheme, f"{case.graph.role}_scoring" if own else "scoring")
    shipped = case.graph if own else Graph(folder, program.scheme, "cpu" if "cpu" in program.graphs else "model")
    rows = np.stack(case.rows(12, 12))
    logits, state = scoring(rows, np.ones((2, 12)), scoring.empty(2))
    assert logits.shape == (2, 12, case.vocab_size)
    case.check("scoring graph", list(zip(logits, map(case.alone, rows), strict=True)))
    last, present = shipped(rows, np.ones((2, 12)), shipped.empty(2))
    np.testing.assert_allclose(logits[:, -1:], last, atol=1e-5 if case.tolerance == FP32_TOLERANCE else 2e-2)
    for name in present:
        np.testing.assert_array_equal(state[name], present[name])


def test_scoring_graph_gives_every_position(fp32):
    every_position(fp32)


def test_a_wrong_mask_is_noticed(fp32):
    """The control: a padding token that passes as real changes the logits."""
    rows = fp32.rows(6, 2)
    ids, mask = pad(rows, "left")
    logits, _ = fp32.graph(ids, mask, fp32.graph.empty(2))
    wrong, _ = fp32.graph(ids, np.ones_like(mask), fp32.graph.empty(2))
    np.testing.assert_allclose(wrong[0], logits[0], atol=FP32_TOLERANCE)
    assert np.abs(wrong[1] - logits[1]).max() > 100 * FP32_TOLERANCE


def test_head_dim_that_no_kernel_takes_is_refused_by_name(tmp_path):
    import lfm2_export

    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tiny_config("lfm2", head_dim=12), seed=0)
    with pytest.raises(ExportError, match=r"head_dim=12: GroupQueryAttention takes multiples of 8"):
        lfm2_export.export(checkpoint, scheme="fp32", output=tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
