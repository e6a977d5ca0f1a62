"""An exported graph run by onnxruntime alone: no runner, no padding or state handling of ours.

In: ids, mask and state tensors as arrays. Out: logits and the new state. Shape suffixes: B rows, T new tokens, S
positions of the mask, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from lfm2_export.artifact import Artifact
from lfm2_export.backends.onnx import variants
from lfm2_export.backends.onnx.session import session_options
from lfm2_export.cache import CONV_STATE

State = dict[str, np.ndarray]


class Graph:
    """One graph of an artifact; calls return ``(logits, state)``."""

    def __init__(self, artifact: Path, scheme: str, role: str = "model"):
        self.program = Artifact.open(artifact, verify=False).program("onnx", scheme)
        self.role = role
        self.cache = variants.cache_of(self.program, role)
        self.path = artifact / self.program.graphs[role]
        library = variants.own_library() if role.startswith("lfm2") else None
        options = session_options(1, library)  # small models gain nothing from more threads
        self.session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])

    def empty(self, rows: int) -> State:
        return self.cache.zeros(rows)

    def __call__(self, ids_BT: np.ndarray, mask_BS: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Logits float32 [B, 1 or T, V]; the new state grows by copying, as any simple runtime would do it."""
        inputs = {"input_ids": ids_BT.astype(np.int64), "attention_mask": mask_BS.astype(np.int64)} | state
        names = ["logits", *(t.present_name for t in self.cache.tensors)]
        logits, *present = self.session.run(names, inputs)
        assert logits.dtype == np.float32
        return logits, {t.past_name: value for t, value in zip(self.cache.tensors, present, strict=True)}

    def in_place(self, ids_BT: np.ndarray, mask_BS: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """The same, but each key and value buffer [B, kv_heads, capacity, head_dim], rings among them, is past and
        present at once."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids_BT.astype(np.int64))
        binding.bind_cpu_input("attention_mask", mask_BS.astype(np.int64))
        binding.bind_output("logits", "cpu")
        buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in state.items()}
        for tensor in self.cache.tensors:
            binding.bind_ortvalue_input(tensor.past_name, buffers[tensor.past_name])
            if tensor.kind != CONV_STATE:
                binding.bind_ortvalue_output(tensor.present_name, buffers[tensor.past_name])
            else:
                binding.bind_output(tensor.present_name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip(self._bound_outputs(), binding.get_outputs(), strict=True))
        conv = {t.past_name: found[t.present_name].numpy().copy() for t in self.cache.conv}
        return found["logits"].numpy().copy(), state | conv

    def _bound_outputs(self) -> list[str]:
        return ["logits", *(t.present_name for t in self.cache.tensors)]

    def with_capacity(self, state: State, capacity: int) -> State:
        """The state with room for ``capacity`` positions, for ``in_place``."""
        roomy = dict(state)
        for tensor in self.cache.growing:
            used = state[tensor.past_name]
            buffer = tensor.zeros(len(used), capacity)
            buffer[:, :, : used.shape[2]] = used
            roomy[tensor.past_name] = buffer
        return roomy

    def alone(self, ids: list[int] | np.ndarray) -> np.ndarray:
        """Logits [T, V] after each token of one row, one token a call: nothing is padded, chunked or shared."""
        state, logits = self.empty(1), []
        for count, token in enumerate(ids, start=1):
            found, state = self(np.array([[token]]), np.ones((1, count)), state)
            logits.append(found[0, -1])
        return np.stack(logits)


def pad(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different length as ids and mask [B, T], padded with zeros on one side."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence in nats of ``other``'s next-token distribution from ``reference``'s, logits [..., V]."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (reference, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
