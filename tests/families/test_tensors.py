"""What a family says of its tensors, against what transformers' own classes hold."""

import subprocess
import sys
from collections import Counter

import pytest

from lfm2_export.families import get_family
from lfm2_export.families.tensors import ModelTensor, Part, TensorClass, expert_stacks
from lfm2_export.models import NETS
from tests.checkpoints import tiny_config
from tests.models.reference import published, their_model


def described(model_type: str, **overrides: object) -> dict[str, ModelTensor]:
    family = get_family(model_type)
    return family.tensors(family.parse_config(tiny_config(model_type, **overrides)))


@pytest.mark.parametrize("model_type", NETS)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "conv_bias": True}], ids=["plain", "more"])
def test_every_parameter_of_transformers_model_is_described(model_type, changes):
    raw = tiny_config(model_type, **changes)
    family = get_family(model_type)
    config = family.parse_config(raw)
    tensors, fused = family.tensors(config), family.fused_tensors(config)
    theirs = their_model(raw)
    stored = {published(name): tuple(value.shape) for name, value in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del stored["lm_head.weight"]
    parts = {part for name, one in fused.items() if name in stored for part in one.parts}
    ours = {name: tensor.shape for name, tensor in tensors.items() if name not in parts}
    assert ours | {name: one.shape for name, one in fused.items()} == stored


@pytest.mark.parametrize("model_type", NETS)
def test_kind_part_and_place_follow_from_what_the_tensor_is(model_type):
    tensors = described(model_type, tie_word_embeddings=False, conv_bias=True)
    for name, tensor in tensors.items():
        assert tensor.name == name
        assert (tensor.layer is None) == (".layers." not in name)
        assert (tensor.kind is TensorClass.EXPERTS) == (tensor.part is Part.EXPERTS) == (tensor.expert is not None)
        assert (tensor.part is Part.NORMS) <= (tensor.kind is TensorClass.SMALL)
        if tensor.kind in (TensorClass.LINEAR, TensorClass.EXPERTS):
            assert len(tensor.shape) == 2
            assert name.endswith(f".{tensor.matrix}.weight")
            assert f".{tensor.layer}." in name
    kinds = Counter(tensor.kind for tensor in tensors.values())
    print(model_type, dict(kinds))
    assert kinds[TensorClass.EMBEDDING] == kinds[TensorClass.HEAD] == 1
    assert (kinds[TensorClass.ROUTER] > 0) == (kinds[TensorClass.EXPERTS] > 0) == (model_type == "lfm2_moe")


def test_experts_are_found_by_layer_expert_and_matrix():
    tensors = described("lfm2_moe")
    config = get_family("lfm2_moe").parse_config(tiny_config("lfm2_moe"))
    stacks = expert_stacks(tensors)
    assert tuple(stacks) == config.moe_layers
    for layer, stack in stacks.items():
        assert len(stack) == 3 * config.num_experts
        assert stack[1, "w2"].name == f"model.layers.{layer}.feed_forward.experts.1.w2.weight"
    assert expert_stacks(described("lfm2")) == {}


def test_a_family_needs_no_torch():
    code = (
        "import sys\nfrom lfm2_export.checkpoint import open_checkpoint\nfrom lfm2_export.inspection import inspect\n"
        "inspect('tiny-moe')\nprint(open_checkpoint('tiny-dense').parts().keys())\n"
        "print(sorted(name for name in ('torch', 'transformers', 'onnx', 'onnxruntime') if name in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[-1] == "[]"
