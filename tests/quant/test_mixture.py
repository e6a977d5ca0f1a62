"""Choosing widths within a budget of bytes: the best choice, and the same one everywhere."""

from itertools import product

import numpy as np
import pytest

from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.mixture import Option, Unit, choose

FORMATS = [IntFormat(bits=4, group_size=size, symmetric=False) for size in (128, 64, 32)]
WIDE = IntFormat(bits=8, group_size=128, symmetric=True)


def unit(name: str, weights: int, sensitivity: float) -> Unit:
    """Bytes and damages about as they are measured: 8 bits do a fortieth."""
    damages = (1.5, 1.25, 1.0, 0.025)
    options = tuple(
        Option(format=form, nbytes=int(weights * form.bits_per_weight(128) / 8), damage=sensitivity * damage)
        for form, damage in zip([*FORMATS, WIDE], damages, strict=True)
    )
    return Unit(name=name, tensors=(f"{name}.weight",), options=options)


def total(chosen: dict[str, Option]) -> int:
    return sum(option.nbytes for option in chosen.values())


def random_units(seed: int) -> list[Unit]:
    rng = np.random.default_rng(seed)
    return [unit(f"u{index}", int(rng.integers(1, 9)) * 1024, float(rng.lognormal(0, 2))) for index in range(6)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_choice_is_inside_the_budget_and_close_to_the_best_of_all(seed: int, share: float) -> None:
    units = random_units(seed)
    least = sum(min(option.nbytes for option in one.options) for one in units)
    most = sum(max(option.nbytes for option in one.options) for one in units)
    budget = int(least + share * (most - least))
    chosen = choose(units, budget)
    assert total(chosen) <= budget
    best = min(
        sum(option.damage for option in options)
        for options in product(*(one.options for one in units))
        if sum(option.nbytes for option in options) <= budget
    )
    found = sum(option.damage for option in chosen.values())
    print(f"{found:.4g} against {best:.4g}")
    assert best <= found <= 1.5 * best


def test_bits_go_where_a_byte_prevents_most_damage() -> None:
    units = [unit("dull", 4096, 0.01), unit("touchy", 4096, 1.0)]
    budget = sum(one.cheapest().nbytes for one in units) + 4096 * 4 // 8
    chosen = choose(units, budget)
    assert (chosen["dull"].format.bits, chosen["touchy"].format.bits) == (4, 8)


def test_last_digits_of_damages_and_the_order_of_units_change_nothing() -> None:
    units = random_units(7)
    budget = int(1.4 * sum(one.cheapest().nbytes for one in units))
    nudged = [
        Unit(
            name=one.name,
            tensors=one.tensors,
            options=tuple(
                Option(format=o.format, nbytes=o.nbytes, damage=o.damage * (1 + 1e-9)) for o in reversed(one.options)
            ),
        )
        for one in reversed(units)
    ]
    formats = {name: option.format for name, option in choose(units, budget).items()}
    assert formats == {name: option.format for name, option in choose(nudged, budget).items()}
