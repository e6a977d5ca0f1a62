"""Mixed widths through the plan: inside the budget, on the same operators, the same in every order of work."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from lfm2_export.backends.onnx.plan import make_plan
from lfm2_export.backends.weights.plan import WeightPlan
from lfm2_export.backends.weights.widths import Counted, counted_bytes
from lfm2_export.checkpoint import Checkpoint, open_checkpoint
from lfm2_export.errors import QuantizationError
from lfm2_export.families.tensors import Part
from lfm2_export.mixing import Budget, MixRequest, check_mixable, mix, mixed
from lfm2_export.mixing.estimate import WithoutData, estimate_damages
from lfm2_export.mixing.units import make_space
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat
from lfm2_export.quant.schemes import get_scheme
from tests.checkpoints import tiny_config, write_random_checkpoint

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return open_checkpoint(write_random_checkpoint(folder / "moe", tiny_config(**WIDTHS), seed=1))


def mixed_plan(checkpoint: Checkpoint, budget: Budget) -> WeightPlan:
    scheme = mix(checkpoint, get_scheme("q4"), make_plan, MixRequest(budget=budget))
    return make_plan(checkpoint.config, scheme)


@pytest.mark.parametrize("counted", Counted)
@pytest.mark.parametrize("bits", [5.2, 6.0, 8.0])
def test_a_mixture_uses_its_budget_and_no_more(checkpoint: Checkpoint, counted: Counted, bits: float) -> None:
    nbytes, count = counted_bytes(mixed_plan(checkpoint, Budget(counted=counted, bits=bits)), counted)
    print(f"{8 * nbytes / count:.3f} of {bits}")
    assert nbytes <= bits * count / 8
    assert nbytes > 0.98 * bits * count / 8


def test_what_one_operator_reads_has_one_format(checkpoint: Checkpoint) -> None:
    plan = mixed_plan(checkpoint, Budget(bits=5.5))
    together: dict[tuple[object, ...], set[IntFormat]] = {}
    for weight in plan.values():
        if isinstance(weight.format, IntFormat) and weight.layer is not None:
            kind = (
                "experts"
                if weight.part is Part.EXPERTS
                else "qkv"
                if weight.matrix in ("q_proj", "k_proj", "v_proj")
                else "w1 w3"
                if weight.matrix in ("w1", "w3")
                else weight.matrix
            )
            together.setdefault((weight.layer, kind), set()).add(weight.format)
    assert all(len(formats) == 1 for formats in together.values())
    assert len({form for formats in together.values() for form in formats}) > 1
    assert {weight.format.bits for weight in plan.values() if weight.part is Part.EMBEDDING} == {8}


def test_every_tensor_says_why_it_has_its_width(checkpoint: Checkpoint) -> None:
    plan = mixed_plan(checkpoint, Budget(bits=5.5, counted=Counted.STEP))
    reasons = {weight.reason for weight in plan.values() if isinstance(weight.format, IntFormat)}
    assert reasons == {"mixed within --target-bits 5.5 --budget step"}


def test_excluded_tensors_stay_as_they_are(checkpoint: Checkpoint) -> None:
    scheme = get_scheme("q4").with_exclude(["*.0.conv.*"])
    plan = make_plan(checkpoint.config, mix(checkpoint, scheme, make_plan, MixRequest(budget=Budget(bits=8.0))))
    dtypes = [plan[f"model.layers.{layer}.conv.in_proj"].format.dtype for layer in (0, 2)]
    assert (dtypes[0], dtypes[1][:3]) == ("float32", "int")


def test_the_number_of_cores_changes_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 3):
        monkeypatch.setattr("lfm2_export.mixing.estimate.usable_cores", lambda cores=cores: cores)
        found.append(mix(checkpoint, get_scheme("q4"), make_plan, MixRequest(budget=Budget(bits=5.5))).choices)
    assert found[0] == found[1]


def test_an_estimate_falls_with_bits_and_smaller_groups(checkpoint: Checkpoint) -> None:
    space = make_space(checkpoint.config, get_scheme("q4"), make_plan, Counted.FILE)
    for name, damages in estimate_damages(checkpoint, space, get_algorithm("refit"), WithoutData(checkpoint)).items():
        for symmetric in (True, False):
            forms = [form for form in damages if form.symmetric is symmetric]
            by_width = [damages[form] for form in sorted(forms, key=lambda form: (form.bits, -form.group_size))]
            assert by_width == sorted(by_width, reverse=True), name


@pytest.mark.parametrize(("spiky", "other"), [(0, 2), (2, 0)])
def test_a_matrix_that_quantizes_badly_counts_for_more(tmp_path: Path, spiky: int, other: int) -> None:
    """A control: outliers in either of two alike matrices move the estimate of that one."""
    config = tiny_config("lfm2", hidden_size=128, intermediate_size=256)
    folder = write_random_checkpoint(tmp_path / "dense", config, seed=1, dtype="F32")
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights[f"model.layers.{spiky}.conv.in_proj.weight"][:, ::32] *= 20
    save_file(weights, file)
    opened = open_checkpoint(folder)
    space = make_space(opened.config, get_scheme("q4"), make_plan, Counted.FILE)
    damages = estimate_damages(opened, space, get_algorithm("refit"), WithoutData(opened))
    first, second = (damages[f"layer {layer} convolutions in_proj"] for layer in (spiky, other))
    form = next(form for form in first if form.bits == 4 and form.group_size == 32)  # each group has an outlier
    assert first[form] > 1.5 * second[form]


def test_only_what_has_two_widths_can_be_mixed() -> None:
    for name in ("q8", "fp32"):
        with pytest.raises(QuantizationError) as error:
            check_mixable([get_scheme(name)], MixRequest(budget=Budget(bits=5.0)))
        assert str(error.value) == (
            f"--target-bits 5: scheme {name} has one width for its linear layers; pass --scheme q4 (onnx) or 8da4w "
            "(executorch)"
        )
    check_mixable([get_scheme("q8"), get_scheme("q4")], MixRequest(budget=Budget(bits=5.0)))
    with pytest.raises(QuantizationError, match=r"leave --group-size 64 out$"):
        check_mixable([get_scheme("q4")], MixRequest(budget=Budget(bits=5.0)), 64)


def test_q4_mixes_by_itself_unless_it_is_told_not_to(checkpoint: Checkpoint) -> None:
    schemes = [get_scheme(name) for name in ("q4", "q4f16", "q8")]
    found = mixed(checkpoint, schemes, make_plan, MixRequest())
    assert [bool(scheme.choices) for scheme in found] == [True, True, False]
    assert {choice.format.group_size for choice in found[1].choices.values()} == {32}  # WebGPU's fast kernels
    assert mixed(checkpoint, schemes, make_plan, MixRequest(by_default=False)) == schemes
    of_one_width = replace(schemes[0], linear=schemes[2].linear)
    assert mixed(checkpoint, [of_one_width], make_plan, MixRequest()) == [of_one_width]


def test_a_scheme_with_choices_is_another_one(checkpoint: Checkpoint) -> None:
    """An export that was killed goes on only where it would make the same."""
    scheme = get_scheme("q4")
    changed = mix(checkpoint, scheme, make_plan, MixRequest(budget=Budget(bits=5.5)))
    assert replace(changed, choices={}, mixture=None, sensitive_patterns=scheme.sensitive_patterns) == scheme
    assert repr(changed) != repr(scheme)
