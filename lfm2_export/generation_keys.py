"""What transformers' generation_config.json may state that this package does not do, and when that is no news.

In: the contents of such a file. Out: the names of settings that would change what transformers generates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# With the values that switch them off; null does so everywhere. The names are those of transformers 5.23.
_CHANGING: dict[str, tuple[object, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),  # transformers' own default for long
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}


def unsupported(settings: Mapping[str, Any]) -> list[str]:
    """Names of settings that are stated, not switched off, and change what is generated; sorted."""
    found = [name for name, off in _CHANGING.items() if _is_on(settings.get(name), off)]
    # A number of new tokens goes before a length.
    return [name for name in found if name != "max_length" or settings.get("max_new_tokens") is None]


def _is_on(value: Any, off: tuple[object, ...]) -> bool:
    return value is not None and value not in ([], {}, "") and value not in off
