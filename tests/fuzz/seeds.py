"""Writes the seeds in ``tests/fuzz/corpus`` and ``tests/fuzz/base``: small valid inputs that reach far into a reader.

    python -m tests.fuzz.seeds

They are kept in the repository, so this is for when a format changes. The exported programs are those of a model of two
layers; what is not needed of them is left out.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import lfm2_export
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Snapshot
from lfm2_export.calibration.inputs import inputs
from lfm2_export.calibration.statistics import Description, StatisticsLayout, checkpoint_hash, packed
from lfm2_export.manifest import FileEntry, Manifest, Program
from lfm2_export.states import State, write_state
from tests import artifacts
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.encoder_checkpoints import COLBERT, EMBEDDING, TOKENIZER, write_encoder
from tests.fuzz import bundle
from tests.fuzz.bundle import Part
from tests.fuzz.targets import FOLDER, state, statistics
from tests.fuzz.targets.manifest import FILES
from tests.gguf.written import write as write_gguf
from tests.lora.written import write_adapter
from tests.packed import written as packed_weights

_SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
_TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "vocab_size": 64}
_FEW_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1}
_GGUF_TEXTS = {
    "tokenizer.chat_template": "{{ messages[0].content }}",
    "tokenizer.chat_template.tool_use": "{{ tools }}",
}
_ASSETS = Path(lfm2_export.__file__).parent / "assets"


def write_all() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _write_checkpoints(Path(scratch))
        _write_exported(Path(scratch))
        _write_gguf(Path(scratch))
        _write_packed(Path(scratch))
        _write_adapters(Path(scratch))
        _write_foreign()
    _write_pte()
    _write_manifests()
    _write_tokenizers()
    _write_settings()
    _write_statistics()
    _write_states()


def _put(target: str, name: str, content: bytes | str) -> None:
    path = FOLDER / "corpus" / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _bundle(files: dict[str, bytes | str]) -> bytes:
    return bundle.join(
        Part(title.encode(), content.encode() if isinstance(content, str) else content)
        for title, content in files.items()
    )


def _config(model_type: str, **overrides: Any) -> dict[str, Any]:
    few = _FEW_EXPERTS if model_type == "lfm2_moe" else {}
    return tiny_config(model_type, **{**_SMALL, **_TWO_LAYERS, **few, "max_position_embeddings": 64, **overrides})


def _header(shard: Path) -> bytes:
    data = shard.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()


def _write_encoders(scratch: Path) -> None:
    """Retrievers with sentence-transformers' files; of weights the headers alone."""
    for kind in (EMBEDDING, COLBERT):
        folder = write_encoder(scratch / kind, kind, **_SMALL, **_TWO_LAYERS)
        found = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
        files = {
            path.relative_to(folder).as_posix(): _header(path) if path.suffix == ".safetensors" else path.read_bytes()
            for path in found
            if path.name not in TOKENIZER
        }
        _put("checkpoint", kind, _bundle(files))


def _write_gguf(scratch: Path) -> None:
    """A mixture, with numbers, blocks, a tokenizer and templates."""
    tokenizer = json.loads((FOLDER / "corpus" / "tokenizer" / "byte_level_bpe.json").read_bytes())
    folder = write_random_checkpoint(scratch / "for_gguf", _config("lfm2_moe"), seed=0)
    path = write_gguf(scratch / "moe.gguf", folder, tokenizer=tokenizer, settings=_GGUF_TEXTS)
    _put("gguf", "moe", path.read_bytes())


def _write_packed(scratch: Path) -> None:
    """Experts with zero points by compressed-tensors, a dense model by GPTQ."""
    grid = packed_weights.Grid(symmetric=False)
    small = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "vocab_size": 16, "intermediate_size": 32}
    ways = {
        "compressed_tensors": (
            "lfm2_moe",
            packed_weights.compressed_tensors_section,
            packed_weights.as_compressed_tensors,
        ),
        "gptq": ("lfm2", packed_weights.gptq_section, packed_weights.as_gptq),
    }
    for name, (family, section, arrange) in ways.items():
        experts = {"num_dense_layers": 0} if family == "lfm2_moe" else {}
        original = write_random_checkpoint(scratch / f"for_{name}", _config(family, **small, **experts), seed=0)
        folder = scratch / f"packed_{name}"
        packed_weights.write(folder, original, section(grid), arrange, grid, least_zero=1)
        shard = folder / "model.safetensors"
        data = shard.read_bytes()[8 + int.from_bytes(shard.read_bytes()[:8], "little") :]
        config = (folder / "config.json").read_bytes()
        _put("packed", name, _bundle({"config.json": config, "header.json": _header(shard), "data": data}))


