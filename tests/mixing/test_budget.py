"""Budgets: what may be asked for, and what is refused in one line that names the floor."""

import pytest

from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.weights.widths import Counted, counted_bytes
from lfm2_export.errors import QuantizationError
from lfm2_export.families import get_family
from lfm2_export.mixing.budget import Budget, bytes_for, make_budget, parse_size
from lfm2_export.mixing.units import Space, make_space
from lfm2_export.quant.recipes import q4_k_m_bytes
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config


def space_of(counted: Counted = Counted.FILE, **overrides: object) -> Space:
    config = get_family("lfm2_moe").parse_config(tiny_config(moe_intermediate_size=64, **overrides))
    return make_space(config, get_scheme("q4"), make_plan, counted)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("700MB", 700_000_000), ("1.2 GB", 1_200_000_000), ("650MiB", 650 << 20), (4096, 4096)]
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "700 MBit", "-5", "1e9", "7" * 40, "٣MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(QuantizationError, match=r"^--target-size .*: pass bytes, or a size such as 700MB or 1\.2GB$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("bits", "size", "counted", "message"),
    [
        (None, None, "step", "--budget 'step': pass --target-bits or --target-size with it"),
        (4.6, "700MB", None, "--target-bits 4.6 and --target-size '700MB': pass one of them"),
        (4.6, None, "disk", "--budget 'disk': pass file or step"),
        (9.0, None, None, "--target-bits 9: pass at most 8 bits a weight, or --scheme q8"),
        (0.0, None, None, "--target-bits 0: pass at most 8 bits a weight, or --scheme q8"),
        (float("nan"), None, None, "--target-bits nan: pass at most 8 bits a weight, or --scheme q8"),
    ],
)
def test_requests_that_make_no_sense_are_refused(bits, size, counted, message) -> None:
    with pytest.raises(QuantizationError) as error:
        make_budget(bits, size, counted)
    assert str(error.value) == message


def test_a_budget_below_the_floor_names_it_and_the_floor_itself_is_possible() -> None:
    space = space_of()
    with pytest.raises(QuantizationError) as error:
        bytes_for(Budget(bits=4.0), space)
    message = str(error.value)
    assert message.startswith("--target-bits 4: is below the floor of ")
    named = float(message.removeprefix("--target-bits 4: is below the floor of ").split()[0])
    assert bytes_for(Budget(bits=named), space) >= space.fixed + space.floor()
    with pytest.raises(QuantizationError, match="--target-size 1000: is below the floor of"):
        bytes_for(Budget(nbytes=1000), space)


def test_a_size_above_8_bits_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"above 8 bits a weight, .* the floor is"):
        bytes_for(Budget(nbytes=10**9), space_of())


def test_a_size_counts_the_tables_of_rope() -> None:
    space = space_of()
    tables = space.plan.table_bytes
    assert tables == 512 * 16 * 4
    assert bytes_for(Budget(nbytes=200_000 + tables), space) == 200_000


def test_the_default_is_q4_k_m_or_the_floor() -> None:
    space = space_of()
    assert bytes_for(Budget(), space) == max(q4_k_m_bytes(space.plan.config), space.fixed + space.floor())


def test_a_scheme_that_keeps_its_size_has_that_of_its_own_widths() -> None:
    config = get_family("lfm2_moe").parse_config(tiny_config(moe_intermediate_size=64))
    scheme = get_scheme("q4f16")
    space = make_space(config, scheme, make_plan, Counted.FILE)
    own, _ = counted_bytes(make_plan(config, scheme), Counted.FILE)
    assert bytes_for(Budget(keeps_size=True), space) == own
    assert own > space.fixed + space.floor()


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_the_chosen_experts_and_of_an_untied_table_one_row(tied: bool) -> None:
    file, step = (space_of(counted, tie_word_embeddings=tied) for counted in Counted)
    (_, whole), (_, read) = (counted_bytes(space.plan, space.counted) for space in (file, step))
    experts = 4 * 3 * 4 * 64 * 64  # layers, matrices, experts
    table = 0 if tied else 130 * 64
    assert whole - read == experts // 2 + table
    assert (file.count, step.count) == (whole, read)
