"""An exported program as a model for transformers: its ``generate`` runs on it, with everything that comes with that.

In: the folder of an artifact. Out: ``ExportedModelForCausalLM``, which takes the place of ``AutoModelForCausalLM`` in
code that generates. torch and transformers are imported with this module; ``lfm2_export`` imports it on first use.

Rows are handed to the runner without their padding, so a padded row gives what it gives alone.

Shape suffixes: B rows, T new columns (tokens and padding), V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from lfm2_export.backends.base import Runner
from lfm2_export.errors import GenerationError, RunnerError
from lfm2_export.runners import load_runner
from lfm2_export.transformers_cache import ExportedCache, StateDesk

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
# What a program's activations can stand in for: bfloat16 and float16 are what checkpoints are published in.
_SERVED = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.bfloat16),
}
_IDS_ONLY = "an exported program starts at token ids; pass input_ids"
_LOGITS_ONLY = "an exported program gives logits only"


class ExportedModelForCausalLM(GenerationMixin):
    """A causal language model that runs an exported program.

    Args:
        runner: runs the program; it belongs to the model from here on.
        config: the checkpoint's configuration.
        generation_config: defaults of ``generate``.
        dtype: the program's activations.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    # A conv state cannot go back: transformers then refuses assisted generation by itself.
    _is_stateful = True

    def __init__(
        self,
        runner: Runner,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ):
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.dtype = dtype
        self._desk = StateDesk(runner)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device_map: object = None,
        dtype: str | torch.dtype | None = None,
        scheme: str | None = None,
        backend: str | None = None,
        threads: int | None = None,
        **unknown: Any,
    ) -> ExportedModelForCausalLM:
        """Opens an artifact.

        Args:
            pretrained_model_name_or_path: its folder.
            device_map: None, "auto" or "cpu".
            dtype: "auto", None, or a float type that the program's activations can stand in for; the program's own
                type is used in any case, since it is part of it.
            scheme: which program; default: the preferred one that is there.
            backend: "onnx" or "executorch"; default: the first one that is there.
            threads: default: every core that this process may use.

        Raises:
            GenerationError: an option that an exported program cannot follow.
            ArtifactError: the folder is not a whole artifact, or has no such program.
        """
        if unknown:
            raise GenerationError(
                f"from_pretrained: {', '.join(sorted(unknown))} cannot be set on an exported program; "
                "known options: device_map, dtype, scheme, backend, threads"
            )
        _check_device(device_map, "device_map")
        runner = load_runner(pretrained_model_name_or_path, scheme=scheme, backend=backend, threads=threads)
        folder = str(pretrained_model_name_or_path)
        return cls(
            runner,
            AutoConfig.from_pretrained(folder, local_files_only=True),
            _generation_config(folder),
            dtype=_check_dtype(dtype, _activation_dtype(runner)),
        )

    @property
    def device(self) -> torch.device:
        return _CPU

    @property
    def runner(self) -> Runner:
        """The runner below; using it directly takes the state from whoever holds it."""
        return self._desk.runner

    def to(self, device: str | torch.device) -> ExportedModelForCausalLM:
        """Does nothing, for code that moves models; a GenerationError for another device than the CPU."""
        _check_device(device, "to")
        return self

    def eval(self) -> ExportedModelForCausalLM:
        """Does nothing: a program has no training mode."""
        return self

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Nothing to choose: how experts are computed is part of the program."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def generate(self, inputs: torch.Tensor | Mapping[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, which also takes what a tokenizer returns as it is.

        Args:
            inputs: token ids [B, T], or a BatchEncoding (any mapping) with input_ids and attention_mask.
            args, kwargs: as in transformers; it refuses what it does not know by name.
        """
        if kwargs.pop("trust_remote_code", None) or isinstance(kwargs.get("custom_generate"), str):
            raise GenerationError(
                "generate: custom_generate with code from a repository is not supported; pass a callable"
            )
        _refuse("inputs_embeds", kwargs.get("inputs_embeds") is not None, _IDS_ONLY)
        if isinstance(inputs, Mapping):
            if both := sorted(inputs.keys() & kwargs.keys()):
                raise GenerationError(f"generate: {', '.join(both)} was given twice; pass it once")
            return super().generate(None, *args, **inputs, **kwargs)
        return super().generate(inputs, *args, **kwargs)

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
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

        Raises:
            GenerationError: an input that the program cannot follow.
        """
        _refuse("inputs_embeds", inputs_embeds is not None, _IDS_ONLY)
        _refuse("output_attentions", bool(output_attentions), _LOGITS_ONLY)
        _refuse("output_hidden_states", bool(output_hidden_states), _LOGITS_ONLY)
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise GenerationError(
                "forward: input_ids with shape [batch, tokens] expected; pass what the tokenizer returns"
            )
        cache = self._check_cache(past_key_values)
        only_last = labels is None and (input_ids.shape[1] == 1 or _is_one(logits_to_keep))
        with self._desk.lock:
            logits = self._advance(cache, input_ids, attention_mask, position_ids, only_last)
        loss = None if labels is None else _loss(logits, labels, attention_mask)
        keep = self.config.use_cache if use_cache is None else use_cache
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits if only_last else _keep(logits, logits_to_keep),
            past_key_values=cache if keep else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _check_cache(self, past_key_values: object) -> ExportedCache:
        if past_key_values is None:
            return self._desk.borrow()
        if not isinstance(past_key_values, ExportedCache) or past_key_values.desk is not self._desk:
            raise GenerationError(
                f"past_key_values: a {type(past_key_values).__name__} is not a state of this model; "
                "pass what an earlier call returned, or nothing"
            )
        return past_key_values

    def _advance(
        self,
        cache: ExportedCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        only_last: bool,
    ) -> torch.Tensor:
        """Runs the new tokens; logits float32 [B, 1, V] or [B, T, V]."""
        runner, (batch_size, columns) = self._desk.runner, input_ids.shape
        lengths = cache.lengths if cache.columns else np.zeros(batch_size, dtype=np.int64)
        attended_BT = _attended(attention_mask, lengths, cache.columns, batch_size, columns)
        _check_positions(position_ids, attended_BT, lengths)
        rows = [ids[mask] for ids, mask in zip(input_ids.cpu().numpy(), attended_BT, strict=True)]
        self._desk.bring_in(cache, batch_size)
        if only_last:
            logits = runner.prefill(rows, chunk_size=cache.chunk_size)[:, None]
        else:
            logits = np.zeros((batch_size, columns, runner.vocab_size), dtype=np.float32)
            for row, (mask, scores) in enumerate(zip(attended_BT, _all_logits(runner, rows), strict=True)):
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
        if (given := model_kwargs.get("past_key_values")) is not None:
            cache = self._check_cache(given)
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = ExportedCache(self._desk)
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


