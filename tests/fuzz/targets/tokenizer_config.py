"""tokenizer_config.json, special_tokens_map.json and the chat template's own file, beside a good tokenizer.json."""

from __future__ import annotations

from functools import cache

from lfm2_export.text import Tokenizer
from tests.fuzz.findings import attempt
from tests.fuzz.mutation import bundle_mutator, json_mutator, mutate_bytes
from tests.fuzz.targets import FOLDER
from tests.fuzz.targets.chat_template import LIMITS
from tests.fuzz.targets.tokenizer import use
from tests.fuzz.template_mutation import mutate_template
from tests.fuzz.workspace import workspace

_KEYS = (
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "bos_token", "eos_token"),
    *(
        "unk_token",
        "pad_token",
        "cls_token",
        "sep_token",
        "mask_token",
        "image_token",
        "chat_template",
        "content",
        "special",
    ),
    *("single_word", "lstrip", "rstrip", "normalized", "split_special_tokens", "add_bos_token"),
    *("tokenizer_class", "model_max_length", "name", "template", "default", "tool_use", "__type", "AddedToken"),
)

mutate = bundle_mutator(
    {"*.json": json_mutator(*_KEYS), "*.jinja": mutate_template, "*": mutate_bytes},
    (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ),
)


@cache
def _good_tokenizer() -> bytes:
    return (FOLDER / "corpus" / "tokenizer" / "byte_level_bpe.json").read_bytes()


def fuzz_one(data: bytes) -> None:
    folder = workspace().empty()
    workspace().put("tokenizer.json", _good_tokenizer())  # the bundle's own, where it has one, finds its name taken
    workspace().put_bundle(folder, data)
    tokenizer = attempt(Tokenizer.from_dir, folder, template_limits=LIMITS)
    if tokenizer is not None:
        use(tokenizer)
