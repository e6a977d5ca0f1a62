"""Weight files of strangers: their index and their headers, refused soon and in little memory, by the file's name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic import REAL_SHAPES
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.config import MOST_TENSORS
from lfm2_export.errors import CheckpointError
from lfm2_export.families import get_family
from lfm2_export.safetensors_file import MAX_HEADER_BYTES
from tests import hostile
from tests.checkpoints import tiny_config
from tests.hostile import (
    CONFIG,
    INDEX,
    LONG,
    SHARD,
    SPECIAL,
    Damage,
    assert_readable,
    case,
    raw,
    refused,
    write_originals,
)

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="links, FIFOs and devices"),
    pytest.mark.timeout(120),
]

FIRST = "model-00001-of-00002.safetensors"
NORM, EMBEDDING, HEAD = "model.embedding_norm.weight", "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_originals(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "here" / "checkpoint"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "here" / "checkpoint"))


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", [INDEX, FIRST])
def test_what_is_no_file_of_the_folder_is_refused_where_the_index_names_it(
    sharded: Path, name: str, special: str
) -> None:
    damage, words = SPECIAL[special]
    damage(sharded / name)
    refused(sharded, (f"{name}: {words}",), CheckpointError)


# The index


def weight_map(**files: Any) -> Damage:
    """One more tensor, in a file of this name."""

    def damage(path: Path) -> None:
        index = json.loads(path.read_text())
        index["weight_map"] |= files
        path.write_text(json.dumps(index))

    return damage


def whole_map(make: Callable[[], Any]) -> Damage:
    return lambda path: path.write_text(json.dumps({"weight_map": make()}))


PLAIN = "which is not a plain name in its folder"
MISSING = "is missing, but model.safetensors.index.json names it"
INDEXES = [
    case("a terabyte", hostile.sparse, INDEX, "more than the 16777216 that such a file may have"),
    case("no JSON", raw("{"), INDEX, "is not JSON"),
    case("a list", raw("[]"), INDEX, "holds [], not a JSON object"),
    case("nested endlessly", raw("[" * 10**6), INDEX, "is not JSON"),
    case("no map", raw("{}"), "weight_map is missing or not an object"),
    case("an empty map", whole_map(dict), "weight_map is missing or not an object"),
    case("a list as map", whole_map(lambda: [["a", "b"]]), "weight_map is missing or not an object"),
    case("140,000 tensors", whole_map(lambda: {f"t{i}": FIRST for i in range(140_000)}), "lists 140000 tensors, more"),
    case("100,000 files", whole_map(lambda: {f"t{i}": f"f{i}" for i in range(100_000)}), "lists 100000 files, more"),
    case("a file above", weight_map(a="../outside/secret"), "names the file '../outside/secret'", PLAIN),
    case("an absolute path", weight_map(a="/etc/passwd"), "names the file '/etc/passwd'", PLAIN),
    case("a device", weight_map(a="/dev/zero"), PLAIN),
    case("the folder", weight_map(a="."), PLAIN),
    case("the folder above", weight_map(a=".."), PLAIN),
    case("nothing", weight_map(a=""), PLAIN),
    case("a null byte", weight_map(a="a\0b"), "names the file 'a\\x00b'", PLAIN),
    case("a drive", weight_map(a="C:a"), PLAIN),
    case("a backslash", weight_map(a="..\\a"), PLAIN),
    case("a line break", weight_map(a="a\nb"), PLAIN),
    case("a terminal code", weight_map(a="\x1b[2Ja"), PLAIN),
    case("half a character", weight_map(a="\udcff"), PLAIN),
    case("a number", weight_map(a=7), "names the file 7", PLAIN),
    case("null", weight_map(a=None), PLAIN),
    case("a list", weight_map(a=[FIRST]), PLAIN),
    case("an object", weight_map(a={}), PLAIN),
    case("true", weight_map(a=True), PLAIN),
    case("a name of a megabyte", weight_map(a="x" * 10**6), "cannot be looked at (File name too long)"),
    case("a name of 300 characters", weight_map(a="x" * 300), "cannot be looked at (File name too long)"),
    case("a missing file", weight_map(a="other.safetensors"), f"other.safetensors: {MISSING}"),
    case("itself", weight_map(a=INDEX), f"{INDEX}: states a header of"),
    case("a tensor of a megabyte", weight_map(**{"a" * 10**6: FIRST}), f"says that {FIRST} holds aaa", "does not"),
    case("a tensor named by a terminal code", weight_map(**{"\x1b[2J": FIRST}), f"{FIRST} holds \\x1b[2J"),
    case("10,000 tensors too many", weight_map(**{f"t{i}": FIRST for i in range(10**4)}), "t7 and 9992 more"),
]


@pytest.mark.parametrize(("damage", "words"), INDEXES)
def test_a_hostile_index_is_refused(sharded: Path, damage: Damage, words: tuple[str, ...]) -> None:
    damage(sharded / INDEX)
    refused(sharded, words, CheckpointError)


# Headers


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        found, data = split(path)
        change(found)
        write(path, json.dumps(found).encode(), data)

    return damage


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def write(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def text(header: str | bytes) -> Damage:
    return lambda path: write(path, header.encode() if isinstance(header, str) else header)


def entry(**changes: Any) -> Damage:
    return header(lambda found: found[NORM].update(changes))


def one_more(name: str, **changes: Any) -> Damage:
    """A tensor without values at the end of the data."""

    def change(found: dict[str, Any]) -> None:
        end = max(one["data_offsets"][1] for one in found.values() if "data_offsets" in one)
        found[name] = {"dtype": "BF16", "shape": [0], "data_offsets": [end, end], **changes}

    return header(change)


def empty_tied(rows: int) -> Damage:
    """Embedding and head with so many rows of nothing."""

    entry = {"dtype": "BF16", "shape": [rows, 0], "data_offsets": [0, 0]}
    return text(json.dumps({EMBEDDING: entry, HEAD: entry}))


DAMAGED = f"the header's entry {NORM} is damaged ("
HEADERS = [
    case("empty", raw(b""), f"{SHARD}: is truncated (0 bytes, no header)"),
    case("seven bytes", raw(b"\0" * 7), "is truncated (7 bytes, no header)"),
    case("zeros", raw(bytes(1000)), "its header is not JSON"),
    case("a terabyte of zeros", hostile.sparse, "its header is not JSON"),
    case("a header beyond the file", raw((1000).to_bytes(8, "little")), "is truncated (8 bytes, its header alone"),
    case("a header of 2^64 bytes", raw(b"\xff" * 16), "states a header of 18446744073709551615 bytes"),
    case("a header of 33 MiB", raw((33 << 20).to_bytes(8, "little") + b"{"), "at most 16777216 are read"),
    case("a header of a terabyte", lambda path: (hostile.sparse(path), path.open("r+b").write(b"\0\0\0\0\0\1\0\0"))),
    case("nested endlessly", text("[" * 10**6), "its header is not JSON (maximum recursion depth"),
    case("nested deeply", text('{"a":' * 100 + "1" + "}" * 100), "its header is nested more than 64 levels"),
    case("a list", text("[]"), "its header is not a JSON object"),
    case("a text", text('"a"'), "its header is not a JSON object"),
    case("no tensor", text("{}"), "the weights do not fit config.json; 48 missing"),
    case("a name twice", text('{"a": 1, "\\u0061": 1}'), "its header names a twice"),
    case("a long name twice", text(f'{{"{LONG}": 1, "{LONG}": 1}}'), "its header names xxx"),
    case("a field twice", text('{"a": {"dtype": 1, "dtype": 1}}'), "its header names dtype twice"),
    case("5,000 digits", text('{"a": ' + "9" * 5000 + "}"), "its header is not JSON (Exceeds the limit"),
    case("an entry of null", header(lambda found: found.update({NORM: None})), DAMAGED + "None)"),
    case("an entry of text", header(lambda found: found.update({NORM: LONG})), DAMAGED + "'xxx"),
    case("an entry of a list", header(lambda found: found.update({NORM: [1] * 10**5})), DAMAGED + "[1, 1"),
    case("no dtype", header(lambda found: found[NORM].pop("dtype")), DAMAGED),
    case("no shape", header(lambda found: found[NORM].pop("shape")), DAMAGED),
    case("no offsets", header(lambda found: found[NORM].pop("data_offsets")), DAMAGED),
    case("a dtype of 900 kB", entry(dtype=LONG), f"{NORM} is stored as xxx"),
    case("a dtype of terminal codes", entry(dtype="\x1b[2J"), f"{NORM} is stored as \\x1b[2J"),
    case("integers", entry(dtype="I16"), f"{NORM} is stored as I16, which is no floating-point type"),
    case("a dtype of nobody", entry(dtype="Q5_K"), f"{NORM} is stored as Q5_K, which the format does not know"),
    case("a number as dtype", entry(dtype=16), DAMAGED),
    case("a row of nothing", entry(shape=[1, 0]), "its shape [1, 0] in BF16 needs 0 bytes"),
    case("10,000 axes", entry(shape=[1] * 10**4), DAMAGED),
    case("700,000 axes", entry(shape=[2**62] * 700_000), DAMAGED),
    case("nine axes", entry(shape=[1] * 8 + [64]), DAMAGED),
    case("eight axes", entry(shape=[1] * 7 + [64]), f"1 wrong shape: {NORM} is [1, 1, 1, 1, 1, 1, 1, 64], config"),
    case("2^63 rows", entry(shape=[2**63]), DAMAGED),
    case("10^400 rows", entry(shape=[10**400]), DAMAGED),
    case("a product of 2^189", entry(shape=[2**63 - 1] * 3), f"{NORM} has data_offsets", "needs 156927543384667"),
    case("a product of 2^64", entry(shape=[2**32, 2**32]), "needs 36893488147419103232 bytes"),
    case("a negative size", entry(shape=[-16]), DAMAGED),
    case("a fraction", entry(shape=[16.0]), DAMAGED),
    case("a text as size", entry(shape=["16"]), DAMAGED),
    case("true as size", entry(shape=[True]), DAMAGED),
    case("null as size", entry(shape=[None]), DAMAGED),
    case("a number as shape", entry(shape=16), DAMAGED),
    case("no axis", entry(shape=[]), "its shape [] in BF16 needs 2 bytes"),
    case("offsets of 2^63", entry(data_offsets=[2**63, 2**63 + 128]), DAMAGED),
    case("offsets at 2^63 - 1", entry(data_offsets=[2**63 - 129, 2**63 - 1]), "leaves a hole before it"),
    case("offsets backwards", entry(data_offsets=[128, 0]), "(-128 bytes)"),
    case("negative offsets", entry(data_offsets=[-128, 0]), DAMAGED),
    case("three offsets", entry(data_offsets=[0, 1, 128]), DAMAGED),
    case("offsets of text", entry(data_offsets="01"), DAMAGED),
    case("an overlap", entry(data_offsets=[0, 128]), "overlaps the tensor before it"),
    case("a hole", entry(data_offsets=[10**12, 10**12 + 128]), "leaves a hole before it"),
    case("two rows of nothing, tied", empty_tied(2), "; 1 left over: lm_head.weight; 1 wrong shape: model.embed"),
    case("2^62 rows of nothing, tied", empty_tied(2**62), "1 left over: lm_head.weight; 1 wrong shape: model.embed"),
    case("nothing at the end", one_more("model.b"), "1 left over: model.b"),
    case("2^62 rows of nothing", one_more("model.b", shape=[2**62, 0, 2**62]), "1 left over: model.b"),
    case("a number that is no digit", one_more("model.²"), "1 left over: model.²"),
    case("superscripts in a name", one_more("model.layers.².w"), "1 left over: model.layers.².w"),
    case("a name of 10^5 digits", one_more("model." + "9" * 10**5), "1 left over: model.999"),
    case("a name of 900 kB", one_more(f"model.{LONG}"), "1 left over: model.xxx"),
    case("a name of terminal codes", one_more("model.\x1b[2J\n"), "1 left over: model.\\x1b[2J"),
    case("half a character as name", one_more("model.\ud800"), "1 left over: model.\\ud800"),
    case("no name of its own", one_more("model."), "1 left over: model."),
    case("bytes after the last", lambda path: path.open("ab").write(b"1"), "has 1 bytes after its last tensor"),
    case("a byte too few", lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated ("),
]


@pytest.mark.parametrize(("damage", "words"), HEADERS)
def test_a_hostile_header_is_refused(single: Path, damage: Damage, words: tuple[str, ...]) -> None:
    damage(single / SHARD)
    refused(single, (str(single), *words), CheckpointError)


def test_the_largest_published_checkpoint_is_far_below_every_limit(tmp_path: Path) -> None:
    """The 24B's names and sizes, in one file, where it has several; the weights are a hole in the file."""
    layers = ["full_attention" if layer % 4 == 2 else "conv" for layer in range(40)]
    raw_config = REAL_SHAPES["8b-a1b"] | {"num_hidden_layers": 40, "num_experts": 64, "layer_types": layers}
    family, found, end = get_family("lfm2_moe"), {}, 0
    for name, tensor in family.tensors(family.parse_config(raw_config)).items():
        shape = tensor.shape
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) * (shape[2] if len(shape) > 2 else 1)
        found[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    (tmp_path / CONFIG).write_text(json.dumps(raw_config))
    write(tmp_path / SHARD, header := json.dumps(found).encode())
    os.truncate(tmp_path / SHARD, 8 + len(header) + end)
    checkpoint = open_checkpoint(tmp_path)
    print(f"{len(found)} tensors of {MOST_TENSORS}, {len(header)} bytes of {MAX_HEADER_BYTES}; {end / 1e9:.0f} GB")
    assert len(checkpoint.tensors) == len(found)
    assert len(found) * 15 < MOST_TENSORS
    assert len(header) * 12 < MAX_HEADER_BYTES


# Memory, in a process of its own whose address space ends 700 MB above where it starts

HEAVY = """
import json, resource, sys, time
from pathlib import Path
from lfm2_export.checkpoint import open_checkpoint
from lfm2_export.artifact import Artifact
from lfm2_export.errors import Lfm2ExportError
from lfm2_export.families import get_family
get_family("lfm2_moe")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
for kind, folder in json.loads(sys.argv[1]):
    started = time.process_time()
    try:
        (open_checkpoint if kind == "checkpoint" else Artifact.open)(folder)
        line = "opened"
    except Lfm2ExportError as error:
        line = str(error)
    print(json.dumps([line, time.process_time() - started]), flush=True)
"""


def numbered_experts(layers: int, experts: int) -> dict[str, Any]:
    kinds = ["conv"] * layers
    return tiny_config("lfm2_moe", num_hidden_layers=layers, num_experts=experts, layer_types=kinds)


def tensors_without_end(count: int) -> bytes:
    entry = b'{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    return b"{" + b",".join(b'"%d":%s' % (number, entry) for number in range(count)) + b"}"


def write_heavy(root: Path, originals: Path) -> dict[str, tuple[str, Path, str]]:
    """Name to kind, folder and the words of the refusal."""
    made: dict[str, tuple[str, Path, str]] = {}

    def add(name: str, file: str, content: bytes, words: str, base: str = "single") -> None:
        folder = Path(shutil.copytree(originals / base, root / name))
        write(folder / file, content) if file == SHARD else (folder / file).write_bytes(content)
        made[name] = ("checkpoint", folder, words)

    size = (1 << 20) - 64
    add("config of objects", CONFIG, b'{"a":[' + b"{}," * (size // 3) + b"{}]}", "model_type is missing")
    add("config of lists", CONFIG, b'{"a":[' + b"[[]]," * (size // 5) + b"0]}", "model_type is missing")
    size = (16 << 20) - 64
    add("index of objects", INDEX, b'{"a":[' + b"{}," * (size // 3) + b"{}]}", "holds more than 2000000 v", "sharded")
    size = (16 << 20) - 64
    add("header of objects", SHARD, b"[" + b"{}," * (size // 3) + b"{}]", "its header holds more than 2000000")
    add("header of lists", SHARD, b"[" + b"[[[[]]]]," * (size // 9) + b"0]", "its header holds more than 2000000")
    add("header of many values", SHARD, b"[" + b"[[]]," * 660_000 + b"0]", "its header is not a JSON object")
    add("header of one text", SHARD, b'["' + b"a" * (size - 20) + "\U0001f600".encode() + b'"]', "is not a JSON object")
    add("250,000 tensors", SHARD, tensors_without_end(250_000), "its header lists 250000 tensors, more")
    add("130,000 tensors", SHARD, tensors_without_end(130_000), "overlaps the tensor before it")
    experts = json.dumps(numbered_experts(10_000, 4)).encode()
    add("ten thousand layers of experts", CONFIG, experts, " missing: model.layers.")
    folder = root / "manifest"
    folder.mkdir()
    (folder / "lfm2_export.json").write_bytes(b'{"a":[' + b"{}," * (8 << 20) + b"{}]}")
    made["manifest of objects"] = ("artifact", folder, "lfm2_export.json: holds more than 2000000 values")
    return made


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures by /proc")
def test_none_takes_700_megabytes_or_five_seconds(originals: Path, tmp_path: Path) -> None:
    cases = write_heavy(tmp_path, originals)
    request = json.dumps([(kind, str(folder)) for kind, folder, _ in cases.values()])
    run = subprocess.run([sys.executable, "-c", HEAVY, request], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    for (name, (_, _, words)), answer in zip(cases.items(), run.stdout.splitlines(), strict=True):
        line, seconds = json.loads(answer)
        print(f"{name}: {seconds:.2f} s: {line}")
        assert_readable(line)
        assert words in line
        assert seconds < hostile.SECONDS


@pytest.mark.parametrize(
    "name",
    ["a.b", "²", "9" * 10**5, LONG, "\x1b[2J\n", "\ud800", ""],
    ids=["plain", "no digit", "digits", "long", "terminal codes", "half a character", "empty"],
)
def test_what_the_model_does_not_use_is_left_out_whatever_it_is_called(
    single: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    one_more(name)(single / SHARD)
    assert "lm_head.weight" not in open_checkpoint(single).tensors
    (said,) = [record.getMessage() for record in caplog.records]
    assert "tensors that generating text does not use are left out (1): " in said
    assert said.isprintable()
    assert len(said) < 400