def _loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """transformers' loss, without the labels that would be predicted from padding: nothing was computed there."""
    if labels_BT.shape != logits_BTV.shape[:2]:
        raise GenerationError(f"labels have shape {list(labels_BT.shape)}; {list(logits_BTV.shape[:2])} expected")
    if attention_mask is not None:
        padding = attention_mask[:, -labels_BT.shape[1] :][:, :-1] == 0
        labels_BT = torch.cat([labels_BT[:, :1], labels_BT[:, 1:].masked_fill(padding, -100)], dim=1)
    return ForCausalLMLoss(logits=logits_BTV, labels=labels_BT, vocab_size=logits_BTV.shape[-1])


def _all_logits(runner: Runner, rows: list[np.ndarray]) -> list[np.ndarray]:
    """The logits after every new token, [T_b, V] per row, from the scoring graph or token by token without one."""
    if runner.can_score:
        return runner.prefill_scored(rows)
    if len({len(row) for row in rows}) > 1:
        raise RunnerError("logits of every position in padded rows need the scoring graph; export the scheme again")
    steps = [runner.prefill(step[:, None]) for step in np.stack(rows).T]
    return list(np.stack(steps, axis=1))


def _attended(
    attention_mask: torch.Tensor | None, lengths: np.ndarray, past: int, batch_size: int, columns: int
) -> np.ndarray:
    """Which of the new columns are tokens, bool [B, T]."""
    if len(lengths) != batch_size:
        raise GenerationError(
            f"input_ids has {batch_size} rows, but past_key_values has {len(lengths)}; they must agree"
        )
    if attention_mask is None:
        return np.ones((batch_size, columns), dtype=bool)
    if tuple(attention_mask.shape) != (batch_size, past + columns):
        raise GenerationError(
            f"attention_mask has shape {list(attention_mask.shape)}; [{batch_size}, {past + columns}] expected: "
            "the columns of past_key_values and the new ones"
        )
    mask = attention_mask.cpu().numpy() != 0
    if (mask[:, :past].sum(axis=1) != lengths).any():
        raise GenerationError(
            "attention_mask differs from the one that past_key_values was made with; keep its columns"
        )
    new = mask[:, past:]
    if not new.any(axis=1).all():
        row = int(np.argmin(new.any(axis=1)))
        raise GenerationError(
            f"attention_mask: row {row} has no token among the {columns} new columns; pass more columns at once"
        )
    # More than one beginning of a run of tokens: there is padding in between.
    if ((np.diff(new.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1) > 1).any():
        raise GenerationError("attention_mask: padding between tokens of one row is not possible; put it at an end")
    return new


def _check_positions(position_ids: torch.Tensor | None, attended_BT: np.ndarray, lengths: np.ndarray) -> None:
    if position_ids is None:
        return
    usual_BT = lengths[:, None] + attended_BT.cumsum(axis=1) - 1
    given_BT = np.broadcast_to(position_ids.cpu().numpy(), usual_BT.shape)
    if (given_BT != usual_BT)[attended_BT].any():
        raise GenerationError("position_ids: an exported program counts each row's tokens itself; leave them out")


def _keep(logits_BTV: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    if isinstance(logits_to_keep, int):
        return logits_BTV[:, -logits_to_keep:] if logits_to_keep else logits_BTV
    if logits_to_keep.ndim == 1:
        return logits_BTV[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return logits_BTV[logits_to_keep]
    return torch.take_along_dim(logits_BTV, logits_to_keep[..., None], dim=1)


def _is_one(logits_to_keep: int | torch.Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 1


def _refuse(name: str, given: bool, reason: str) -> None:
    if given:
        raise GenerationError(f"{name}: {reason}")


def _check_device(device: object, name: str) -> None:
    if isinstance(device, Mapping) and set(device.values()) <= {"cpu", _CPU}:
        return
    if device not in (None, "auto", "cpu", _CPU):
        raise GenerationError(f'{name}={device!r}: exported programs run on the CPU; pass None, "auto" or "cpu"')


def _check_dtype(asked: str | torch.dtype | None, own: torch.dtype) -> torch.dtype:
    """The program's own type, if it can stand in for the one asked for."""
    if asked is None or asked == "auto":
        return own
    wanted = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise GenerationError(f'dtype={asked!r} is not a float type; pass "auto", "float32", "float16" or "bfloat16"')
    if wanted not in _SERVED[own]:
        raise GenerationError(
            f'dtype={asked!r}: this program computes in {_name(own)}; pass dtype="auto" or export another scheme'
        )
    if wanted != own:
        logger.info("dtype=%s was asked for; this program computes in %s", _name(wanted), _name(own))
    return own


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _activation_dtype(runner: Runner) -> torch.dtype:
    """The state has the type that the program computes in."""
    cache = getattr(runner, "cache", None)
    names = {tensor.dtype for tensor in cache.tensors} if cache else set()
    return torch.float16 if names == {"float16"} else torch.float32


def _generation_config(folder: str) -> GenerationConfig | None:
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)