def _write_adapters(scratch: Path) -> None:
    """For the dense checkpoint, with everything that is followed; of weights the header alone."""
    modules = ("model.layers.0.conv.in_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.feed_forward.w1")
    followed = {"use_rslora": True, "alpha_pattern": {"q_proj": 3.5}, "rank_pattern": {"w1": 4}}
    folder = scratch / "adapter"
    write_adapter(folder, scratch / "dense", modules, ranks={modules[2]: 4}, r=2, **followed)
    shard = folder / "adapter_model.safetensors"
    config = (folder / "adapter_config.json").read_bytes()
    _put("lora", "patterns", _bundle({"adapter_config.json": config, shard.name: _header(shard)}))


def _write_checkpoints(scratch: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "dense": {"model_type": "lfm2"},
        "dense_sharded": {"model_type": "lfm2", "shards": 2},
        "moe": {"model_type": "lfm2_moe"},
        "moe_fused": {"model_type": "lfm2_moe", "fused": True},
    }
    for name, options in variants.items():
        raw = _config(options.pop("model_type"))
        folder = write_random_checkpoint(scratch / name, raw, seed=0, **options)
        shards = {path.name: _header(path) for path in sorted(folder.glob("*.safetensors"))}
        indexes = {path.name: path.read_bytes() for path in folder.glob("*.index.json")}
        companions = {
            "generation_config.json": json.dumps({"eos_token_id": [2, 3], "temperature": 0.3, "do_sample": True}),
            "chat_template.jinja": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "LICENSE": "free",
        }
        files = {"config.json": json.dumps(raw), **indexes, **shards}
        _put("checkpoint", name, _bundle(files if name == "dense" else {**files, **companions}))
    _write_encoders(scratch)
    older = {**_config("lfm2", layer_types=None), "full_attn_idxs": [1], "rope_parameters": {"rope_type": "default"}}
    files = {"config.json": json.dumps(older), "model.safetensors": _header(scratch / "dense" / "model.safetensors")}
    _put("checkpoint", "older_names", _bundle(files))
    pickled = {"config.json": json.dumps(_config("lfm2")), "pytorch_model.bin": "x", "LICENSE -> ../../outside": ""}
    _put("checkpoint", "pickled", _bundle(pickled))
    _write_shards()


