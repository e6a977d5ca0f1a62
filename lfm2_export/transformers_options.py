"""What callers ask of transformers' models, held against what an exported program is: taken where it changes nothing,
else refused by name.

In: keyword arguments of ``from_pretrained`` and ``forward``, devices, dtypes. Out: nothing, or a GenerationError that
says what to do instead. A name that nobody knows is refused with the nearest one that exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from lfm2_export.errors import GenerationError
from lfm2_export.messages import shown
from lfm2_export.spelling import did_you_mean

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
IDS_ONLY = "an exported program starts at token ids; pass input_ids"
LOGITS_ONLY = "an exported program gives logits only; leave it out"
OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
# What a program's activations can stand in for: bfloat16 and float16 are what checkpoints are published in.
_SERVED = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.bfloat16),
}
# How accelerate spreads a model over what is there; a program is on the CPU whatever is.
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
# Of wrong names, how many a message quotes, and how much of one is compared with the right ones.
_NAMES = 3


class AttributeRefusedError(GenerationError, AttributeError):
    """An attribute that an exported program does not have; ``hasattr`` is false, as for any that is not there."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """``taken``: whether a value changes nothing here; ``reason``: why another one is refused, and what to do."""

    taken: Callable[[object], bool]
    reason: str = ""


def check_options(where: str, given: Mapping[str, Any], known: Mapping[str, Option], others: Collection[str]) -> None:
    """Takes the options that change nothing.

    Args:
        where: the method, for messages.
        known: what is known of each option.
        others: the names of the method's own parameters, which a wrong name may have meant.

    Raises:
        GenerationError: an option that nobody knows, or a value that an exported program cannot follow.
    """
    if unknown := sorted(given.keys() - known.keys()):
        raise GenerationError(f"{where}: {no_such('option', unknown, {*known, *others})}")
    for name, value in given.items():
        if not known[name].taken(value):
            raise GenerationError(f"{where}: {name}={shown(value)}: {known[name].reason}")


def no_such(kind: str, names: Sequence[str], known: Collection[str]) -> str:
    """Says that there is no such option or attribute, and which public ones look most like the first few names."""
    found = [f"{shown(name)}{_hint(name, known)}" for name in names[:_NAMES]]
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"there is no {kind} {', '.join(found)}{more}"


def _hint(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, sorted(other for other in known if not other.startswith("_")))


def refuse(name: str, given: bool, reason: str) -> None:
    if given:
        raise GenerationError(f"{name}: {reason}")


def _anything(value: object) -> bool:
    return True


def _nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | tuple | Mapping) and not value)


def _one_of(*values: str | int) -> Callable[[object], bool]:
    """One of ``values``, or a list or a mapping (of a model's parts) to nothing else."""

    def taken(value: object) -> bool:
        if isinstance(value, Mapping | list | tuple):
            return all(map(taken, value.values() if isinstance(value, Mapping) else value))
        return value is None or (isinstance(value, str | int) and value in values)

    return taken


# Where files come from (``transformers_source`` has followed what says something) and how weights are read: nothing in
# an artifact is unpickled or run, and its program is loaded whole.
_LOADING = (
    *("cache_dir", "code_revision", "force_download", "local_files_only", "mirror", "proxies", "resume_download"),
    *("revision", "token", "use_auth_token", "tqdm_class", "trust_remote_code"),
    *("from_flax", "from_tf", "ignore_mismatched_sizes", "low_cpu_mem_usage", "use_safetensors", "weights_only"),
    *("max_memory", "offload_buffers", "offload_folder", "offload_state_dict"),
    *("_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_name", "allow_all_kernels"),
    "use_io_binding",
)

_QUANTIZED = "a program's weights are quantized when it is exported; choose one with scheme, here {schemes}"
_GENERATION = "pass it to generate, or in a GenerationConfig as generation_config"
_BY_SCHEME = "the program is chosen by its scheme; pass scheme"
_PARALLEL = "an exported program runs in one process on the CPU; leave it out"
_KERNELS = 'a program brings its own kernels; kernels="lfm2" or "stock" chooses between them'
_ATTENTION = "how attention is computed is part of the program; leave it out"
_WEIGHTS = "the weights are those that were exported; export the checkpoint that has these"
_SESSION = "the runner makes its own session; threads, kernels and kv_cache are its options"

# What only changes something where it is given.
_REFUSED = {
    "adapter_kwargs": "merge the adapter into the checkpoint and export that",
    "decoder_file_name": _BY_SCHEME,
    "device_mesh": _PARALLEL,
    "disable_mmap": "the runtime maps the program's data file; leave it out",
    "distributed_config": _PARALLEL,
    "export": "lfm2_export.export(checkpoint, output=...) makes an artifact; leave it out to open one",
    "file_name": _BY_SCHEME,
    "from_transformers": "lfm2_export.export(checkpoint, output=...) makes an artifact; leave it out to open one",
    "fusion_config": _KERNELS,
    "gguf_file": "only artifacts are opened; export the checkpoint that it was made of",
    "kernel_config": _KERNELS,
    "key_mapping": _WEIGHTS,
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    **dict.fromkeys(OUTPUTS, LOGITS_ONLY),
    "provider_options": _SESSION,
    "quantization_config": _QUANTIZED,
    "session_options": _SESSION,
    "state_dict": _WEIGHTS,
    "torchscript": "an exported program cannot be traced; leave it out",
    "tp_plan": _PARALLEL,
    "use_flash_attention_2": _ATTENTION,
    "use_kernels": _KERNELS,
    "use_merged": _BY_SCHEME,
    "variant": _BY_SCHEME,
}

_LOAD_OPTIONS: Mapping[str, Option] = {
    **{name: Option(taken=_anything) for name in _LOADING},
    **{name: Option(taken=_nothing, reason=reason) for name, reason in _REFUSED.items()},
    # These give what the program gives, whichever is chosen.
    "_attn_implementation": Option(taken=_one_of("eager", "sdpa"), reason=_ATTENTION),
    "attn_implementation": Option(taken=_one_of("eager", "sdpa"), reason=_ATTENTION),
    "experts_implementation": Option(
        taken=_one_of("eager", "batched_mm", "grouped_mm"),
        reason="how experts are computed is part of the program; leave it out",
    ),
    "provider": Option(taken=_one_of("CPUExecutionProvider"), reason=_PARALLEL),
    "providers": Option(taken=_one_of("CPUExecutionProvider"), reason=_PARALLEL),
    "tp_size": Option(taken=_one_of(1), reason=_PARALLEL),
}


def load_options(schemes: Collection[str]) -> dict[str, Option]:
    """What ``from_pretrained`` knows beside its own parameters and the configuration's fields; ``schemes``: those that
    the artifact has."""
    here = ", ".join(schemes)
    named = {
        name: Option(taken=option.taken, reason=option.reason.format(schemes=here))
        for name, option in _LOAD_OPTIONS.items()
    }
    generation = (name for name in vars(GenerationConfig()) if not name.startswith("_"))
    return {name: Option(taken=_nothing, reason=_GENERATION) for name in generation} | named


_PACKED = "rows packed into one are not possible; pass a batch with attention_mask"

FORWARD_OPTIONS: Mapping[str, Option] = {
    # transformers' LFM2 does not read these either.
    "cache_position": Option(taken=_anything),
    "token_type_ids": Option(taken=_anything),
    "is_causal": Option(taken=_one_of(True), reason="an exported program attends to what came before; leave it out"),
    **{name: Option(taken=_nothing, reason=LOGITS_ONLY) for name in OUTPUTS},
    **{
        name: Option(taken=_nothing, reason=_PACKED)
        for name in ("cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx")
    },
}


_ALWAYS_WHOLE = "an artifact's files are copied as they are; leave it out"
SAVE_OPTIONS: Mapping[str, Option] = {
    **{
        name: Option(taken=_anything)
        for name in ("max_shard_size", "save_original_format", "save_peft_format", "token", "use_auth_token")
    },
    "is_main_process": Option(taken=lambda value: value is True, reason="one process saves; leave it out"),
    "safe_serialization": Option(taken=lambda value: value is True, reason="nothing is ever pickled; leave it out"),
    "push_to_hub": Option(taken=_nothing, reason="upload the folder afterwards (huggingface-cli upload REPO FOLDER)"),
    **{
        name: Option(taken=_nothing, reason=_ALWAYS_WHOLE)
        for name in ("quantization_config", "save_function", "state_dict", "variant")
    },
}


def check_attention(implementation: object) -> None:
    """Raises GenerationError for an attention that does not give what the program gives."""
    check_options("set_attn_implementation", {"attn_implementation": implementation}, _LOAD_OPTIONS, ())


def check_device(device: object, name: str) -> None:
    """Raises GenerationError for anything but the CPU: a device, a device_map, or a mapping of parts to devices."""
    places = list(device.values()) if isinstance(device, Mapping) else [device]
    if not all(_is_cpu(place) for place in places):
        raise GenerationError(f'{name}={shown(device)}: exported programs run on the CPU; pass None, "auto" or "cpu"')


def _is_cpu(device: object) -> bool:
    if isinstance(device, str):
        return device in _SPREADS or device.partition(":")[0] == "cpu"
    return device is None or (isinstance(device, torch.device) and device.type == "cpu")


def served_dtype(asked: object, own: torch.dtype, name: str = "dtype") -> torch.dtype:
    """The program's own type, if it can stand in for the one asked for.

    Args:
        asked: None, "auto", a float type or its name, or a mapping of a model's parts to those.
        own: what the program's activations are.
        name: the argument, for messages.

    Raises:
        GenerationError: it is no float type, or the program is less precise.
    """
    for one in asked.values() if isinstance(asked, Mapping) else [asked]:
        if one is not None and one != "auto":
            _check_dtype(one, own, name)
    return own


def _check_dtype(asked: object, own: torch.dtype, name: str) -> None:
    wanted = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise GenerationError(
            f'{name}={shown(asked)} is not a float type; pass "auto", "float32", "float16" or "bfloat16"'
        )
    if wanted not in _SERVED[own]:
        raise GenerationError(
            f"{name}={shown(asked)}: this program computes in {_name(own)}; leave it out or choose another scheme"
        )
    if wanted != own:
        logger.info("%s=%s was asked for; this program computes in %s", name, _name(wanted), _name(own))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
