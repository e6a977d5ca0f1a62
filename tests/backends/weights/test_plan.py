"""A plan follows from what a backend says that it can store, and from nothing else of the backend."""

from __future__ import annotations

from enum import Enum
from math import prod
from typing import Any

import numpy as np
import pytest

from lfm2_export.backends.weights.plan import Roles, Stack, Storage, WeightPlan, make_plan
from lfm2_export.errors import QuantizationError
from lfm2_export.families import get_family
from lfm2_export.families.tensors import EMBEDDING, HEAD, Part, TensorClass
from lfm2_export.quant.formats import FloatFormat, IntFormat, WeightFormat
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config


class MadeUp(Enum):
    """A byte a value, whatever the format."""

    BYTES = "bytes"
    is_whole = property(lambda self: False)
    interleaved = property(lambda self: 1)
    is_bare = property(lambda self: True)

    def roles(self, shape: tuple[int, ...], form: WeightFormat) -> Roles:
        return {"weight": (shape, np.dtype(np.uint8))}


class Alone(Storage):
    """Every matrix by itself."""

    def layout(self, kind: TensorClass, form: WeightFormat, matrix: str | None) -> MadeUp:
        return MadeUp.BYTES


class Together(Alone):
    """A layer's experts as one, a tied head with the table's bytes."""

    stacks = (Stack(name="all", matrices=("w3", "w1")), Stack(name="rest", matrices=("w2",)))
    shares_tied_head = True

    def choose_for_stack(self, choices: Any, tensors: Any) -> Any:
        return next(iter(choices.values()))


def plan_of(storage: Storage, *exclude: str, scheme: str = "8da4w", **overrides: Any) -> WeightPlan:
    config = get_family("lfm2_moe").parse_config(tiny_config("lfm2_moe", **overrides))
    return make_plan(config, get_scheme(scheme).with_exclude(exclude), storage)


def test_every_tensor_is_a_weight_where_nothing_is_stacked_and_a_tied_head_is_a_copy_at_the_end() -> None:
    plan = plan_of(Alone())
    tensors = get_family("lfm2_moe").tensors(plan.config)
    assert list(plan) == [*tensors, HEAD]
    assert [weight.sources for weight in plan.values()] == [(name,) for name in (*tensors, EMBEDDING)]
    table, head = plan[EMBEDDING], plan[HEAD]
    assert (table.format.bits, head.format.bits) == (8, 4), "a copy has the format of a head"
    assert (head.part, head.same_bytes_as) == (Part.HEAD, None)
    assert plan.nbytes() == sum(prod(tensor.shape) for tensor in tensors.values()) + prod(table.shape)


def test_stacks_hold_their_matrices_expert_by_expert_and_shared_bytes_count_once() -> None:
    plan = plan_of(Together(), num_experts=3)
    prefix = "model.layers.1.feed_forward.experts."
    stack = plan[f"{prefix}all"]
    assert stack.sources[:4] == tuple(f"{prefix}{part}.weight" for part in ("0.w3", "0.w1", "1.w3", "1.w1"))
    one = get_family("lfm2_moe").tensors(plan.config)[f"{prefix}0.w1.weight"].shape
    assert stack.shape == (3, 2 * one[0], one[1])
    assert plan[HEAD].same_bytes_as == EMBEDDING
    assert plan[HEAD].format == plan[EMBEDDING].format
    tensors = get_family("lfm2_moe").tensors(plan.config)
    assert plan.nbytes() == sum(prod(tensor.shape) for tensor in tensors.values())


def test_excluding_the_token_table_excludes_the_copy_that_is_a_tied_head() -> None:
    plan = plan_of(Alone(), EMBEDDING)
    assert plan[EMBEDDING].format == plan[HEAD].format == FloatFormat(dtype="float32")
    assert plan[HEAD].reason == f"excluded by --exclude {EMBEDDING}"
    assert isinstance(plan["model.layers.0.conv.in_proj.weight"].format, IntFormat)


def test_what_fits_no_groups_or_matches_nothing_is_refused_for_every_backend() -> None:
    with pytest.raises(QuantizationError, match=r"w2.weight: in_features=80 is not a multiple of group_size=32"):
        plan_of(Alone(), moe_intermediate_size=80)
    with pytest.raises(QuantizationError, match=r"--exclude model.layer.\*: matches no weight"):
        plan_of(Alone(), "model.layer.*")
