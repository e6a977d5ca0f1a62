"""A model's usual methods: what changes nothing is taken as on transformers' own, the rest is refused by name."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

import lfm2_export
from lfm2_export.errors import GenerationError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lfm2_export.transformers_api import ExportedModelForCausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"


@pytest.fixture(scope="module")
def folder(artifact):
    return artifact("tiny-moe")


@pytest.fixture(scope="module")
def ours(folder):
    return ExportedModelForCausalLM.from_pretrained(folder, scheme="fp32", threads=1)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def without_program(config, dtype=torch.float32):
    """A model that says what it is and never runs."""
    return ExportedModelForCausalLM(SimpleNamespace(context_length=4096), config, dtype=dtype)


# Lines that change nothing

LINES = {
    "device": lambda model: model.device,
    "dtype": lambda model: model.dtype,
    "config.dtype": lambda model: str(model.config.dtype).removeprefix("torch."),
    "training": lambda model: model.training,
    "vocab_size": lambda model: model.vocab_size,
    "main_input_name": lambda model: model.main_input_name,
    "base_model_prefix": lambda model: model.base_model_prefix,
    "can_generate()": lambda model: model.can_generate(),
    "hf_device_map": lambda model: hasattr(model, "hf_device_map"),
    "is_loaded_in_4bit": lambda model: getattr(model, "is_loaded_in_4bit", None),
    "next(parameters())": lambda model: [
        getattr(next(model.parameters()), name) for name in ("device", "dtype", "shape", "ndim", "is_cuda", "grad")
    ],
    "len, size, numel, nbytes": lambda model: [
        (len(weight), weight.size(), weight.numel(), weight.nbytes, weight.element_size())
        for weight in [next(model.parameters())]
    ],
    "num_parameters()": lambda model: model.num_parameters(),
    "num_parameters(exclude_embeddings=True)": lambda model: model.num_parameters(exclude_embeddings=True),
    "sum of numel": lambda model: sum(weight.numel() for weight in model.parameters()),
    "recurse=False": lambda model: list(model.parameters(recurse=False)),
    "prefix": lambda model: next(model.named_parameters(prefix="inner"))[0],
    "get_input_embeddings()": lambda model: [
        getattr(model.get_input_embeddings(), name) for name in ("num_embeddings", "embedding_dim")
    ],
    "get_output_embeddings()": lambda model: [
        getattr(model.get_output_embeddings(), name) for name in ("in_features", "out_features")
    ],
    "embedding size": lambda model: model.get_input_embeddings().weight.shape[0],
    "tie_weights()": lambda model: model.tie_weights(),
    "zero_grad()": lambda model: model.zero_grad(),
    "gradient_checkpointing_disable()": lambda model: model.gradient_checkpointing_disable(),
    "disable_input_require_grads()": lambda model: model.disable_input_require_grads(),
    "named_modules()": lambda model: next(iter(model.named_modules()))[0],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("line", LINES)
def test_lines_of_usual_scripts_give_what_they_give_on_transformers_model(ours, theirs, line):
    assert LINES[line](ours) == LINES[line](theirs)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.eval(),
        lambda model: model.train(False),
        lambda model: model.requires_grad_(False),
        lambda model: model.cpu(),
        lambda model: model.float(),
        lambda model: model.type(torch.float32),
        lambda model: model.to("cpu"),
        lambda model: model.to(torch.device("cpu")),
        lambda model: model.to(torch.float32),
        lambda model: model.to("cpu", torch.float32),
        lambda model: model.to("cpu", torch.float32, True),
        lambda model: model.to(torch.float32, non_blocking=True),
        lambda model: model.to(device="cpu", dtype=torch.float32),
        lambda model: model.to(torch.zeros(1)),
        lambda model: model.to(memory_format=torch.contiguous_format),
    ],
)
def test_methods_that_change_nothing_give_the_model_itself(ours, theirs, call):
    assert call(theirs) is theirs
    assert call(ours) is ours
    assert (ours.device, ours.dtype, ours.training) == (torch.device("cpu"), torch.float32, False)


def test_a_half_type_is_taken_where_the_program_stands_in_for_it_as_when_it_is_opened(ours):
    for call in (ours.half, ours.bfloat16):
        assert call() is ours
    assert ours.dtype == torch.float32


def test_it_says_where_it_comes_from(ours, folder):
    assert ours.name_or_path == str(folder)
    assert repr(ours) == (
        "ExportedModelForCausalLM(\n"
        f"  artifact: {folder}\n"
        "  program: onnx fp32, float32 activations\n"
        "  model: lfm2_moe, 5,807,488 parameters\n"
        f"  context: {ours.runner.context_length:,} tokens\n"
        ")"
    )


def test_its_memory_is_that_of_the_weights_as_they_are_stored(ours, folder):
    full = ours.get_memory_footprint()
    small = ExportedModelForCausalLM.from_pretrained(folder, scheme="q4", threads=1).get_memory_footprint()
    print(f"fp32 {full:,} bytes, q4 {small:,} bytes, {ours.num_parameters():,} parameters")
    assert full == pytest.approx(4 * ours.num_parameters(), rel=0.05)
    assert small < full / 4


# Weights without values

CONFIGS = {
    "dense": lambda: transformers.Lfm2Config(num_hidden_layers=3, hidden_size=128, vocab_size=640),
    "untied, conv_bias": lambda: transformers.Lfm2Config(
        num_hidden_layers=2, hidden_size=64, vocab_size=640, tie_word_embeddings=False, conv_bias=True
    ),
    "experts": lambda: transformers.AutoConfig.from_pretrained(FOLDER),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_and_buffers_have_the_names_and_shapes_of_transformers(config):
    config = CONFIGS[config]()
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    ours = without_program(config)
    shapes = [{name: tuple(weight.shape) for name, weight in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert next(iter(shapes[0])) == next(iter(shapes[1])) == "model.embed_tokens.weight"
    routing = {name for name, _ in theirs.named_buffers() if "expert_bias" in name}
    assert {name for name, _ in ours.named_buffers()} == routing
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    assert ours.get_output_embeddings().weight.name in shapes[1]


def test_parameters_are_counted_whatever_the_caller_sets_in_the_configuration():
    model = without_program(CONFIGS["dense"]())
    before = model.num_parameters()
    model.config.pad_token_id, model.config.eos_token_id, model.config.use_cache = -1, [10**6], False
    assert model.num_parameters() == before


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda weight: weight.data, r"model\.embed_tokens\.weight\.data: its values are inside the exported program"),
        (lambda weight: weight.sum(), r"model\.embed_tokens\.weight\.sum: its values"),
        (lambda weight: weight.share_memory_(), r"share_memory_: its values"),
        (lambda weight: weight.numpy(), r"numpy: its values"),
        (lambda weight: torch.sum(weight), r"sum of a program's weight: its values"),
        (lambda weight: torch.cat([weight, weight]), r"cat of a program's weight: its values"),
        (lambda weight: weight.requires_grad_(), r"an exported program cannot be trained"),
        (lambda weight: setattr(weight, "requires_grad", True), r"an exported program cannot be trained"),
    ],
)
def test_values_of_weights_are_refused_by_name(ours, use, message):
    with pytest.raises(GenerationError, match=message):
        use(next(ours.parameters()))


def test_weights_can_be_frozen_and_shown(ours):
    for weight in ours.parameters():
        weight.requires_grad = False
        weight.requires_grad_(False)
        weight.grad = None
    assert not any(weight.requires_grad for weight in ours.parameters())
    assert ours.num_parameters(only_trainable=True) == 0
    assert repr(next(ours.parameters())) == "ProgramWeight(model.embed_tokens.weight, [2660, 256], torch.float32)"


def test_the_embedding_gives_no_vectors(ours):
    with pytest.raises(GenerationError, match=r"model\.embed_tokens\.weight: an exported program starts at token ids"):
        ours.get_input_embeddings()(torch.tensor([[1]]))


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.to("cuda"), r"to='cuda': exported programs run on the CPU"),
        (lambda model: model.to(torch.device("meta")), r"to=device\(type='meta'\)"),
        (lambda model: model.to(0), r"to=0: exported programs run on the CPU"),
        (lambda model: model.to(torch.int8), r"to=torch\.int8 is not a float type"),
        (lambda model: model.to("cpu", torch.float64), r"to=torch\.float64: this program computes in float32"),
        (lambda model: model.double(), r"to=torch\.float64: this program computes in float32"),
        (lambda model: model.train(), r"train: an exported program cannot be trained; train the checkpoint"),
        (lambda model: model.requires_grad_(), r"requires_grad_: an exported program cannot be trained"),
        (lambda model: model.set_attn_implementation("flash_attention_2"), r"attn_implementation='flash_attention_2'"),
        (lambda model: model.generate_batch([[1]]), r"generate_batch: an exported program has no paged cache"),
        (lambda model: model.load_custom_generate("x/y"), r"load_custom_generate: code from a repository is never run"),
        (pickle.dumps, r"ExportedModelForCausalLM cannot be pickled: .* open it again with from_pretrained"),
    ],
)
def test_calls_that_would_change_something_are_refused_by_name(ours, call, message):
    with pytest.raises(GenerationError, match=message):
        call(ours)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "exported programs run on the CPU"),
        ("gradient_checkpointing_enable", "cannot be trained"),
        ("enable_input_require_grads", "cannot be trained"),
        ("resize_token_embeddings", "weights cannot be changed"),
        ("load_state_dict", "weights cannot be changed"),
        ("state_dict", "weights are inside it"),
        ("load_adapter", "takes no adapters"),
        ("push_to_hub", "upload the artifact's folder"),
        ("lm_head", "is one graph without modules"),
        ("register_forward_hook", "is one graph without modules"),
        ("dummy_inputs", "does not have it"),
    ],
)
def test_what_a_model_has_and_a_program_has_not_is_refused_by_name(ours, theirs, name, message):
    assert hasattr(theirs, name)
    assert not hasattr(ours, name)
    with pytest.raises(GenerationError, match=rf"^{name}: .*{message}"):
        getattr(ours, name)


def test_every_method_of_a_model_is_there_or_refused_in_a_line(ours, theirs):
    refused = {}
    for name in dir(theirs):
        try:
            getattr(ours, name)
        except AttributeError as error:
            refused[name] = str(error)
    public = [name for name in refused if not name.startswith("_")]
    print(f"{len(public)} public names of {len(dir(theirs))} are refused")
    assert "push_to_hub" in public
    assert "generate" not in public
    assert max(map(len, refused.values())) < 400


@pytest.mark.parametrize(("wrong", "right"), [("genrate", "generate"), ("num_paramters", "num_parameters")])
def test_a_wrong_name_is_refused_with_the_nearest_right_one(ours, wrong, right):
    with pytest.raises(AttributeError, match=rf"there is no attribute '{wrong}' \(did you mean {right}\?\)$"):
        getattr(ours, wrong)
    assert getattr(ours, wrong, "default") == "default"


def test_a_float16_program_does_not_pass_for_float32():
    model = without_program(CONFIGS["dense"](), torch.float16)
    assert model.half() is model
    assert next(model.parameters()).dtype == torch.float16
    for call in (model.float, lambda: model.to("cpu", torch.float32)):
        with pytest.raises(GenerationError, match=r"to=torch\.float32: this program computes in float16"):
            call()


# Copies and compilation


def test_a_copy_has_settings_of_its_own_on_the_same_program(ours):
    inputs = torch.tensor([[1, 2, 3]])
    expected = ours.generate(inputs, max_new_tokens=4, eos_token_id=-1).tolist()
    twin = copy.deepcopy(ours)
    twin.config.use_cache, twin.generation_config.max_new_tokens = False, 2
    assert ours.config.use_cache
    assert twin.runner is ours.runner
    cache = twin(inputs, use_cache=True).past_key_values
    assert ours.generate(inputs, max_new_tokens=4, eos_token_id=-1).tolist() == expected
    assert twin.generate(inputs, past_key_values=cache, max_new_tokens=4, eos_token_id=-1).tolist() == expected
    assert twin.generate(inputs, eos_token_id=-1).shape == (1, 5)
    assert copy.copy(ours).config is ours.config


def test_torch_compile_leaves_the_program_as_it_is(ours):
    inputs = torch.tensor([[1, 2, 3]])
    expected = ours(inputs).logits
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="an exported program is compiled already"):
        torch.compile(ours.forward, backend="eager", fullgraph=True)(inputs)
    found = torch.compile(ours.forward, backend="eager")(inputs).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert ours.compile() is None
