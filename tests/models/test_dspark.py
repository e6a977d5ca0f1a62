"""The eager drafter against a second writing of it (``tests/drafters.py``): hop 1 of a drafter's parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.models.lfm2_dspark import Lfm2DSparkDraftModel
from lfm2_export.models.loading import load_draft_model
from tests.conftest import Exported
from tests.drafters import LAYERS, TARGET, Reference, drafter_config, write_drafter

Propose = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Both:
    ours: Lfm2DSparkDraftModel
    theirs: Reference


@pytest.fixture
def both(random_artifact: Callable[..., Exported], tmp_path: Path) -> Callable[..., Both]:
    def opened(**overrides: object) -> Both:
        target = random_artifact(TARGET, ("fp32",)).artifact
        folder = write_drafter(tmp_path / "drafter", drafter_config(**overrides))
        ours = load_draft_model(open_checkpoint(folder, target=target))
        table, head = ours.model.embed_tokens.weight, ours.lm_head.weight
        return Both(ours, Reference.read(folder, table, head))

    return opened


def streams(count: int, width: int = 64) -> torch.Tensor:
    return torch.randn(count, len(LAYERS) * width, generator=torch.Generator().manual_seed(7))


def propose(net: Lfm2DSparkDraftModel, context: torch.Tensor, anchor: int, chunks: list[int]) -> Propose:
    """With the context given in chunks and kept in a cache with more room than it needs."""
    config, room = net.config, len(context) + 3
    shape = (1, config.num_key_value_heads, room, config.head_dim)
    past = {layer: (torch.full(shape, 9.0), torch.full(shape, 9.0)) for layer in range(config.num_hidden_layers)}
    held = 0
    for chunk in context.split(chunks):
        found, new = net(chunk[None], torch.tensor([anchor]), past, torch.tensor([held]))
        for layer, pair in new.items():
            for buffer, values in zip(past[layer], pair, strict=True):
                buffer[:, :, held : held + len(chunk)] = values
        held += len(chunk)
    return found.tokens.tolist(), [] if found.confidence is None else found.confidence.tolist()


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("chunks", [[1], [6], [4, 1, 3]])
def test_it_computes_what_the_second_writing_does(both: Callable[..., Both], neox: bool, chunks: list[int]):
    pair, worst = both(rope_is_neox_style=neox), 0.0
    for anchor in (5, 77):
        context = streams(sum(chunks))
        tokens, scores = propose(pair.ours, context, anchor, chunks)
        wanted, confidences = pair.theirs.propose(context, anchor)
        assert tokens == wanted
        worst = max(worst, *(abs(a - b) for a, b in zip(scores, confidences, strict=True)))
    print(f"largest difference of a confidence: {worst:.1e}")
    assert worst < 1e-5


def test_hidden_states_differ_by_rounding_and_by_far_more_with_the_other_rope(both: Callable[..., Both]):
    pair, context = both(), streams(6)
    with torch.no_grad():
        ours = pair.ours.block(
            pair.ours.context(context[None]),
            pair.ours.embedded(torch.tensor([5])),
            {layer: (torch.zeros(1, 2, 0, 32), torch.zeros(1, 2, 0, 32)) for layer in range(2)},
            pair.ours.layout(6, 0, torch.tensor([0])),
        )[0][0]
    wanted = torch.stack(pair.theirs.hidden(context, 5))
    halves = replace(pair.theirs, raw={**pair.theirs.raw, "rope_is_neox_style": True})
    error = (ours - wanted).abs().max().item()
    control = (ours - torch.stack(halves.hidden(context, 5))).abs().max().item()
    print(f"hidden states: {error:.1e}, with RoPE on halves {control:.1e}")
    assert error < 2e-5
    assert control > 1e-2


def test_the_chain_takes_each_proposal_into_the_next(both: Callable[..., Both]):
    """Without w2 the proposals are those of the rows alone: other ones."""
    pair, context = both(), streams(6)
    chained = [propose(pair.ours, context, anchor, [6])[0] for anchor in range(10)]
    with torch.no_grad():
        pair.ours.markov_head.markov_w2.weight.zero_()
    alone = [propose(pair.ours, context, anchor, [6])[0] for anchor in range(10)]
    assert chained != alone
    assert pair.ours.draft.block_size == 5 == len(chained[0])


def test_without_a_confidence_head_there_are_no_confidences(both: Callable[..., Both]):
    pair = both(enable_confidence_head=False)
    tokens, scores = propose(pair.ours, streams(4), 5, [4])
    assert (tokens, scores) == pair.theirs.propose(streams(4), 5)
    assert scores == []
