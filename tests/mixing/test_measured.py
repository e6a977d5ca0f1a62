"""Damages as they are measured: the same from kept inputs as from the whole model, and larger where more is broken."""

from collections.abc import Callable

import numpy as np
import pytest

from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.weights.widths import Counted
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import EMBEDDING
from lfm2_export.mixing import MixRequest, check_mixable, with_choices
from lfm2_export.mixing.measured import Meter, measured_damages, quantized
from lfm2_export.mixing.units import make_space
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import JudgedBy, Mixture, get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
MIXTURE = Mixture(within="a test", judged_by=JudgedBy.MEASUREMENT)
FORMAT = IntFormat(bits=4, group_size=32, symmetric=False)
EXPERTS = [f"model.layers.2.feed_forward.experts.{expert}.w3.weight" for expert in range(4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return open_checkpoint(write_random_checkpoint(folder / "moe", tiny_config(**WIDTHS), seed=1))


@pytest.fixture(scope="module")
def meter(checkpoint: Checkpoint) -> Meter:
    rows = np.random.default_rng(0).integers(3, 131, (2, 48))
    return Meter(checkpoint, list(rows))


def values(checkpoint: Checkpoint, *names: str) -> dict[str, np.ndarray]:
    return quantized(checkpoint, names, FORMAT, get_algorithm("round"))


def test_the_models_own_weights_do_no_damage(meter: Meter, checkpoint: Checkpoint) -> None:
    own = {name: checkpoint.read(name) for name in [EMBEDDING, *EXPERTS]}
    assert meter.kl(own) < 1e-12


@pytest.mark.parametrize("names", [EXPERTS, ["model.layers.2.conv.in_proj.weight"]], ids=["experts", "linear"])
def test_kept_inputs_give_the_same_as_the_whole_model(meter: Meter, checkpoint: Checkpoint, names: list[str]) -> None:
    changed = values(checkpoint, *names)
    short, whole = meter.kl(changed, first_layer=2), meter.kl(changed)
    print(f"{short:.6e} {whole:.6e}")
    assert short == pytest.approx(whole, rel=1e-9)
    assert short > 1e-7


def test_the_weights_are_as_before_afterwards(meter: Meter, checkpoint: Checkpoint) -> None:
    before = meter.token_kl(values(checkpoint, EXPERTS[0]))
    meter.kl(values(checkpoint, EMBEDDING, *EXPERTS))
    assert np.array_equal(meter.token_kl(values(checkpoint, EXPERTS[0])), before)


def test_what_is_measured_decides_the_widths(meter: Meter, checkpoint: Checkpoint) -> None:
    """A control: with the damages of two units exchanged, the other one is wide."""
    algorithm = get_algorithm("round")
    space = make_space(checkpoint.config, get_scheme("q4"), make_plan, Counted.FILE)
    damages = measured_damages(meter, space, algorithm)
    assert all(
        one[form] >= one[wider]
        for one in damages.values()
        for form in one
        for wider in one
        if (form.bits, form.group_size) == (4, 128) and (wider.bits, wider.group_size) == (8, 32)
    )
    ranked = sorted(
        (unit for unit in space.units if "out_proj" in unit.name), key=lambda unit: max(damages[unit.name].values())
    )
    first, last = ranked[0].name, ranked[-1].name
    swapped = damages | {first: _scaled(damages[last], 50), last: _scaled(damages[first], 1 / 50)}
    limit = space.fixed + space.floor() + 128 * 128 * 6 // 8
    assert _bits(last)(with_choices(get_scheme("q4"), space, _only(damages, first, last), limit, MIXTURE)) == 8
    assert _bits(first)(with_choices(get_scheme("q4"), space, _only(swapped, first, last), limit, MIXTURE)) == 8


def _scaled(damages: dict[IntFormat, float], factor: float) -> dict[IntFormat, float]:
    return {form: factor * damage for form, damage in damages.items()}


def _only(damages: dict[str, dict[IntFormat, float]], *names: str) -> dict[str, dict[IntFormat, float]]:
    return {name: one if name in names else _scaled(one, 1e-9) for name, one in damages.items()}


def _bits(unit: str) -> Callable[..., int]:
    _, layer, part, matrix = unit.split()
    block = {"convolutions": "conv", "attention": "self_attn"}[part]
    return lambda scheme: scheme.choices[f"model.layers.{layer}.{block}.{matrix}.weight"].format.bits


def test_a_text_is_for_what_is_mixed() -> None:
    for name, by_default in (("q4", False), ("q8", True)):
        with pytest.raises(QuantizationError) as error:
            check_mixable([get_scheme(name)], MixRequest(by_default=by_default, text="a.txt"))
        assert str(error.value) == "--measure 'a.txt': pass --target-bits or --target-size with it"
    check_mixable([get_scheme("q4")], MixRequest(text="a.txt"))
