"""from_pretrained takes what changes nothing and refuses the rest by name, as on transformers' own models."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest

import lfm2_export
from lfm2_export.errors import ArtifactError, GenerationError, Lfm2ExportError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lfm2_export.transformers_api import ExportedModelForCausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(lfm2_export.__file__).parent / "assets" / "tiny-moe"


@pytest.fixture(scope="module")
def folder(artifact):
    return artifact("tiny-moe")


@pytest.fixture(scope="module")
def runner(folder):
    return lfm2_export.load_runner(folder, scheme="fp32", threads=1)


@pytest.fixture
def opened(folder, runner, monkeypatch):
    """from_pretrained on the artifact, whose program is loaded once: what is tried here is decided without it."""
    monkeypatch.setattr("lfm2_export.transformers_api.open_runner", lambda *_, **__: runner)
    return lambda **options: ExportedModelForCausalLM.from_pretrained(folder, **{"scheme": "fp32"} | options)


# What changes nothing

TRANSFORMERS_TAKES = [
    {"torch_dtype": "auto"},
    {"torch_dtype": torch.bfloat16},
    {"torch_dtype": "float32", "dtype": "bfloat16"},
    {"dtype": {"": "bfloat16"}},
    {"trust_remote_code": True, "code_revision": "main"},
    {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"},
    {"attn_implementation": "eager", "experts_implementation": "eager"},
    {"low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True, "ignore_mismatched_sizes": True},
    {"local_files_only": True, "revision": "main", "cache_dir": "nowhere", "force_download": True, "proxies": {}},
    {"max_memory": {"cpu": "30GB"}, "offload_folder": "nowhere", "offload_buffers": True, "offload_state_dict": True},
    {"quantization_config": None, "state_dict": None, "variant": None, "subfolder": "", "key_mapping": None},
    {"adapter_kwargs": {}, "adapter_name": "default", "gguf_file": None, "tp_plan": None, "tp_size": 1},
    {"use_kernels": False, "kernel_config": None, "fusion_config": None, "disable_mmap": False},
    {"use_cache": True, "return_dict": True, "pad_token_id": 0, "num_hidden_layers": 6, "initializer_range": 0.5},
    {"num_labels": 3, "problem_type": None, "id2label": {0: "a"}, "bos_token_id": 1, "eos_token_id": [7, 2]},
]


@pytest.mark.parametrize("options", TRANSFORMERS_TAKES, ids=str)
def test_what_transformers_takes_and_changes_nothing_is_taken(opened, options):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, **options)
    assert opened(**options).num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": False, "load_in_8bit": False, "use_flash_attention_2": False, "torchscript": False},
        {"provider": "CPUExecutionProvider", "use_io_binding": True, "export": False, "file_name": None},
        {"providers": ["CPUExecutionProvider"], "provider_options": None, "session_options": None},
        {"_from_auto": True, "_fast_init": False, "from_tf": False, "use_auth_token": True, "resume_download": True},
        {"token": "hf_x", "mirror": "x", "attn_implementation": {"": "sdpa"}, "experts_implementation": None},
    ],
    ids=str,
)
def test_what_older_scripts_and_optimum_pass_is_taken(opened, options):
    assert opened(**options).num_parameters() == 5807488


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16", "float16", "float32", torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_that_the_program_can_stand_in_for(opened, name, dtype):
    model = opened(**{name: dtype})
    assert model.dtype == model.config.dtype == torch.float32
    assert model.generation_config.eos_token_id == [7, 2]


@pytest.mark.parametrize(
    "device_map",
    ["auto", "cpu", "cpu:0", "balanced", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}],
    ids=str,
)
def test_a_device_map_that_means_the_cpu(opened, device_map):
    assert opened(device_map=device_map).hf_device_map == {"": torch.device("cpu")}
    assert opened(device_map=torch.device("cpu")).device == torch.device("cpu")
    assert not hasattr(opened(device_map=None), "hf_device_map")


def test_the_attention_asked_for_is_what_the_configuration_says(opened):
    assert opened(attn_implementation="eager").config._attn_implementation == "eager"


def test_loading_info_says_that_nothing_is_missing(opened):
    _, found = opened(output_loading_info=True)
    _, expected = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert found == expected


def test_a_subfolder_is_where_the_artifact_lies(folder, runner, opened):
    model = ExportedModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name, scheme="fp32")
    assert model.name_or_path == str(folder)
    with pytest.raises(ArtifactError, match=r"onnx: has no lfm2_export\.json"):
        opened(subfolder="onnx")


# What would change something


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype='int8' is not a float type"),
        ({"torch_dtype": "nonsense"}, r"dtype='nonsense' is not a float type"),
        ({"dtype": torch.long}, r"dtype=torch\.int64 is not a float type"),
        ({"dtype": 3}, r"dtype=3 is not a float type"),
        ({"dtype": "float64"}, r"dtype='float64': this program computes in float32"),
        ({"dtype": {"": "float64"}}, r"dtype='float64': this program computes in float32"),
        ({"dtype": "float32", "scheme": "fp16"}, r"dtype='float32': this program computes in float16; leave it out"),
        ({"device_map": "cuda"}, r"device_map='cuda': exported programs run on the CPU"),
        ({"device_map": {"": 0}}, r"device_map=\{'': 0\}"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, r"device_map=\{'model': 'cpu', 'lm_head': 'disk'\}"),
        ({"attn_implementation": "flash_attention_2"}, r"attn_implementation='flash_attention_2': how attention is"),
        ({"_attn_implementation": "flash_attention_2"}, r"_attn_implementation='flash_attention_2': how attention"),
        ({"attn_implementation": "someone/kernel"}, r"attn_implementation='someone/kernel'"),
        ({"experts_implementation": "deepgemm"}, r"experts_implementation='deepgemm'"),
        ({"load_in_4bit": True}, r"load_in_4bit=True: .* choose one with scheme, here q4, q8, fp16, fp32, q4f16$"),
        ({"quantization_config": {"load_in_8bit": True}}, r"quantization_config=\{'load_in_8bit': True\}: .* scheme"),
        ({"state_dict": {"a": 1}}, r"state_dict=\{'a': 1\}: the weights are those that were exported"),
        ({"key_mapping": {"a": "b"}}, r"key_mapping"),
        ({"adapter_kwargs": {"name": "x"}}, r"adapter_kwargs=.*: merge the adapter into the checkpoint"),
        ({"gguf_file": "a.gguf"}, r"gguf_file='a\.gguf': only artifacts are opened"),
        ({"variant": "fp16"}, r"variant='fp16': the program is chosen by its scheme; pass scheme"),
        ({"file_name": "model_q4.onnx"}, r"file_name='model_q4\.onnx': the program is chosen by its scheme"),
        ({"tp_plan": "auto"}, r"tp_plan='auto': an exported program runs in one process on the CPU"),
        ({"tp_size": 2}, r"tp_size=2"),
        ({"use_kernels": True}, r"use_kernels=True: a program brings its own kernels"),
        ({"disable_mmap": True}, r"disable_mmap=True: the runtime maps"),
        ({"provider": "CUDAExecutionProvider"}, r"provider='CUDAExecutionProvider'"),
        ({"session_options": Ellipsis}, r"session_options=Ellipsis: the runner makes its own session"),
        ({"export": True}, r"export=True: lfm2_export\.export"),
        ({"temperature": 0.3}, r"temperature=0\.3: pass it to generate"),
        ({"to_dict": True}, r"there is no option 'to_dict'"),
        ({"output_hidden_states": True}, r"output_hidden_states=True: an exported program gives logits only"),
        ({"generation_config": {"top_k": 1}}, r"generation_config=\{'top_k': 1\}: pass a transformers\.Generation"),
        ({"scheme": "q3"}, r"has no q3 program"),
        ({"scheme": 4}, r"scheme=4: give a name"),
        ({"backend": "tpu"}, r"has no tpu fp32 program"),
        ({"subfolder": 4}, r"subfolder=4: give a folder's name"),
    ],
    ids=str,
)
def test_what_would_change_something_is_refused_by_name(opened, options, message):
    with pytest.raises(Lfm2ExportError, match=message) as caught:
        opened(**options)
    assert len(str(caught.value)) < 400


def test_our_own_options_reach_the_runner(folder):
    for options, message in [
        ({"threads": 0}, r"threads=0"),
        ({"kernels": "none"}, r"kernels 'none': give one of"),
        ({"kv_cache": "int4"}, r"kv_cache 'int4': give one of"),
    ]:
        with pytest.raises(Lfm2ExportError, match=message):
            ExportedModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("wrong", "right", "value"),
    [
        ("schem", "scheme", "fp32"),
        ("tread", "threads", 1),
        ("backends", "backend", "onnx"),
        ("kernel", "kernels", "stock"),
        ("device", "device_map", "cpu"),
        ("torch_dtyp", "torch_dtype", "auto"),
        ("attn_implementaton", "attn_implementation", "sdpa"),
        ("low_cpu_memory_usage", "low_cpu_mem_usage", True),
        ("use_cach", "use_cache", False),
        ("generation_conf", "generation_config", None),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest_right_one(opened, wrong, right, value):
    with pytest.raises(GenerationError) as caught:
        opened(**{wrong: value})
    assert str(caught.value) == f"from_pretrained: there is no option '{wrong}' (did you mean {right}?)"
    opened(**{right: value})


def test_wrong_names_of_any_number_and_length_are_refused_in_a_line(opened):
    with pytest.raises(GenerationError, match=r"there is no option 'kernl' \(did you mean kernels\?\), 'qqq'$"):
        opened(kernl="stock", qqq=1)
    with pytest.raises(GenerationError, match=r" and 97 more$"):
        opened(**{f"unheard_of_{i}": i for i in range(100)})
    with pytest.raises(GenerationError) as caught:
        opened(**{"x\n" * 1_000_000: 1})
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", [None, 3, b"out"])
def test_a_folder_has_a_name(path):
    with pytest.raises(GenerationError, match=r"pretrained_model_name_or_path=.*: give a folder's name"):
        ExportedModelForCausalLM.from_pretrained(path)


def test_a_folder_that_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no such directory"):
        ExportedModelForCausalLM.from_pretrained(tmp_path / "nothing")


# The configuration and the generation settings


def test_fields_of_the_configuration_are_set_where_the_program_stays_the_same(opened):
    model = opened(use_cache=False, return_dict=False, pad_token_id=5)
    assert (model.config.use_cache, model.config.pad_token_id) == (False, 5)
    (logits,) = model(torch.tensor([[1, 2]]))
    assert logits.shape == (1, 2, model.vocab_size)
    assert opened().config.use_cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1: this program was made with 2"),
        ({"hidden_size": 512}, r"hidden_size=512: this program was made with 256"),
        ({"vocab_size": "many"}, r"vocab_size='many': .* expected int"),
        ({"vocab_size": -1}, r"vocab_size=-1 is not supported"),
        ({"model_type": "llama"}, r"model_type='llama': this program was made with 'lfm2_moe'"),
    ],
    ids=str,
)
def test_what_the_program_was_made_of_cannot_be_set(opened, options, message):
    with pytest.raises(GenerationError, match=message):
        opened(**options)


def test_a_configuration_of_the_same_model_is_used(opened, folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.use_cache = False
    config.problem_type = "single_label_classification"
    model = opened(config=config)
    assert not model.config.use_cache
    assert model.config.problem_type == "single_label_classification"
    assert model.config is not config
    assert opened(config=folder).config.use_cache


def test_a_configuration_of_another_model_is_refused(opened, folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in {"norm_eps": 1e-3, "conv_L_cache": 4, "output_hidden_states": True}.items():
        other = copy.deepcopy(config)
        setattr(other, name, value)
        with pytest.raises(GenerationError, match=rf"from_pretrained: {name}={value}: "):
            opened(config=other)
    with pytest.raises(GenerationError, match=r"model_type='lfm2': this program was made with 'lfm2_moe'"):
        opened(config=FOLDER.parent / "tiny-dense")
    for bad in ("LiquidAI/LFM2-8B-A1B", {"hidden_size": 256}, 3):
        with pytest.raises(GenerationError, match=r"config=.*: pass a PreTrainedConfig or the folder of one"):
            opened(config=bad)


def test_generation_settings_of_the_callers_own_are_the_defaults(opened):
    settings = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
    model = opened(generation_config=settings)
    assert model.generate(torch.tensor([[1, 2]])).shape == (1, 5)
    settings.max_new_tokens = 9
    assert model.generation_config.max_new_tokens == 3


def altered(folder: Path, target: Path, name: str, text: str) -> Path:
    """A copy of the artifact with another text file; the weights are links."""
    shutil.copytree(folder, target, copy_function=lambda source, goal: Path(goal).hardlink_to(source))
    (target / name).unlink()
    (target / name).write_text(text, encoding="utf-8")
    return target


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", r"holds \[\], not a JSON object"),
        ('{"model_type": "nothing", "max_new_tokens": -1}', "transformers does not take it"),
    ],
    ids=str,
)
def test_a_damaged_text_file_is_refused_in_a_line(folder, tmp_path, name, text, message):
    copied = altered(folder, tmp_path / "copy", name, text)
    with pytest.raises(ArtifactError, match=rf"{re.escape(name)}: {message}") as caught:
        ExportedModelForCausalLM.from_pretrained(copied, scheme="fp32")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("trust_remote_code", [True, False, None])
def test_code_that_a_configuration_names_is_never_run(folder, tmp_path, monkeypatch, runner, trust_remote_code):
    """transformers itself runs it where trust_remote_code is True, and asks on the terminal where it is not said."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["auto_map"] = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    copied = altered(folder, tmp_path / "copy", "config.json", json.dumps(raw))
    (copied / "stranger.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n", encoding="utf-8")
    (copied / "custom_generate").mkdir()
    (copied / "custom_generate" / "generate.py").write_text("raise SystemExit", encoding="utf-8")
    monkeypatch.setattr("lfm2_export.transformers_api.open_runner", lambda *_, **__: runner)
    model = ExportedModelForCausalLM.from_pretrained(copied, trust_remote_code=trust_remote_code, scheme="fp32")
    assert model.config.model_type == "lfm2_moe"
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=1, trust_remote_code=True).shape == (1, 3)
    assert not (tmp_path / "was run").exists()


def test_a_model_is_saved_as_a_copy_of_its_artifact(tmp_path, folder, opened):
    model = opened(torch_dtype=torch.float32, low_cpu_mem_usage=True, trust_remote_code=False)
    model.save_pretrained(tmp_path / "new" / "copy", safe_serialization=True, max_shard_size="5GB")
    made = lfm2_export.Artifact.open(tmp_path / "new" / "copy")
    assert made.manifest == lfm2_export.Artifact.open(folder).manifest
    assert made.missing() == []
    assert (made.path / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]
    model.save_pretrained(folder)  # where it is
    with pytest.raises(ArtifactError, match="is not an empty folder"):
        model.save_pretrained(made.path.parent)
    for options, words in (
        ({"push_to_hub": True}, "push_to_hub=True: upload the folder afterwards"),
        ({"state_dict": {"a": 1}}, "state_dict=.*: an artifact's files are copied as they are"),
        ({"safe_serialisation": True}, r"'safe_serialisation' \(did you mean safe_serialization\?\)"),
    ):
        with pytest.raises(GenerationError, match=words):
            model.save_pretrained(tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
