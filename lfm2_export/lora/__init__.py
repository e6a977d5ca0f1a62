"""A LoRA adapter, merged while its base's weights stream by: ``settings.py`` (what peft's adapter_config.json says),
``weights.py`` (which of its tensors belong to which weight), ``merged.py`` (a weight with what the adapter adds).

In: a folder as peft saves it (adapter_config.json, adapter_model.safetensors) and an opened checkpoint's tensors. Out:
the same tensors, of which some stand for W + scale * B A. Whatever else an adapter may hold is refused by name.
"""

from lfm2_export.lora.merged import MergedTensor, MergedWeights
from lfm2_export.lora.weights import Adapter, open_adapter

__all__ = ["Adapter", "MergedTensor", "MergedWeights", "open_adapter"]
