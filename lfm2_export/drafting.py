"""What a DSpark drafter is beside its layers: which of its target's residual streams it reads, and what it proposes.

In: what a checkpoint's config says. Out: ``DraftSettings``, which the net, the graph and the manifest go by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """``block_size``: proposals of a pass. ``mask_token_id`` stands where a token is to be proposed.
    ``target_layers``: the layers of the target, of ``num_target_layers``, behind which its residual stream is read.
    ``markov_rank``: width between two neighbouring proposals. ``interleaved_rope``: RoPE turns (2i, 2i+1), not halves.
    """

    block_size: int
    mask_token_id: int
    target_layers: tuple[int, ...]
    num_target_layers: int
    markov_rank: int
    has_confidence: bool
    interleaved_rope: bool

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it: all that a runner has to know."""
        return {
            "block_size": self.block_size,
            "target_layers": list(self.target_layers),
            "num_target_layers": self.num_target_layers,
        }
