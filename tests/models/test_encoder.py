"""The eager encoders against ones that are spelled out, and padding: a row is what it is alone, whatever it is with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.errors import CheckpointError
from lfm2_export.heads import EncoderHead, Pooling
from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.models.lfm2_bidirectional import Lfm2BidirectionalModel
from lfm2_export.models.loading import load_encoder_model
from tests import encoder_reference as reference
from tests.encoder_checkpoints import COLBERT, EMBEDDING, KINDS, MASKED_LM, WIDTH, write_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

# Hidden states lie within 5, logits within 30.
TOLERANCE = 1e-5
LOGITS_TOLERANCE = 1e-4
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"conv_L_cache_{width}": {"conv_L_cache": width} for width in (2, 4, 5, 7)},
    "conv_bias": {"conv_bias": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "no_shared_heads": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 24},
    "theta": {"rope_theta": 1e4},
    "no_attention": {"layer_types": ["conv"] * 3},
    "no_conv": {"layer_types": ["full_attention"] * 3},
}


def ids_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 2600, count)


@torch.no_grad()
def run(model: Lfm2BidirectionalModel, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    found = model(torch.from_numpy(ids), None if mask is None else torch.from_numpy(mask)).named()
    return {name: value.numpy() for name, value in found.items()}


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        error = np.abs(found[name] - values).max()
        print(f"{name}: {error:.1e}")
        assert error < (LOGITS_TOLERANCE if name == "logits" else TOLERANCE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return lambda kind: folder / kind if (folder / kind).exists() else write_encoder(folder / kind, kind)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_are_those_of_the_reference(tmp_path: Path, case: str) -> None:
    folder = write_encoder(tmp_path, EMBEDDING, **CASES[case])
    model = Lfm2BidirectionalModel.from_pretrained(folder)
    for tokens in (1, 2, 19):
        ids = ids_of(tokens)
        found = {name: value[0] for name, value in run(model, ids[None]).items()}
        check(found, reference.outputs(folder, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_is_that_of_the_reference(checkpoint: Callable[[str], Path], kind: str) -> None:
    folder = checkpoint(kind)
    model = load_encoder_model(open_checkpoint(folder))
    ids = ids_of(600)
    found = {name: value[0] for name, value in run(model, ids[None]).items()}
    expected = reference.outputs(folder, ids)
    check(found, expected)
    last = list(expected)[-1]
    backwards = reference.outputs(folder, ids[::-1])
    assert np.abs(found[last] - backwards[last]).max() > 0.05, "the comparison can fail"


def test_every_token_sees_those_behind_it(checkpoint: Callable[[str], Path]) -> None:
    model = load_encoder_model(open_checkpoint(checkpoint(EMBEDDING)))
    ids = ids_of(12)
    other = np.append(ids[:-1], 7)
    found, changed = (run(model, one[None])["last_hidden_state"][0] for one in (ids, other))
    assert np.all(np.abs(found - changed).max(-1) > 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (2, 3)])
def test_a_padded_row_is_what_it_is_alone(checkpoint: Callable[[str], Path], kind: str, left: int, right: int) -> None:
    model = load_encoder_model(open_checkpoint(checkpoint(kind)))
    for tokens in (1, 9):
        ids, noise = ids_of(tokens), ids_of(left + right, seed=1)
        batch = np.concatenate([noise[:left], ids, noise[left:]])[None]
        mask = np.array([[0] * left + [1] * tokens + [0] * right])
        found = run(model, batch, mask)
        own = {k: v[0] if k == "sentence_embedding" else v[0, left : left + tokens] for k, v in found.items()}
        check(own, reference.outputs(checkpoint(kind), ids))
        if kind == COLBERT:
            assert not found["token_embeddings"][mask == 0].any(), "padding has no vector"
        unmasked = run(model, batch)["last_hidden_state"][0, left : left + tokens]
        assert np.abs(unmasked - own["last_hidden_state"]).max() > 0.01, "the comparison can fail"


def test_padding_between_tokens_is_passed_over(checkpoint: Callable[[str], Path]) -> None:
    model = load_encoder_model(open_checkpoint(checkpoint(EMBEDDING)))
    ids = ids_of(7)
    mask = np.array([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]])
    batch = np.full((1, 11), 5)
    batch[mask == 1] = ids
    found = run(model, batch, mask)["last_hidden_state"][mask == 1]
    check(
        {"last_hidden_state": found},
        {"last_hidden_state": reference.outputs(checkpoint(EMBEDDING), ids)["last_hidden_state"]},
    )


def test_expansion_is_seen_by_convolutions_and_by_no_query(checkpoint: Callable[[str], Path]) -> None:
    """PyLate's queries: tokens behind the text that have vectors of their own and are not attended to."""
    folder = checkpoint(COLBERT)
    model = load_encoder_model(open_checkpoint(folder))
    ids, attended = ids_of(12), np.arange(12) < 8
    found = run(model, ids[None], np.where(attended, 1, 2)[None])
    check({name: value[0] for name, value in found.items()}, reference.outputs(folder, ids, attended))
    padding = run(model, ids[None], attended.astype(int)[None])["token_embeddings"][0, :8]
    assert np.abs(padding - found["token_embeddings"][0, :8]).max() > 1e-3, "padding is something else"


