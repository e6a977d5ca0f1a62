"""Runs a checkpoint's eager model layer by layer and keeps what every linear layer was given, as Hessians.

In: a checkpoint and rows of tokens. Out: a file of statistics (``statistics``). The weights of one layer are in memory
at a time, what layers hand on lies in files (``activations``), so peak memory is a layer, its Hessians and a batch. A
layer that is done is not done again: a collection that was killed goes on with the next one, and gives the same file.

An expert sees only the tokens that its router sends it: few of them say little of its input, and GPTQ takes what little
they say for the truth, which is worse than no data. So each expert's Hessian is drawn towards that of all the layer's
experts, the more the fewer tokens it has seen.

Shape suffixes: B rows, T tokens, D hidden_size, M tokens of a batch, N in_features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_export import interrupts
from lfm2_export.calibration.activations import BATCH_TOKENS, Activations
from lfm2_export.calibration.inputs import Input, inputs
from lfm2_export.calibration.statistics import VERSION, Description, StatisticsLayout, checkpoint_hash, packed
from lfm2_export.calibration.text import Text
from lfm2_export.calibration.workspace import Workspace, workspace
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.families.tensors import HEAD, block_prefix, expert_stacks
from lfm2_export.manifest import CheckpointRecord
from lfm2_export.messages import listed
from lfm2_export.packages import recorded_versions
from lfm2_export.progress import Progress
from lfm2_export.quant.formats import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn


logger = logging.getLogger(__name__)

# Tokens of the layer's mean that an expert's own are mixed with, as a multiple of its width. Measured on tiny-moe, the
# error on held-out inputs over refit's: w1 with 2 tokens a channel has 0.56 of its own alone and 0.41 mixed, with 8 a
# channel 0.41 and 0.39. What lies inside of an expert is no other expert's: of w2's inputs, only the mean's diagonal
# says anything (with 1 token a channel: 2.05 alone, 0.91 with the whole mean, 0.81 with the diagonal).
PRIOR, INNER_PRIOR = 2, 1
# An expert with fewer tokens than this multiple of its width owes most of its statistics to the others.
FEW = 1


def collect(
    checkpoint: Checkpoint,
    text: Text,
    path: Path,
    *,
    record: CheckpointRecord,
    diagonal: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> None:
    """Writes the statistics of ``text`` to ``path``.

    Args:
        record: the checkpoint's.
        diagonal: the inputs of which only the diagonal is kept.

    Raises:
        CheckpointError: a weight is missing or damaged.
        CalibrationError: the file cannot be written, or another process is at it.
        ResourceError: the disk is full.
    """
    found = inputs(checkpoint.config, checkpoint.model_tensors)
    layout = StatisticsLayout(inputs=found, diagonal=diagonal, source=text.source)
    with workspace(path, _key(checkpoint, text, diagonal, record)) as space:
        _Collection(checkpoint, text, layout, space, progress or Progress()).run()
        _write_header(space, layout, text, checkpoint_hash(record))
        space.finish(path)


def _key(checkpoint: Checkpoint, text: Text, diagonal: frozenset[str], record: CheckpointRecord) -> str:
    tokens = hashlib.sha256(text.rows_BT.tobytes()).hexdigest()
    made_by = [VERSION, BATCH_TOKENS, PRIOR, INNER_PRIOR, recorded_versions()]
    meaning = [checkpoint_hash(record), text.describe(), tokens, text.rows_BT.shape, sorted(diagonal), made_by]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def _write_header(space: Workspace, layout: StatisticsLayout, text: Text, checkpoint: str) -> None:
    description = Description(
        checkpoint=checkpoint,
        source=text.source,
        sha256=text.sha256,
        tokens=text.tokens,
        seen={name: space.state.seen[name] for name in layout.inputs},
        averaged=space.state.averaged,
    )
    if description.averaged:
        few = [name.removesuffix(".weight") for name in description.averaged]
        logger.warning(
            "%d experts' inputs saw fewer tokens than they are wide and have mostly their layer's mean: %s",
            len(few),
            listed(few, room=160),
        )
    descriptor = space.open_data(layout.nbytes)
    try:
        _write_all(descriptor, layout.header(description), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Collection:
    """The steps: the embeddings, every layer, the head."""

    def __init__(
        self, checkpoint: Checkpoint, text: Text, layout: StatisticsLayout, space: Workspace, progress: Progress
    ):
        from lfm2_export.models.loading import PartlyLoaded

        self.checkpoint, self.rows_BT, self.layout, self.space = checkpoint, text.rows_BT, layout, space
        self.progress = progress
        self.config = checkpoint.config
        self.parts = PartlyLoaded(checkpoint)
        self.activations = Activations(space.folder, (*text.rows_BT.shape, self.config.hidden_size))

    def run(self) -> None:
        import torch

        layers = self.config.num_hidden_layers
        steps: list[Callable[[], _Measured | None]] = [self._embed]
        steps += [lambda layer=layer: self._layer(layer) for layer in range(layers)]  # type: ignore[misc]
        steps.append(self._head)
        self.progress.start_steps("calibrating", len(steps))
        self.progress.advance(self.space.state.steps)
        data = self.space.open_data(self.layout.nbytes)
        try:
            with torch.inference_mode():
                for number, step in enumerate(steps):
                    if number >= self.space.state.steps:
                        self._keep(number, step(), data)
                        self.progress.advance(1)
        finally:
            os.close(data)

    def _keep(self, number: int, measured: _Measured | None, data: int) -> None:
        """The step's bytes, and then the state, on the disk."""
        state = self.space.state
        if measured is not None:
            for name, values in measured.hessians():
                _write_all(data, values.tobytes(), self.layout.offsets[name])
            os.fsync(data)
            seen, averaged = measured.seen, (*state.averaged, *measured.averaged())
            state = replace(state, seen={**state.seen, **seen}, averaged=averaged)
        if number <= self.config.num_hidden_layers:
            self.activations.sync(number)
        self.space.save(replace(state, steps=number + 1))

    def _embed(self) -> None:
        import torch

        with self.parts.loaded("model.embed_tokens") as table:
            for rows in self.activations.batches():
                self.activations.write(0, rows, table(torch.from_numpy(self.rows_BT[rows])).numpy())

    def _layer(self, number: int) -> _Measured:
        import torch

        from lfm2_export.models.decoder import Recorder, empty_cache

        measured = _Measured(self.layout, [one for one in self.layout.inputs.values() if one.layer == number])
        recorder = Recorder(hidden_states=False, attentions=False, router_logits=False)
        with self.parts.loaded(f"model.layers.{number}") as layer, _observed(self.checkpoint, number, layer, measured):
            for rows in self.activations.batches():
                interrupts.check()
                stream = torch.from_numpy(self.activations.read(number, rows))
                past = empty_cache(self.config, len(stream), stream.dtype, stream.device)
                layout = self.parts.model.model.layout(stream, None, None, 0)
                stream, delta = layer(stream, None, past, {}, layout, recorder)
                self.activations.write(number + 1, rows, (delta + stream).numpy())
        return measured

    def _head(self) -> _Measured:
        import torch

        measured = _Measured(self.layout, [self.layout.inputs[HEAD]])
        with self.parts.loaded("model.embedding_norm") as norm:
            for rows in self.activations.batches():
                hidden, _ = norm(torch.from_numpy(self.activations.read(self.config.num_hidden_layers, rows)))
                measured.add(HEAD, hidden)
        return measured