def _write_shards() -> None:
    entries = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F16", "shape": [0, 7], "data_offsets": [32, 32]},
        "d": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
    }
    header = json.dumps(entries).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(range(34))
    _put("safetensors", "four_dtypes", whole)
    _put("safetensors", "truncated", whole[:-5])
    _put("safetensors", "git_lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    _put("safetensors", "empty", (2).to_bytes(8, "little") + b"{}")


def _write_exported(scratch: Path) -> None:
    checkpoint = scratch / "moe"
    made = scratch / "artifact"
    lfm2_export.export(checkpoint, scheme="q4", output=made)
    lfm2_export.export(checkpoint, backend="executorch", scheme="8da4w", output=made)
    (FOLDER / "base").mkdir(exist_ok=True)
    shutil.copyfile(checkpoint / "config.json", FOLDER / "base" / "config.json")
    shutil.copyfile(made / "onnx" / "model_q4.onnx_data", FOLDER / "base" / "model_q4.onnx_data")
    _put("onnx_graph", "model_q4.onnx", (made / "onnx" / "model_q4.onnx").read_bytes())
    shutil.copyfile(made / "executorch" / "model_8da4w.pte", FOLDER / "base" / "model_8da4w.pte")
    manifest = Artifact.open(made).manifest
    programs = tuple(map(_only_model, manifest.programs))
    _put("weights", "exported.json", replace(manifest, programs=programs, files={}).to_json())


def _only_model(program: Program) -> Program:
    """Without the graphs for other purposes, which are not among the seeds."""
    graph = program.graphs["model"]
    files = {name: entry for name, entry in program.files.items() if name.startswith(graph)}
    return replace(program, graphs={"model": graph}, files=files)


def _write_foreign() -> None:
    """Graphs of others' layout that compute next to nothing: one with positions, one that is told how many logits."""
    files: dict[str, bytes | str] = {
        "config.json": json.dumps(_config("lfm2"), indent=1),
        "generation_config.json": '{"eos_token_id": 2}',
        "tokenizer_config.json": '{"bos_token": "<|im_start|>"}',
    }
    for name, options in {"positions": ["position_ids"], "logits_to_keep": ["logits_to_keep"]}.items():
        graph = _foreign_graph(*options).SerializeToString(deterministic=True)
        _put("foreign", name, _bundle({**files, "onnx/model_q4.onnx": graph}))


def _foreign_graph(option: str) -> Any:
    """A decoder's inputs and outputs around a token table: of a conv layer and an attention layer that forget."""
    from onnx import TensorProto, helper, numpy_helper

    config = _config("lfm2")
    hidden, vocab, width = config["hidden_size"], config["vocab_size"], config["conv_L_cache"]
    heads, head_dim = config["num_key_value_heads"], hidden // config["num_attention_heads"]
    node, value = helper.make_node, helper.make_tensor_value_info
    ints, floats = TensorProto.INT64, TensorProto.FLOAT
    conv = [1, hidden, width]
    past, present = ([1, heads, axis, head_dim] for axis in ("past_sequence_length", "total_sequence_length"))
    keeps = option == "logits_to_keep"
    nodes = [
        node("Gather", ["table", "input_ids"], ["hidden"]),
        node("Mul", ["hidden", "head"], ["every" if keeps else "logits"]),
        node("Identity", ["past_conv.0"], ["present_conv.0"]),
        node("Shape", ["input_ids"], ["tokens"], start=1, end=2),
        node("Concat", ["before", "tokens", "behind"], ["new_shape"], axis=0),
        node("ConstantOfShape", ["new_shape"], ["new"]),
        *(
            node("Concat", [f"past_key_values.1.{kind}", "new"], [f"present.1.{kind}"], axis=2)
            for kind in ("key", "value")
        ),
    ]
    if keeps:
        nodes += [
            node("Neg", [option], ["start"]),
            node("Slice", ["every", "start", "end", "axis"], ["logits"]),
        ]
    rows = np.random.default_rng(0).standard_normal((2, vocab)).astype(np.float32)
    constants = {"before": [1, heads], "behind": [head_dim], "end": [2**62], "axis": [1]}
    used = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        "published",
        [
            value("input_ids", ints, [1, "sequence_length"]),
            value("attention_mask", ints, [1, "total_sequence_length"]),
            value(option, ints, [1] if keeps else [1, "sequence_length"]),
            value("past_conv.0", floats, conv),
            *(value(f"past_key_values.1.{kind}", floats, past) for kind in ("key", "value")),
        ],
        [
            value("logits", floats, [1, "logits", vocab]),
            value("present_conv.0", floats, conv),
            *(value(f"present.1.{kind}", floats, present) for kind in ("key", "value")),
        ],
        [
            numpy_helper.from_array(rows[0, :, None], "table"),
            numpy_helper.from_array(rows[1], "head"),
            *(numpy_helper.from_array(np.array(n, np.int64), name) for name, n in constants.items() if name in used),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _write_pte() -> None:
    """An embedding and a linear layer: a constant, a kernel and a delegate with its data, in the fewest tables."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.Linear(8, 4, bias=False)).eval()
    exported = torch.export.export(model, (torch.zeros(1, 1, dtype=torch.long),))
    edge = to_edge_transform_and_lower(
        exported, partitioner=[XnnpackPartitioner()], constant_methods={"get_vocab_size": 4}
    )
    _put("pte", "linear.pte", bytes(edge.to_executorch().buffer))


def _write_manifests() -> None:
    entries = {name: FileEntry(bytes=len(data), sha256=sha256(data).hexdigest()) for name, data in FILES.items()}
    owned = {name: entry for name, entry in entries.items() if name.startswith("onnx/")}
    program = replace(artifacts.program(), files=owned, parity={"kl": 1e-4, "top1": 0.99})
    manifest = Manifest(
        checkpoint=artifacts.record(), programs=(program,), files={"config.json": entries["config.json"]}
    )
    text = manifest.to_json()
    _put("manifest", "one_program.json", text)
    _put("manifest", "no_program.json", Manifest(checkpoint=artifacts.record()).to_json())
    files: dict[str, bytes | str] = {f"artifact/{name}": data for name, data in FILES.items()}
    files |= {"artifact/lfm2_export.json": text}
    _put("artifact", "whole", _bundle({**files, "artifact/generation_config.json": '{"eos_token_id": 2}'}))
    journal = json.dumps({"last": "lfm2_export.json", "delete": ["config.json"], "files": ["README.md"]})
    for name, partial in {"beside": ".artifact.lfm2-export.partial", "inside": "artifact/.lfm2-export.partial"}.items():
        unfinished = {f"{partial}/commit.json": journal, f"{partial}/files/README.md": "new"}
        _put("artifact", f"unfinished_{name}", _bundle({**files, **unfinished}))
    linked = {**files, "artifact/config.json -> ../outside": "", "outside": FILES["config.json"]}
    _put("artifact", "linked", _bundle(linked))


def _write_tokenizers() -> None:
    byte_level = Tokenizer(models.BPE(_byte_vocabulary(), [("h", "e"), ("l", "l"), ("he", "ll")]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    )
    byte_level.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", byte_level.token_to_id("<|im_start|>"))]
    )
    _put("tokenizer", "byte_level_bpe.json", byte_level.to_str())
    letters = {text: index for index, text in enumerate(["[UNK]", "a", "##b", "hello", "##lo", ",", "!"])}
    word_piece = Tokenizer(models.WordPiece(letters, unk_token="[UNK]"))
    word_piece.normalizer = normalizers.BertNormalizer()
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word_piece.decoder = decoders.WordPiece()
    word_piece.enable_truncation(8)
    word_piece.enable_padding(length=9, pad_token="[UNK]")
    _put("tokenizer", "word_piece.json", word_piece.to_str())
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁hello", -3.5)], 0, byte_fallback=True)
    )
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    _put("tokenizer", "unigram.json", unigram.to_str())
    word_level = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="isolated")
    _put("tokenizer", "word_level.json", word_level.to_str())


def _byte_vocabulary() -> dict[str, int]:
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell"]
    return {text: index for index, text in enumerate(texts)}


def _write_settings() -> None:
    template = (_ASSETS / "tiny-moe" / "chat_template.jinja").read_text(encoding="utf-8")
    _put("chat_template", "bundled.jinja", template)
    _put("chat_template", "macros.jinja", _MACROS)
    token = {"content": "<|im_end|>", "lstrip": False, "rstrip": True, "normalized": False, "special": True}
    declared = {
        "added_tokens_decoder": {"300": token, "301": {**token, "content": "<extra>", "special": False}},
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", **token},
        "pad_token": None,
        "image_token": "<image>",
        "extra_special_tokens": {"tool_token": "<tool>"},
        "chat_template": [
            {"name": "default", "template": "{{ messages[0].content }}"},
            {"name": "tool_use", "template": "x"},
        ],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _put("tokenizer_config", "named_templates", _bundle({"tokenizer_config.json": json.dumps(declared, indent=1)}))
    older = {"bos_token": "<|im_start|>", "eos_token": token, "additional_special_tokens": ["<a>", token]}
    files = {
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": json.dumps(older),
        "chat_template.jinja": template,
    }
    _put("tokenizer_config", "older_map", _bundle(files))
    bundled = (_ASSETS / "tiny-moe" / "tokenizer_config.json").read_bytes()
    _put("tokenizer_config", "bundled", _bundle({"tokenizer_config.json": bundled}))
    sampled = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.15,
        "repetition_penalty": 1.05,
    }
    _put("generation_config", "sampled.json", json.dumps({**sampled, "max_new_tokens": 64, "eos_token_id": [2, 7]}))
    _put("generation_config", "bundled.json", (_ASSETS / "tiny-moe" / "generation_config.json").read_bytes())


_MACROS = """{%- macro call(name, arguments) -%}{{ name ~ '(' ~ arguments | tojson ~ ')' }}{%- endmacro -%}
{%- set ns = namespace(system='', count=0) -%}
{%- for message in messages if message.role != 'tool' -%}
{%- set ns.count = ns.count + loop.index0 -%}
{%- if message.tool_calls is defined -%}{%- for t in message.tool_calls -%}{{ call(**t.function) }}{%- endfor -%}
{%- elif message.content is string -%}
{% generation %}{{ message.content.split('</think>')[-1] | trim }}{% endgeneration %}
{%- else -%}{%- for part in message.content -%}{{ part['text'] | upper }}{%- endfor -%}{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{ '%03d' % ns.count }}{{ strftime_now('%Y') | length }}{%- endif -%}
{%- if ns.count > 99 -%}{{ raise_exception('too many') }}{%- endif -%}
{%- endfor -%}{{ tools | tojson(indent=2) }}
"""


def _write_statistics() -> None:
    """Of identity inputs, and of their diagonals."""
    found = inputs(statistics.checkpoint().config, statistics.checkpoint().model_tensors)
    for name, diagonal in (("whole", ()), ("diagonal", tuple(found))):
        layout = StatisticsLayout(inputs=found, diagonal=diagonal, source="default")
        description = Description(
            checkpoint=checkpoint_hash(statistics.record()),
            source="default",
            sha256="0" * 64,
            tokens=5000,
            seen=dict.fromkeys(found, 5000),
        )
        ones = [np.ones(one.width, np.float32) for one in found.values()]
        data = [one if diagonal else packed(np.diag(one)) for one in ones]
        _put("statistics", name, layout.header(description) + b"".join(one.tobytes() for one in data))


def _write_states() -> None:
    """Of an empty conversation's three tokens, with float32 and with int8 keys and values."""
    for name, runner in state.RUNNERS.items():
        tensors = {t.past_name: t.zeros(1, 3) for t in runner.cache.tensors}
        snapshot = Snapshot(program_id=runner.program_id, lengths=np.array([3]), tensors=tensors)
        messages = [{"role": "system", "content": "a"}]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "a.state")
            write_state(path, State(messages=messages, text="a", tokens=[1, 2, 3], snapshot=snapshot), state.TOKENIZER)
            _put("state", name, path.read_bytes())


if __name__ == "__main__":
    write_all()
