"""What the installed transformers calls things that were renamed between the versions that we take (5.23, 5.24)."""

from __future__ import annotations

import dataclasses
import functools


@functools.cache
def cache_name() -> str:
    """The state between calls, as ``forward`` takes and gives it: "past_key_values", from 5.24 on "cache"."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"
