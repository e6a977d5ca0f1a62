"""An exported program as a model for transformers: its ``generate`` runs on it, with everything that comes with that.

In: the folder of an artifact. Out: ``ExportedModelForCausalLM``, which takes the place of ``AutoModelForCausalLM`` in
code that generates. torch and transformers are imported with this module; ``lfm2_export`` imports it on first use.

Rows are handed to the runner without their padding, so a padded row gives what it gives alone.

Shape suffixes: B rows, T new columns (tokens and padding), V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from inspect import signature
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from lfm2_export.backends.base import Runner, RunnerOptions
from lfm2_export.choices import BackendName, KernelsName, KvCacheName, SchemeName
from lfm2_export.errors import GenerationError
from lfm2_export.manifest import CheckpointRecord, Program
from lfm2_export.messages import shown
from lfm2_export.runners import open_runner
from lfm2_export.transformers_cache import ExportedCache, StateDesk
from lfm2_export.transformers_config import changed_config, fields_of, generation_settings, own_config
from lfm2_export.transformers_inputs import all_logits, attended, check_positions, kept, loss_of, only_last
from lfm2_export.transformers_module import ProgramModule
from lfm2_export.transformers_names import cache_name
from lfm2_export.transformers_options import (
    CPU,
    FORWARD_OPTIONS,
    IDS_ONLY,
    check_device,
    check_options,
    load_options,
    refuse,
    served_dtype,
)
from lfm2_export.transformers_source import opened
from lfm2_export.transformers_speculation import speculating, take_request

logger = logging.getLogger(__name__)


class ExportedModelForCausalLM(ProgramModule, GenerationMixin):
    """A causal language model that runs an exported program.

    Args:
        runner: runs the program; it belongs to the model from here on.
        config: the checkpoint's configuration.
        generation_config: defaults of ``generate``.
        dtype: the program's activations.
        program: its entry in the manifest, for what the model says of itself.
        origin: the checkpoint that it is of, by which drafters know their target.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    # transformers' own assisted generation cuts caches back; ours is behind the runner (transformers_speculation.py).
    _is_stateful = True

    def __init__(
        self,
        runner: Runner,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        program: Program | None = None,
        origin: CheckpointRecord | None = None,
    ):
        self.config = config
        self.name_or_path = config.name_or_path
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.dtype = dtype
        self.program, self._origin = program, origin
        self._desk = StateDesk(runner)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        generation_config: GenerationConfig | None = None,
        device_map: object = None,
        dtype: object = None,
        torch_dtype: object = None,
        subfolder: str | None = None,
        output_loading_info: bool = False,
        scheme: SchemeName | None = None,
        backend: BackendName | None = None,
        threads: int | None = None,
        kernels: KernelsName | None = None,
        kv_cache: KvCacheName | None = None,
        **options: Any,
    ) -> ExportedModelForCausalLM:
        """Opens an artifact. Nothing is unpickled or run from it, whatever is asked for.

        Args:
            pretrained_model_name_or_path: its folder, or ``organization/name[@revision]`` on the Hub, of which the
                program's files are fetched (``revision`` and ``local_files_only`` are followed).
            config: to use instead of the artifact's, where it describes the same model.
            generation_config: defaults of ``generate`` to use instead of the artifact's.
            device_map: None, "auto", "cpu", or a mapping of parts to the CPU.
            dtype: "auto", None, or a float type that the program's activations can stand in for; the program's own
                type is used in any case, since it is part of it.
            torch_dtype: the older name of ``dtype``.
            subfolder: where the artifact lies in the folder.
            output_loading_info: also return, as transformers does, what was missing in its files: nothing.
            scheme: which program; default: the preferred one that is there.
            backend: "onnx" or "executorch"; default: the first one that is there.
            threads: default: every core that this process may use.
            kernels, kv_cache: as in ``load_runner``.
            options: transformers' and optimum's other ones, and fields of the configuration: taken where they change
                nothing (``trust_remote_code``, ``low_cpu_mem_usage``, ``attn_implementation="sdpa"``, ...).

        Raises:
            GenerationError: an option that there is not, or that an exported program cannot follow.
            ArtifactError: the folder is not a whole artifact, or has no such program.
        """
        asked = {"backend": _word("backend", backend), "scheme": _word("scheme", scheme)}
        artifact = opened(pretrained_model_name_or_path, subfolder, options, **asked)
        program = artifact.program(**asked)
        own = own_config(artifact.path)
        changes = {name: options.pop(name) for name in fields_of(own, options)}
        known = load_options([program.scheme for program in artifact.programs])
        check_options("from_pretrained", options, known, {*signature(cls.from_pretrained).parameters, *own.to_dict()})
        check_device(device_map, "device_map")
        if options.get("trust_remote_code"):
            logger.info("trust_remote_code: whatever it says, nothing from an artifact is ever run")
        activations = served_dtype(torch_dtype if dtype is None else dtype, _activation_dtype(program))
        settings = generation_settings(artifact.path, generation_config)
        described = changed_config(own, config, changes)
        described.dtype = activations
        run_with = RunnerOptions.parse(threads=threads, kernels=kernels, kv_cache=kv_cache)
        runner = open_runner(artifact, program, run_with)
        model = cls(
            runner, described, settings, dtype=activations, program=program, origin=artifact.manifest.checkpoint
        )
        if isinstance(attention := options.get("attn_implementation"), str):
            model.set_attn_implementation(attention)
        if device_map is not None:
            model.hf_device_map = {"": CPU}
        if output_loading_info:  # as in transformers, whose signature leaves it out too
            return model, _nothing_missing()  # type: ignore[return-value]
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def generate(self, inputs: torch.Tensor | Mapping[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, which also takes what a tokenizer returns as it is.

        Args:
            inputs: token ids [B, T], or a BatchEncoding (any mapping) with input_ids and attention_mask.
            args, kwargs: as in transformers; it refuses what it does not know by name. ``prompt_lookup_num_tokens``
                (how many at most) and ``assistant_model`` (another model of this class with the same vocabulary, or
                what ``lfm2_export.load_drafter`` returns for one of this model's drafters) change the speed alone;
                ``speculate_inexact=True`` allows them where tokens may differ: on all but q4 and q8 on our operators.
        """
        kwargs.pop("trust_remote_code", None)
        if isinstance(kwargs.get("custom_generate"), str):
            raise GenerationError(
                "generate: custom_generate with code from a repository is not supported; pass a callable"
            )
        refuse("inputs_embeds", kwargs.get("inputs_embeds") is not None, IDS_ONLY)
        if isinstance(inputs, Mapping):
            if both := sorted(inputs.keys() & kwargs.keys()):
                raise GenerationError(f"generate: {', '.join(both)} was given twice; pass it once")
            kwargs, inputs = {**inputs, **kwargs}, None
        if args and isinstance(args[0], GenerationConfig):
            kwargs["generation_config"], args = args[0], args[1:]
        with speculating(self._desk, take_request(kwargs, self.generation_config), self._origin):
            return super().generate(inputs, *args, **kwargs)

    # Traced, it would be slower: what there is to compile is compiled.
    @torch.compiler.disable(reason="an exported program is compiled already; leave torch.compile out")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: ExportedCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        cache: ExportedCache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One forward pass over [B, T] new columns.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, past + T], nonzero for tokens; padding may be on the left and on the right.
            position_ids: only accepted where they are the usual ones, counted per row without padding.
            past_key_values: what an earlier call of this model returned.
            labels: int64 [B, T], -100 where there is none; gives ``loss``, in which padding predicts nothing.
            use_cache: return the state (default: as the config says).
            logits_to_keep: 1 gives each row's last *token*, whatever padding follows; 0 all columns, zero at padding.
            return_dict: False gives a tuple (default: as the config says).
            num_items_in_batch: what the loss is divided by, where it is not the number of labels.
            cache: the name of ``past_key_values`` from transformers 5.24 on; the output has the installed one's name.
            options: transformers' other ones, taken where they change nothing.

        Raises:
            GenerationError: an input that the program cannot follow.
        """
        refuse("inputs_embeds", inputs_embeds is not None, IDS_ONLY)
        if options:
            check_options("forward", options, FORWARD_OPTIONS, signature(self.forward).parameters)
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise GenerationError(
                "forward: input_ids with shape [batch, tokens] expected; pass what the tokenizer returns"
            )
        if cache is not None and past_key_values is not None:
            raise GenerationError("forward: cache and past_key_values are one thing; pass one of them")
        cache = self._check_cache(past_key_values if cache is None else cache)
        short = labels is None and (input_ids.shape[1] == 1 or only_last(logits_to_keep))
        with self._desk.lock:
            logits = self._advance(cache, input_ids, attention_mask, position_ids, short)
        loss = None if labels is None else loss_of(logits, labels, attention_mask, num_items_in_batch)
        keep = self.config.use_cache if use_cache is None else use_cache
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits if short else kept(logits, logits_to_keep),
            **{cache_name(): cache if keep else None},
        )
        as_said = self.config.return_dict if return_dict is None else return_dict
        return output if as_said else output.to_tuple()

    def _check_cache(self, given: object) -> ExportedCache:
        if given is None:
            return self._desk.borrow()
        if not isinstance(given, ExportedCache) or given.desk is not self._desk:
            raise GenerationError(
                f"{cache_name()}: a {type(given).__name__} is not a state of this model; "
                "pass what an earlier call returned, or nothing"
            )
        return given

    def _advance(
        self,
        cache: ExportedCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        short: bool,
    ) -> torch.Tensor:
        """Runs the new tokens; logits float32 [B, 1, V] (``short``) or [B, T, V]."""
        runner, (batch_size, columns) = self._desk.runner, input_ids.shape
        lengths = cache.lengths if cache.columns else np.zeros(batch_size, dtype=np.int64)
        attended_BT = attended(attention_mask, lengths, cache.columns, batch_size, columns)
        check_positions(position_ids, attended_BT, lengths)
        rows = [ids[mask] for ids, mask in zip(input_ids.cpu().numpy(), attended_BT, strict=True)]
        self._desk.bring_in(cache, batch_size)
        if short:
            logits = runner.prefill(rows, chunk_size=cache.chunk_size)[:, None]
        else:
            logits = np.zeros((batch_size, columns, runner.vocab_size), dtype=np.float32)
            for row, (mask, scores) in enumerate(zip(attended_BT, all_logits(runner, rows), strict=True)):
                logits[row, mask] = scores
        cache.appended(columns)
        return torch.from_numpy(logits)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """transformers' own, without the tokenizers that it passes along for stop strings."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        self._end_with_the_context(generation_config, model_kwargs.get("attention_mask"))
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise GenerationError(
                f"cache_implementation={implementation!r}: an exported program has one cache; leave it out"
            )
        if (given := model_kwargs.get(cache_name())) is not None:
            cache = self._check_cache(given)
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = model_kwargs[cache_name()] = ExportedCache(self._desk)
        else:
            return
        # The runner cuts each row itself: of columns cut by transformers, some hold nothing but a row's left padding.
        cache.chunk_size, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """None: the runner counts positions itself, and rightly so after right padding, where transformers does not."""

    def _end_with_the_context(self, generation_config: GenerationConfig, attention_mask: torch.Tensor | None) -> None:
        """Generation ends where the longest row's context is full; its last token needs no place there."""
        padding = 0 if attention_mask is None else int((attention_mask == 0).sum(dim=1).min())
        limit = self._desk.runner.context_length + padding + 1
        if generation_config.max_length > limit:
            logger.warning("generation ends after %d tokens, where the program's context is full", limit)
            generation_config.max_length = limit

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise GenerationError("generate_batch: an exported program has no paged cache; pass generate a padded batch")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        raise GenerationError("load_custom_generate: code from a repository is never run; pass generate a callable")


class ExportedConfig(PreTrainedConfig):
    """Stands for exported programs in transformers' list of models that generate text, where ``pipeline`` looks."""

    model_type = "lfm2_export"


AutoModelForCausalLM.register(ExportedConfig, ExportedModelForCausalLM)


def _nothing_missing() -> dict[str, Any]:
    """transformers' report on a checkpoint that has what its model needs."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def _word(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise GenerationError(f"from_pretrained: {name}={shown(value)}: give a name")
    return value


def _activation_dtype(program: Program) -> torch.dtype:
    """The state has the type that the program computes in."""
    names = {tensor.dtype for tensor in program.cache.tensors}
    return torch.float16 if names == {"float16"} else torch.float32
