"""generation_config.json as strangers write it: taken as transformers takes it, or refused in one line."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from lfm2_export.cli import main
from lfm2_export.errors import GenerationError
from lfm2_export.generation_config import GenerationConfig
from lfm2_export.messages import MESSAGE_LIMIT
from lfm2_export.sampling import Sampler
from tests.crafted import with_file

DIGITS = "9" * 400
MANY_DIGITS = "9" * 5000

# Of a file, as JSON texts: floats beyond float64 are infinite there, integers may have any number of digits.
REFUSED_VALUES = [
    *(("do_sample", value) for value in ("1", "0", '"yes"', "[]", "{}", "1.0")),
    *(("temperature", value) for value in ("-1", "-1e-300", "NaN", "Infinity", "-Infinity", "1e400", DIGITS)),
    *(("temperature", value) for value in ('"0.7"', "true", "[0.7]", "{}", f"-{DIGITS}", '"' + "x" * 100_000 + '"')),
    *(("top_p", value) for value in ("-0.1", "1.0000001", "2", "NaN", "Infinity", DIGITS, '"0.9"', "false", "[]")),
    *(("min_p", value) for value in ("-1e-300", "1.1", "NaN", "-Infinity", DIGITS, '"0.1"', "true", "[[]]")),
    *(
        ("repetition_penalty", value)
        for value in ("0", "-0.0", "-1", "NaN", "Infinity", "1e999", DIGITS, '"1"', "true")
    ),
    *(("top_k", value) for value in ("-1", "2.5", "50.0", "NaN", "1e30", '"5"', "true", "[5]", "{}", f"-{DIGITS}")),
    *(("max_new_tokens", value) for value in ("0", "-1", "20.0", "1e6", '"20"', "true", "[20]", f"-{DIGITS}")),
    *(("typical_p", value) for value in ("0", "-1", "NaN", '"0.9"', "true", DIGITS)),
    *((name, value) for name in ("epsilon_cutoff", "eta_cutoff") for value in ("-0.1", "NaN", "[]", "true")),
    *(
        (name, value)
        for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens")
        for value in ("-1", "2.0", '"3"', "true", "[]")
    ),
    *(
        (name, value)
        for name in ("suppress_tokens", "begin_suppress_tokens")
        for value in ("5", '"ab"', "{}", "[1.5]", '["x"]', "[null]", "[[1]]", "true")
    ),
    *(
        ("bad_words_ids", value)
        for value in ("5", '"ab"', "{}", "[1]", "[[]]", "[[-1]]", '[["x"]]', "[[1.0]]", f"[[{'1,' * 1000}1]]")
    ),
    ("bad_words_ids", f"[{'[1],' * 100_000}[1]]"),
    *(
        ("eos_token_id", value)
        for value in ("-1", "2.0", '"</s>"', "true", "[[2]]", "[2, null]", '[2, "x"]', "[2, -3]")
    ),
    *(("eos_token_id", value) for value in ('{"a": 1}', "[2.5]", "[NaN]", f"-{DIGITS}", "[" + '"x", ' * 9999 + "1]")),
]


def config_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "generation_config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path) -> str:
    started = time.monotonic()
    with pytest.raises(GenerationError) as info:
        GenerationConfig.from_file(path)
    message = str(info.value)
    assert time.monotonic() - started < 10
    assert str(path) in message
    assert message.isprintable()
    assert len(message) <= MESSAGE_LIMIT
    print(message)
    return message


@pytest.mark.parametrize(("name", "value"), REFUSED_VALUES, ids=lambda text: text[:12])
def test_a_value_that_means_nothing_is_refused_by_name(tmp_path, name, value):
    message = refusal(config_file(tmp_path, f'{{"{name}": {value}}}'))
    assert f"{name}=" in message
    assert " is not usable; expected " in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON (Expecting value"),
        ("{", "is not JSON (Expecting property name"),
        ("[]", "holds [], not a JSON object"),
        ("null", "holds None, not a JSON object"),
        ('"' + "x" * 100_000 + '"', "not a JSON object"),
        ("[" * 200_000, "is not JSON (maximum recursion depth"),
        ('{"a":' * 100_000, "is not JSON (maximum recursion depth"),
        (f'{{"top_k": {MANY_DIGITS}}}', "is not JSON (Exceeds the limit (4300 digits)"),
        (f'{{"temperature": {MANY_DIGITS}}}', "is not JSON (Exceeds the limit (4300 digits)"),
        (b'{"top_k": "\xff"}', "is not JSON ('utf-8' codec can't decode byte 0xff"),
        ('{"top_k": 5}' * 2, "is not JSON (Extra data"),
        (
            json.dumps({"eos_token_id": list(range(1_000_000))}),
            "bytes, more than the 1048576 that such a file may have",
        ),
        ("{" + " " * (2 << 20) + "}", "bytes, more than the 1048576 that such a file may have"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, message):
    assert message in refusal(config_file(tmp_path, text))


@pytest.mark.skipif(os.name != "posix", reason="special files are POSIX's")
def test_only_a_regular_file_of_the_folder_is_read(tmp_path):
    path = tmp_path / "folder" / "generation_config.json"
    path.parent.mkdir()
    os.mkfifo(path)
    assert "is not a regular file" in refusal(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "is a link that leaves its folder" in refusal(path)
    path.unlink()
    (tmp_path / "other.json").write_text("{}")
    path.symlink_to(tmp_path / "other.json")
    assert "is a link that leaves its folder" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "is a folder where a file is needed" in refusal(path)


TAKEN = [
    {"temperature": 1e-300},
    {"temperature": 5e-324},
    {"temperature": 1e-40},
    {"temperature": 1e-30},
    {"temperature": 1e30},
    {"temperature": 1e300},
    {"temperature": 1.7976931348623157e308},
    {"temperature": 10**300},
    {"temperature": 0},
    {"temperature": -0.0},
    {"repetition_penalty": 1e-40},
    {"repetition_penalty": 5e-324},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e38},
    {"repetition_penalty": 1e300},
    {"repetition_penalty": 1.7976931348623157e308},
    {"repetition_penalty": 1e38, "temperature": 1e-40},
    {"repetition_penalty": 1e-300, "temperature": 1e-300, "top_p": 1e-300, "min_p": 1e-300},
    {"repetition_penalty": 1e300, "temperature": 1e300, "top_p": 0.999999999999, "min_p": 1e-300},
    {"top_p": 0},
    {"top_p": 0.0, "top_k": 0},
    {"top_p": 5e-324},
    {"top_p": 1 - 2**-53},
    {"top_p": 1e-8, "top_k": 0, "temperature": 1e300},
    {"min_p": 1},
    {"min_p": 5e-324},
    {"min_p": 1.0, "top_p": 0, "top_k": 1},
    {"top_k": 10**30},
    {"top_k": 2**63},
    {"top_k": 0},
    {"top_k": 1},
    {"max_new_tokens": 10**30},
    {"max_new_tokens": 2**63},
    {"eos_token_id": []},
    {"eos_token_id": [10**30, 2**63, 0]},
    {"eos_token_id": list(range(100_000))},
    {"eos_token_id": [7] * 100_000},
    {"temperature": None, "top_p": None, "eos_token_id": None, "do_sample": None},
    {"x" * 10_000: 1, "\ud800": 2},
    {f"unknown_{index}": index for index in range(10_000)},
]

MAX32 = float(np.finfo(np.float32).max)
ROWS = {
    "ordinary": [3.0, 1.0, -2.0, 0.5, 2.9, -7.0],
    "equal": [1.5] * 6,
    "equal and negative": [-1.5] * 6,
    "zero": [0.0] * 6,
    "largest": [MAX32, -MAX32, 0.0, 1.0, -1.0, MAX32 / 2],
    "all largest": [MAX32] * 6,
    "all smallest": [-MAX32] * 6,
    "denormal": [1e-45, -1e-45, 0.0, 1e-40, -1e-40, 1e-45],
    "masked": [-np.inf, 1.0, -np.inf, -1.0, -np.inf, 0.0],
    "one left": [-np.inf] * 5 + [-3.0],
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("settings", TAKEN, ids=lambda settings: str(settings)[:40])
def test_settings_at_the_edges_choose_a_token_in_silence(tmp_path, settings, row):
    config = GenerationConfig.from_file(config_file(tmp_path, json.dumps(settings | {"do_sample": True})))
    logits = np.array(ROWS[row], dtype=np.float32)
    with warnings.catch_warnings(), np.errstate(all="warn", under="ignore"):
        warnings.simplefilter("error")
        for choosing in (config.override(seed=3), config.override(do_sample=False)):
            sampler = Sampler(choosing, len(logits), history=[0, 2, 5])
            chosen = [sampler.choose(logits) for _ in range(8)]
            assert all(np.isfinite(logits[token]) for token in chosen)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-30])
def test_the_smallest_temperature_takes_the_likeliest_token(temperature):
    logits = np.array([1.0, 1.5, -3.0, 1.49999], dtype=np.float32)
    config = GenerationConfig(do_sample=True, temperature=temperature, seed=0, top_k=0)
    assert {Sampler(config, 4).choose(logits) for _ in range(20)} == {1}


def test_the_largest_temperature_takes_any_token():
    logits = np.array([1.0, 90.0, -90.0, 0.0], dtype=np.float32)
    config = GenerationConfig(do_sample=True, temperature=1e300, seed=0, top_k=0)
    sampler = Sampler(config, 4)
    assert {sampler.choose(logits) for _ in range(100)} == {0, 1, 2, 3}


@pytest.mark.parametrize("penalty", [1e30, 1e38, 1e300])
def test_a_large_penalty_takes_what_was_not_there(penalty):
    logits = np.array([90.0, 1.0, -90.0, -1.0], dtype=np.float32)
    sampler = Sampler(GenerationConfig(repetition_penalty=penalty), 4, history=[0, 2])
    assert [sampler.choose(logits) for _ in range(3)] == [1, 0, 0], "0 and 1 keep a little, the negative ones go"


@pytest.mark.parametrize("penalty", [1e-30, 1e-40, 1e-300])
def test_a_small_penalty_takes_the_best_of_what_was_there(penalty):
    logits = np.array([0.5, 1.0, 2.0, 90.0], dtype=np.float32)
    sampler = Sampler(GenerationConfig(repetition_penalty=penalty), 4, history=[0, 1])
    assert sampler.choose(logits) == 1


def test_many_stop_tokens_cost_no_time():
    config = GenerationConfig(stop_token_ids=tuple(range(1_000_000)))
    started = time.monotonic()
    assert all(token in config.stop_tokens for token in range(0, 1_000_000, 100))
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("seed", [0, 2**64, 10**40, 10**4000])
def test_any_seed_repeats_a_choice(seed):
    config = GenerationConfig(do_sample=True, seed=seed, top_k=0)
    logits = np.zeros(1000, dtype=np.float32)
    first, second = (Sampler(config, 1000) for _ in range(2))
    assert [first.choose(logits) for _ in range(9)] == [second.choose(logits) for _ in range(9)]


def test_numpys_numbers_are_numbers():
    config = GenerationConfig(temperature=np.float32(0.5), top_p=np.float16(0.5), min_p=np.int64(0))
    assert config == GenerationConfig(temperature=0.5, top_p=0.5, min_p=0)
    assert {type(value) for value in (config.temperature, config.top_p, config.min_p)} == {float}
    with pytest.raises(GenerationError, match=r"temperature=np.True_ is not usable"):
        GenerationConfig(temperature=np.True_)
    with pytest.raises(GenerationError, match=r"temperature=.* is not usable") as info:
        GenerationConfig(temperature=10**5000)
    assert len(str(info.value)) <= MESSAGE_LIMIT


@pytest.mark.parametrize("value", ["NaN", DIGITS, "[" * 100_000])
def test_run_names_the_file_and_ends_with_2(artifact, tmp_path, capfd, value):
    content = f'{{"temperature": {value}}}'.encode()
    folder = with_file(artifact("tiny-moe"), tmp_path / "artifact", "generation_config.json", content)
    assert main(["run", str(folder), "--scheme", "q4", "--prompt", "Hi", "--max-new-tokens", "1"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    print(line)
    assert line.startswith(f"lfm2-export: {folder / 'generation_config.json'}: ")
    assert len(line) < 400


UNSUPPORTED = {
    "num_beams": 4,
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "sequence_bias": [[[1, 2], -1.0]],
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": [5, 1.1],
    "stop_strings": ["x"],
    "max_length": 99,
    "num_return_sequences": 2,
    "top_h": 0.4,
    "max_time": 1.0,
    "token_healing": True,
}


def test_settings_that_are_not_supported_are_named_once(tmp_path, caplog):
    path = config_file(tmp_path, json.dumps(UNSUPPORTED | {"top_k": 5}))
    with caplog.at_level(logging.WARNING, "lfm2_export"):
        assert [GenerationConfig.from_file(path).top_k for _ in range(3)] == [5, 5, 5]
    (record,) = caplog.records
    message = record.getMessage()
    print(message)
    assert message.startswith(f"{path}: ")
    assert message.endswith("; transformers would generate otherwise")
    assert len(message) <= MESSAGE_LIMIT
    assert "forced_eos_token_id" in message


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_each_unsupported_setting_is_named(tmp_path, caplog, name):
    GenerationConfig.from_file(config_file(tmp_path, json.dumps({name: UNSUPPORTED[name]})))
    assert [f": {name}: not supported here" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1, "num_beam_groups": 1, "guidance_scale": 1.0, "diversity_penalty": 0.0, "penalty_alpha": 0},
        {"max_length": 20, "num_return_sequences": 1, "token_healing": False, "stop_strings": None},
        {"max_length": 4096, "max_new_tokens": 100},
        {"length_penalty": 1.0, "early_stopping": False, "use_cache": True, "renormalize_logits": True},
        {"output_scores": False, "return_dict_in_generate": False, "cache_implementation": "static"},
        {"sequence_bias": {}, "force_words_ids": [], "unknown": 3},
        {"min_new_tokens": 5, "suppress_tokens": [1, 2], "bad_words_ids": [[3]], "no_repeat_ngram_size": 3},
    ],
    ids=lambda settings: ",".join(settings)[:50],
)
def test_settings_that_change_nothing_or_are_followed_are_no_news(tmp_path, caplog, settings):
    GenerationConfig.from_file(config_file(tmp_path, json.dumps(settings)))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_settings_of_a_file_arrive(tmp_path):
    stated = {
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[1, 2], [3]],
        "suppress_tokens": [4, -1],
        "begin_suppress_tokens": [5],
        "min_length": 6,
        "min_new_tokens": 7,
    }
    config = GenerationConfig.from_file(config_file(tmp_path, json.dumps(stated)))
    expected = {name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()}
    assert {name: getattr(config, name) for name in stated} == expected | {"bad_words_ids": ((1, 2), (3,))}
    assert GenerationConfig().override(**{name: getattr(config, name) for name in stated}, do_sample=False) == config
