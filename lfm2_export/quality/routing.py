"""How often a model's routers send a token to the same experts as the checkpoint's.

In: eager models and windows of tokens. Out: for each layer with experts, which ones every token was sent to, and the
share of tokens that two models agree about. An exported program gives no router logits: what is run is the eager model,
in fp32, with the weights that the program stores. What its int8 activations change is not in the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lfm2_export.models.decoder import DecoderForCausalLM
from lfm2_export.models.lfm2_moe import Router
from lfm2_export.parity.sample import Window

# By layer: the experts of each token in ascending order, [tokens, k].
Chosen = Mapping[int, npt.NDArray[np.integer[Any]]]


def chosen_experts(model: DecoderForCausalLM, windows: Sequence[Window]) -> Chosen:
    """The experts of every token of every window, each window on its own; empty for a dense model."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    found: list[list[np.ndarray]] = [[] for _ in routers]

    def keep(into: list[np.ndarray]) -> Any:
        return lambda module, given, out: into.append(out[2].sort(dim=-1).values.numpy())

    hooks = [router.register_forward_hook(keep(into)) for router, into in zip(routers, found, strict=True)]
    try:
        with torch.inference_mode():
            for window in windows if routers else ():
                model.model(torch.from_numpy(np.asarray(window.inputs, np.int64))[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: np.concatenate(one) for layer, one in zip(model.config.moe_layers, found, strict=True)}


def agreement(expected: Chosen, found: Chosen) -> dict[int, float]:
    """By layer: the share of tokens that are sent to the very same experts, whatever their order."""
    return {layer: float((found[layer] == chosen).all(axis=1).mean()) for layer, chosen in expected.items()}
