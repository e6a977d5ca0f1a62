"""The tokens that a model is calibrated on.

In: ``default`` (a text that comes with this package), ``self`` (the model's own samples) or a UTF-8 file. Out:
``Text``: rows of tokens, each of which begins as the tokenizer begins a text. 2,000 tokens give two thirds of what
20,000 give, and 100,000 give no more.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm2_export import files, paths
from lfm2_export.checkpoint import Checkpoint
from lfm2_export.errors import CalibrationError
from lfm2_export.messages import shown
from lfm2_export.resources import check_memory
from lfm2_export.source import ASSETS
from lfm2_export.text import Tokenizer

if TYPE_CHECKING:
    from lfm2_export.models.decoder import DecoderForCausalLM

DEFAULT, SELF = "default", "self"
DEFAULT_TEXT = ASSETS / "calibration.txt"
TOKENS, LEAST_TOKENS = 20_480, 2_048
ROW = 512
# A thousand times what is looked at.
TEXT_LIMIT = 64 << 20
_SEED = 0
# Of memory for sampling beside the weights: torch, a state of every row, and logits.
_SAMPLING_BASE = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """``rows_BT`` int64. ``source`` is "default", "self" or the file's name; ``sha256`` is that of the text's bytes, of
    the tokens where the model wrote them."""

    source: str
    sha256: str
    rows_BT: np.ndarray = field(repr=False)

    @property
    def tokens(self) -> int:
        return self.rows_BT.size

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256, "tokens": self.tokens}


def read_text(checkpoint: Checkpoint, source: str, *, tokens: int = TOKENS) -> Text:
    """The first ``tokens`` tokens of a text, as far as it goes: rows of 512, or of what the model's context has.

    Args:
        source: "default" or the path of a UTF-8 file.

    Raises:
        CalibrationError: the file cannot be read, is no text, or too short; or the checkpoint has no tokenizer.
    """
    path = DEFAULT_TEXT if source == DEFAULT else Path(source)
    content = files.read_own_text(path, CalibrationError, limit=TEXT_LIMIT, option="--calibrate")
    if not content.strip():
        raise CalibrationError(f"{paths.shown(path)}: is empty; --calibrate needs {LEAST_TOKENS:,} tokens of text")
    if not paths.is_file(checkpoint.path / "tokenizer.json", CalibrationError):
        raise CalibrationError(
            f"{paths.shown(checkpoint.path)}: has no tokenizer.json to read a text with; pass --calibrate {SELF}"
        )
    tokenizer = Tokenizer.from_dir(checkpoint.path)
    prefix = np.array(tokenizer.encode(""), dtype=np.int64)
    length = row_length(checkpoint, tokens)
    found = _encoded(tokenizer, content, tokens)
    if len(found) < LEAST_TOKENS:
        raise CalibrationError(
            f"{paths.shown(path)}: has {len(found):,} tokens, --calibrate needs {LEAST_TOKENS:,} and takes up to "
            f"{tokens:,}; give a longer text, or --calibrate {DEFAULT}"
        )
    checkpoint.check_tokens(np.concatenate([prefix, found]), CalibrationError)
    fresh = length - len(prefix)
    if fresh < 1:
        raise CalibrationError(
            f"{paths.shown(checkpoint.path)}: a context of {length} tokens, {len(prefix)} of which begin every text, "
            f"leaves none to calibrate on; pass --calibrate {SELF}"
        )
    rows = found[: len(found) // fresh * fresh].reshape(-1, fresh)
    return Text(
        source=DEFAULT if source == DEFAULT else path.name,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        rows_BT=np.concatenate([np.broadcast_to(prefix, (len(rows), len(prefix))), rows], axis=1),
    )


def _encoded(tokenizer: Tokenizer, content: str, tokens: int) -> np.ndarray:
    """At least the first ``tokens`` tokens, where there are so many: a long text is not encoded to its end."""
    part = tokens
    while True:
        part *= 8
        found = tokenizer.encode(content[:part], add_special_tokens=False)
        if len(found) >= tokens or part >= len(content):
            return np.array(found[:tokens], dtype=np.int64)


def row_length(checkpoint: Checkpoint, tokens: int) -> int:
    """Tokens of a row."""
    return min(ROW, checkpoint.config.max_position_embeddings, tokens)


def check_sampling(checkpoint: Checkpoint) -> None:
    """Refuses to sample from a model that does not fit the memory as a whole.

    Raises:
        ResourceError: states what is needed and what is available.
    """
    check_memory(
        4 * checkpoint.parameter_count + _SAMPLING_BASE,
        purpose=f"sampling from the whole model in fp32 (--calibrate {SELF})",
        remedy=f"pass --calibrate {DEFAULT}, which needs one layer at a time",
    )


def sample(checkpoint: Checkpoint, *, tokens: int = TOKENS) -> Text:
    """What the model writes by itself, at temperature 1, all rows side by side. The same on every run of one machine.

    Raises:
        ResourceError: the memory is too small for the model.
        CheckpointError: a weight is damaged.
    """
    from lfm2_export.models.loading import load_model

    check_sampling(checkpoint)
    length = row_length(checkpoint, tokens)
    rows = _sample(load_model(checkpoint), max(1, tokens // length), length, _unwanted(checkpoint))
    return Text(source=SELF, sha256=hashlib.sha256(rows.tobytes()).hexdigest(), rows_BT=rows)


def _unwanted(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end a text, or stand for none: what follows them is no text."""
    ends = (*checkpoint.stop_token_ids, *checkpoint.config.eos_token_id, checkpoint.config.pad_token_id)
    return sorted({token for token in ends if token is not None and 0 <= token < checkpoint.config.vocab_size})


def _sample(model: DecoderForCausalLM, rows: int, length: int, unwanted: list[int]) -> np.ndarray:
    import torch

    random = np.random.default_rng(_SEED)
    vocabulary, first = model.config.vocab_size, model.config.bos_token_id
    taken = np.empty((rows, length), np.int64)
    taken[:, 0] = random.integers(0, vocabulary, rows) if first is None else first
    cache = None
    with torch.inference_mode():
        for place in range(1, length):
            out = model(torch.from_numpy(taken[:, place - 1 : place]), cache=cache, use_cache=True, logits_to_keep=1)
            cache = out.cache
            scores = out.logits[:, -1].float().numpy().astype(np.float64)
            scores[:, unwanted] = -np.inf
            # The largest of logits with Gumbel noise is a draw from their softmax.
            taken[:, place] = np.argmax(scores + random.gumbel(size=scores.shape), axis=1)
    return taken


def check_name(value: object, option: str) -> str:
    """What was given as ``calibrate`` or ``statistics``.

    Raises:
        CalibrationError: it is no name.
    """
    if not isinstance(value, str | Path) or not str(value).strip():
        expected = f"{DEFAULT}, {SELF} or the name of a text file" if option == "calibrate" else "the name of a file"
        raise CalibrationError(f"{option}={shown(value)}: {expected} expected")
    return str(value)
