"""A runner that says what a test wants it to: for what depends on a reply's text, not on a model."""

from __future__ import annotations

import threading
import time

import numpy as np

from lfm2_export.generation_config import GenerationConfig
from lfm2_export.server.served import Model
from tests.hash_runner import TOKENIZER, HashRunner

_HEADER = "<|im_start|>assistant\n"
_END = TOKENIZER.token_id("<|im_end|>")


class ScriptRunner(HashRunner):
    """Says ``replies[n]`` as a conversation's n-th reply. ``pause``: seconds a token takes; ``gate``: no token comes
    while it is not set."""

    def __init__(self, replies: list[str], pause: float = 0.0):
        super().__init__(vocab_size=TOKENIZER.vocab_size)
        self.replies, self.pause = replies, pause
        self.gate = threading.Event()
        self.gate.set()

    def logits_of(self, row: list[int]) -> np.ndarray:
        self.gate.wait()
        time.sleep(self.pause)
        turns = TOKENIZER.decode(row).split(_HEADER)[1:]
        left = self.replies[len(turns) - 1][len(turns[-1]) :] if turns else ""
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[TOKENIZER.encode(left, add_special_tokens=False)[0] if left else _END] = 20
        return logits


def scripted(*replies: str, pause: float = 0.0) -> Model:
    settings = GenerationConfig(stop_token_ids=(_END,))
    return Model(name="script", runner=ScriptRunner(list(replies), pause), tokenizer=TOKENIZER, settings=settings)