class _Measured:
    """Sums of a layer's inputs."""

    def __init__(self, layout: StatisticsLayout, inputs: list[Input]):
        self._layout, self._inputs = layout, {one.name: one for one in inputs}
        self._sums: dict[str, Tensor] = {}
        self.seen = dict.fromkeys(self._inputs, 0)

    def add(self, name: str, x: Tensor) -> None:
        """One more batch of what ``name`` is given, [..., N]."""
        import torch

        x_MN = x.flatten(0, -2)
        self.seen[name] += len(x_MN)
        is_diagonal, width = name in self._layout.diagonal, self._inputs[name].width
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = torch.zeros((width,) if is_diagonal else (width, width))
        if is_diagonal:
            total += x_MN.square().sum(0)
        else:
            total.addmm_(x_MN.T, x_MN)

    def averaged(self) -> tuple[str, ...]:
        """Experts' inputs that saw few tokens."""
        return tuple(
            one.name
            for one in self._inputs.values()
            if one.expert is not None and self.seen[one.name] < FEW * one.width
        )

    def hessians(self) -> Iterator[tuple[str, FloatArray]]:
        """Of each input, as it is stored."""
        means = self._means()
        for name, one in self._inputs.items():
            total, seen = self._sums.pop(name, None), self.seen[name]
            if one.expert is None:
                assert total is not None
                values = (total / seen).numpy()
            else:
                prior = (INNER_PRIOR if one.is_inner else PRIOR) * one.width
                mixed = means[one.matrix] * (prior / (seen + prior))
                if total is not None:
                    mixed += total / (seen + prior)
                values = mixed.numpy()
            yield name, packed(values) if values.ndim == 2 else values

    def _means(self) -> Mapping[str | None, Tensor]:
        """What an expert's statistics are drawn towards, by the matrix that it is the input of: the mean over all
        tokens and experts, or its diagonal."""
        means: dict[str | None, Tensor] = {}
        counts: dict[str | None, int] = {}
        for name, total in self._sums.items():
            one = self._inputs[name]
            if one.expert is not None:
                counts[one.matrix] = counts.get(one.matrix, 0) + self.seen[name]
                if one.matrix in means:
                    means[one.matrix] += total
                else:
                    means[one.matrix] = total.clone()
        for one in self._inputs.values():
            if one.matrix in counts and one.expert == 0:
                mean = means[one.matrix].div_(counts[one.matrix])
                if one.is_inner and mean.ndim == 2:
                    means[one.matrix] = mean.diagonal().diag()
        return means


@contextmanager
def _observed(checkpoint: Checkpoint, number: int, layer: nn.Module, measured: _Measured) -> Iterator[None]:
    """Within it every call of the layer's matrices adds to ``measured``."""
    from torch import nn

    from lfm2_export.models.lfm2_moe import Experts

    undo: list[Callable[[], None]] = []
    for path, module in layer.named_modules():
        name = f"{block_prefix(number)}{path}.weight"
        if isinstance(module, nn.Linear) and name in measured.seen:
            hook = module.register_forward_pre_hook(lambda _, given, name=name: measured.add(name, given[0]))
            undo.append(hook.remove)
        elif isinstance(module, Experts):
            undo.append(_observe_experts(checkpoint, number, module, measured))
    try:
        yield
    finally:
        for one in undo:
            one()


def _observe_experts(checkpoint: Checkpoint, number: int, module: Any, measured: _Measured) -> Callable[[], None]:
    matrices = expert_stacks(checkpoint.model_tensors)[number]
    own = module.inner

    def inner(expert: int, x_MD: Tensor) -> Tensor:
        measured.add(matrices[expert, "w1"].name, x_MD)
        result: Tensor = own(expert, x_MD)
        measured.add(matrices[expert, "w2"].name, result)
        return result

    module.inner = inner
    return lambda: delattr(module, "inner")


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
