"""What torch's modules and transformers' models offer beside generating, as far as an exported program has it.

Methods that would change nothing do nothing, and weights are known by name and shape. What a program does not have is
refused by name where it is asked for, so that ``hasattr`` says no, as for any attribute that is not there.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedConfig

from lfm2_export import transformers_weights as weights
from lfm2_export.artifact import Artifact
from lfm2_export.backends.base import Runner
from lfm2_export.copies import copy_artifact
from lfm2_export.errors import GenerationError
from lfm2_export.manifest import MODEL, Program
from lfm2_export.messages import one_line
from lfm2_export.transformers_cache import StateDesk
from lfm2_export.transformers_options import (
    CPU,
    SAVE_OPTIONS,
    AttributeRefusedError,
    check_attention,
    check_device,
    check_options,
    no_such,
    refuse,
    served_dtype,
)
from lfm2_export.transformers_weights import ProgramTable, ProgramWeight

_TRAINING = "an exported program cannot be trained; train the checkpoint and export it again"
_CPU_ONLY = "exported programs run on the CPU; leave it out"
_FIXED = "an exported program's weights cannot be changed; change the checkpoint and export it again"
_INSIDE = "an exported program's weights are inside it, quantized; the checkpoint has them"
_NO_MODULES = "an exported program is one graph without modules; use the checkpoint's model for that"
_ELSEWHERE = "an exported program does not have it; use the checkpoint's model for that"
_ADAPTERS = "an exported program takes no adapters; merge one into the checkpoint and export that"
_UPLOAD = "upload the artifact's folder (huggingface-cli upload REPO FOLDER)"

# Why what people ask for first is not there; of the rest it is said in general.
_REASONS = {
    **dict.fromkeys(("cuda", "hpu", "ipu", "mps", "mtia", "npu", "to_empty", "xpu"), _CPU_ONLY),
    **dict.fromkeys(("activation_checkpointing_enable", "enable_input_require_grads", "init_weights"), _TRAINING),
    **dict.fromkeys(("gradient_checkpointing_enable", "initialize_weights", "post_init"), _TRAINING),
    **dict.fromkeys(("dequantize", "load_state_dict", "resize_token_embeddings", "set_input_embeddings"), _FIXED),
    **dict.fromkeys(("resize_position_embeddings", "set_output_embeddings"), _FIXED),
    **dict.fromkeys(("get_buffer", "get_parameter", "state_dict"), _INSIDE),
    **dict.fromkeys(("add_adapter", "delete_adapter", "enable_adapters", "load_adapter", "set_adapter"), _ADAPTERS),
    "push_to_hub": _UPLOAD,
    **dict.fromkeys(("apply", "base_model", "get_decoder", "get_submodule", "layers", "lm_head", "model"), _NO_MODULES),
    **dict.fromkeys(("register_forward_hook", "register_forward_pre_hook", "set_submodule"), _NO_MODULES),
}


class ProgramModule:
    """The base of ``ExportedModelForCausalLM``.

    ``config``: the checkpoint's; ``name_or_path``: the artifact's folder; ``dtype``: the program's activations;
    ``program``: its entry in the manifest, None where it is not known.
    """

    config: PreTrainedConfig
    name_or_path: str
    dtype: torch.dtype
    program: Program | None
    _desk: StateDesk

    framework = "pt"
    is_gradient_checkpointing = False
    supports_gradient_checkpointing = False
    training = False

    @property
    def runner(self) -> Runner:
        """The runner below; using it directly takes the state from whoever holds it."""
        return self._desk.runner

    @property
    def device(self) -> torch.device:
        return CPU

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def __repr__(self) -> str:
        program = f"{self.program}, " if self.program else ""
        return (
            f"{type(self).__name__}(\n"
            f"  artifact: {one_line(self.name_or_path) or 'unknown'}\n"
            f"  program: {program}{str(self.dtype).removeprefix('torch.')} activations\n"
            f"  model: {self.config.model_type}, {self.num_parameters():,} parameters\n"
            f"  context: {self.runner.context_length:,} tokens\n"
            ")"
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Copies the artifact, with all of its programs, into a folder that is new or empty.

        Args:
            save_directory: the folder.
            options: transformers' other ones, which are taken where they change nothing.

        Raises:
            GenerationError: an option that there is not, or that cannot be followed.
            ArtifactError: the folder holds something, or cannot be written.
        """
        check_options("save_pretrained", options, SAVE_OPTIONS, ("save_directory",))
        copy_artifact(Artifact.open(self.name_or_path, verify=False), Path(save_directory))

    # What would move it or change its type

    def to(
        self,
        device: object = None,
        dtype: object = None,
        non_blocking: bool = False,
        *,
        tensor: torch.Tensor | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> Self:
        """Does nothing, for code that moves models.

        Args:
            device: a device of the CPU, or as in torch a dtype, or a tensor with both.
            dtype: a float type that the program's activations can stand in for.
            non_blocking, tensor, memory_format: as in torch.

        Raises:
            GenerationError: another device than the CPU, or a type that is no float type or more precise than the
                program.
        """
        like = device if isinstance(device, torch.Tensor) else tensor
        if like is not None:
            device, dtype = like.device, like.dtype
        elif isinstance(device, torch.dtype):
            device, dtype = None, device
        check_device(device, "to")
        served_dtype(dtype, self.dtype, "to")
        return self

    def cpu(self) -> Self:
        return self

    def float(self) -> Self:
        return self.to(torch.float32)

    def half(self) -> Self:
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def double(self) -> Self:
        return self.to(torch.float64)

    def type(self, dst_type: object) -> Self:
        return self.to(dtype=dst_type)

    # What would train it

    def eval(self) -> Self:
        """Does nothing: a program has no training mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        refuse("train", bool(mode), _TRAINING)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        refuse("requires_grad_", bool(requires_grad), _TRAINING)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: there are no gradients."""

    def gradient_checkpointing_disable(self) -> None:
        """Does nothing: there are no gradients."""

    def disable_input_require_grads(self) -> None:
        """Does nothing: there are no gradients."""

    # How it is computed

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a program is compiled."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: what is tied was exported so."""

    def set_attn_implementation(self, attn_implementation: object) -> None:
        """Only noted in ``config``: "eager" and "sdpa" give what the program gives; a GenerationError for others."""
        check_attention(attn_implementation)
        self.config._attn_implementation = attn_implementation

    def get_experts_implementation(self) -> dict[str, str]:
        """Nothing to choose: how experts are computed is part of the program."""
        return {}

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    # What it is made of

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, ProgramWeight]]:
        """Each parameter under the name that transformers has for it, without its values; the embedding comes first.

        A module without its parts (``recurse=False``) has none, as in transformers.
        """
        return self._named(weights.parameter_shapes(self.config), prefix) if recurse else iter(())

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, ProgramWeight]]:
        """The routing's biases, without their values."""
        return self._named(weights.buffer_shapes(self.config), prefix) if recurse else iter(())

    def _named(self, shapes: Iterator[tuple[str, tuple[int, ...]]], prefix: str) -> Iterator[tuple[str, ProgramWeight]]:
        for name, shape in shapes:
            yield f"{prefix}.{name}" if prefix else name, ProgramWeight(name, shape, self.dtype)

    def parameters(self, recurse: bool = True) -> Iterator[ProgramWeight]:
        return (weight for _, weight in self.named_parameters(recurse=recurse))

    def buffers(self, recurse: bool = True) -> Iterator[ProgramWeight]:
        return (weight for _, weight in self.named_buffers(recurse=recurse))

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Self]]:
        """Itself only: a program is one graph."""
        yield "", self

    def modules(self) -> Iterator[Self]:
        yield self

    def named_children(self) -> Iterator[tuple[str, Any]]:
        return iter(())

    def children(self) -> Iterator[Any]:
        return iter(())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers counts them, however the program stores them; none of them is trainable."""
        return 0 if only_trainable else weights.count(self.config, without_embedding=exclude_embeddings)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the program's files: what its weights take, quantized as they are."""
        if self.program is None:
            return sum(weight.nbytes for weight in self.parameters())
        variants = set(self.program.graphs.values()) - {self.program.graphs[MODEL]}
        return sum(entry.bytes for name, entry in self.program.files.items() if name not in variants)

    def get_input_embeddings(self) -> ProgramTable:
        """The embedding's size (``num_embeddings``, ``weight.shape``), without its values."""
        return weights.table(self.config, self.dtype, head=False)

    def get_output_embeddings(self) -> ProgramTable:
        """The head's size, without its values."""
        return weights.table(self.config, self.dtype, head=True)

    # Copies

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A model with settings of its own on the same program, which never changes; caches keep their own state."""
        twin = memo[id(self)] = copy.copy(self)
        memo[id(self._desk)] = self._desk
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        raise GenerationError(
            f"{type(self).__name__} cannot be pickled: its program is open; give the folder's name and open it again "
            "with from_pretrained"
        )

    def __getattr__(self, name: str) -> Any:
        """Only what is not there comes here."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        model: Any = type(self)  # mypy takes classes for unhashable
        raise AttributeRefusedError(_why_missing(name, model))


@functools.lru_cache(maxsize=256)
def _why_missing(name: str, model: type) -> str:
    """Remembered, since transformers asks for some in every step."""
    from transformers import PreTrainedModel

    reason = _REASONS.get(name, _ELSEWHERE if hasattr(PreTrainedModel, name) else None)
    return f"{name}: {reason}" if reason else f"{model.__name__}: {no_such('attribute', [name], dir(model))}"