def test_a_row_of_nothing_but_padding_is_finite(checkpoint: Callable[[str], Path]) -> None:
    for kind in KINDS:
        model = load_encoder_model(open_checkpoint(checkpoint(kind)))
        found = run(model, ids_of(6).reshape(2, 3), np.array([[1, 1, 1], [0, 0, 0]]))
        assert all(np.isfinite(value).all() for value in found.values())


def test_mean_pooling_leaves_padding_out(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, EMBEDDING)
    (folder / "1_Pooling/config.json").write_text('{"embedding_dimension": 64, "pooling_mode": "mean"}')
    opened = open_checkpoint(folder)
    assert opened.config.encoder == EncoderHead(pooling=Pooling.MEAN)
    ids = ids_of(5)
    batch, mask = np.append(ids, [9, 9])[None], np.array([[1] * 5 + [0] * 2])
    found = run(load_encoder_model(opened), batch, mask)["sentence_embedding"][0]
    mean = reference.outputs(folder, ids)["last_hidden_state"].mean(0)
    assert np.abs(found - mean / np.linalg.norm(mean)).max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_in_half_precision(checkpoint: Callable[[str], Path], dtype: torch.dtype) -> None:
    model = load_encoder_model(open_checkpoint(checkpoint(EMBEDDING)), dtype=dtype)
    ids = ids_of(6).reshape(2, 3)
    found = run(model, ids, np.array([[1, 1, 1], [0, 0, 0]]))
    assert all(np.isfinite(value).all() and value.dtype == np.float32 for value in found.values())
    expected = reference.outputs(checkpoint(EMBEDDING), ids[0])["sentence_embedding"]
    assert found["sentence_embedding"][0] @ expected > 0.99


def test_published_names(checkpoint: Callable[[str], Path]) -> None:
    """The body's prefixes, the Dense's own file, and what there is without sentence-transformers' files."""
    heads = {kind: open_checkpoint(checkpoint(kind)).config.encoder for kind in KINDS}
    assert heads == {
        EMBEDDING: EncoderHead(pooling=Pooling.FIRST),
        COLBERT: EncoderHead(projection=WIDTH),
        MASKED_LM: EncoderHead(masked_lm=True),
    }
    shards = open_checkpoint(checkpoint(COLBERT)).shard_hashes()
    assert set(shards) == {"model.safetensors", "1_Dense/model.safetensors"}


def test_a_body_alone_gives_hidden_states(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, EMBEDDING)
    (folder / "modules.json").unlink()
    opened = open_checkpoint(folder)
    assert opened.config.encoder == EncoderHead()
    assert list(run(load_encoder_model(opened), ids_of(3)[None])) == ["last_hidden_state"]


def test_an_untied_head_is_read(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, MASKED_LM, tie_word_embeddings=False)
    ids = ids_of(4)
    found = run(load_encoder_model(open_checkpoint(folder)), ids[None])
    check({name: value[0] for name, value in found.items()}, reference.outputs(folder, ids))


def test_classes_do_not_load_each_others_checkpoints(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="is loaded by Lfm2ForCausalLM, not by Lfm2BidirectionalModel"):
        Lfm2BidirectionalModel.from_pretrained("tiny-dense")
    with pytest.raises(CheckpointError, match="is loaded by Lfm2BidirectionalModel, not by DecoderForCausalLM"):
        DecoderForCausalLM.from_pretrained(checkpoint(EMBEDDING))


def test_a_mask_of_another_shape_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_encoder_model(open_checkpoint(checkpoint(EMBEDDING)))
    with pytest.raises(ValueError, match=r"attention_mask has the shape \[1, 3\]; input_ids have \[1, 2\]"):
        model(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3))
