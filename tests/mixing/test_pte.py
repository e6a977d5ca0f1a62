"""Mixed widths of a .pte: inside the budget as its bytes are, and in nothing but what its operators take."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("executorch")

from lfm2_export.backends.executorch.export import plan_to_mix
from lfm2_export.backends.executorch.plan import PtePlan
from lfm2_export.backends.weights.widths import Counted, counted_bytes, describe
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import EMBEDDING, HEAD, Part
from lfm2_export.mixing import Budget, MixRequest, mix
from lfm2_export.mixing.estimate import WithoutData, estimate_damages
from lfm2_export.mixing.units import Space, make_space
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return open_checkpoint(write_random_checkpoint(folder / "moe", tiny_config(**WIDTHS), seed=1))


def space_of(checkpoint: Checkpoint, **options: Any) -> Space:
    return make_space(
        checkpoint.config,
        get_scheme("8da4w"),
        lambda config, scheme: plan_to_mix(config, scheme, options),
        Counted.FILE,
    )


def mixed_plan(checkpoint: Checkpoint, budget: Budget, **options: Any) -> PtePlan:
    def make_plan(config: Any, scheme: Any) -> PtePlan:
        return plan_to_mix(config, scheme, options)

    scheme = mix(checkpoint, get_scheme("8da4w"), make_plan, MixRequest(budget=budget))
    return make_plan(checkpoint.config, scheme)


@pytest.mark.parametrize("counted", Counted)
@pytest.mark.parametrize("moe_op", ["stock", "lfm2"])
def test_a_mixture_uses_its_budget_and_no_more(checkpoint: Checkpoint, counted: Counted, moe_op: str) -> None:
    bits = 5.8
    plan = mixed_plan(checkpoint, Budget(counted=counted, bits=bits), moe_op=moe_op)
    nbytes, count = counted_bytes(plan, counted)
    said = describe(plan)["bits_per_weight"][str(counted)]
    print(f"{8 * nbytes / count:.3f} of {bits}")
    assert 0.97 * bits * count / 8 < nbytes <= bits * count / 8
    assert said == pytest.approx(8 * nbytes / count, abs=1e-3)
    assert len({weight.format for weight in plan.values() if isinstance(weight.format, IntFormat)}) > 2


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, {32, 64, 128}), ({"moe_op": "stock"}, {32, 64, 128}), ({"moe_op": "lfm2"}, {32}), ({"moe_op": "both"}, {32})],
    ids=["default", "stock", "lfm2", "both"],
)
def test_experts_keep_4_bits_in_groups_that_their_operators_take(
    checkpoint: Checkpoint, options: dict[str, str], sizes: set[int]
) -> None:
    units = [unit for unit in space_of(checkpoint, **options).units if unit.weights[0].part is Part.EXPERTS]
    assert units
    for unit in units:
        assert {(form.bits, form.group_size, form.signed_scale) for form in unit.formats} == {
            (4, size, False) for size in sizes
        }


def test_layers_have_4_bits_in_groups_or_8_by_rows(checkpoint: Checkpoint) -> None:
    units = {unit.name: unit for unit in space_of(checkpoint).units}
    for name in ("layer 0 convolutions in_proj", "layer 1 attention qkv", HEAD):
        assert [(form.bits, form.group_size) for form in units[name].formats] == [(4, 32), (4, 64), (4, 128), (8, None)]
    assert {form.bits for form in units[EMBEDDING].formats} == {8}


def test_a_table_of_4_bits_that_was_asked_for_stays_one(checkpoint: Checkpoint) -> None:
    plan = mixed_plan(checkpoint, Budget(bits=6.0), embedding_bits=4)
    assert plan[EMBEDDING].format.bits == 4  # type: ignore[union-attr]


def test_a_tied_head_has_a_width_of_its_own(checkpoint: Checkpoint) -> None:
    """Both are made of one tensor of the checkpoint: a choice for the one must not be the other's."""
    assert checkpoint.config.tie_word_embeddings
    found = set()
    for bits in (5.2, 7.5):
        plan = mixed_plan(checkpoint, Budget(bits=bits))
        table, head = plan[EMBEDDING].format, plan[HEAD].format
        assert isinstance(table, IntFormat)
        assert isinstance(head, IntFormat)
        assert (table.bits, table.group_size in (32, 64, 128)) == (8, True)
        found.add((head.bits, head.group_size is None))
        assert plan[HEAD].reason == f"mixed within --target-bits {bits:g}"
    assert (8, True) in found


def test_rows_of_8_bits_do_less_damage_than_any_groups_of_4(checkpoint: Checkpoint) -> None:
    space = space_of(checkpoint)
    for name, damages in estimate_damages(checkpoint, space, get_algorithm("refit"), WithoutData(checkpoint)).items():
        wide = [damage for form, damage in damages.items() if form.group_size is None]
        assert all(20 * damage < min(damages[form] for form in damages if form.bits == 4) for damage in wide), name


def test_a_budget_below_the_floor_names_what_is_possible(checkpoint: Checkpoint) -> None:
    with pytest.raises(QuantizationError) as error:
        mixed_plan(checkpoint, Budget(bits=4.0))
    message = str(error.value)
    print(message)
    assert message.startswith("--target-bits 4: is below the floor of ")
    named = float(message.removeprefix("--target-bits 4: is below the floor of ").split()[0])
    nbytes, count = counted_bytes(mixed_plan(checkpoint, Budget(bits=named)), Counted.FILE)
    assert 8 * nbytes / count <= named


def test_the_number_of_cores_changes_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 3):
        monkeypatch.setattr("lfm2_export.mixing.estimate.usable_cores", lambda cores=cores: cores)
        found.append({name: weight.format for name, weight in mixed_plan(checkpoint, Budget(bits=5.8)).items()})
    assert found[0] == found[1]
