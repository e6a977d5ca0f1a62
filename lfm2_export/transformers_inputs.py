"""What a forward pass is given, as an exported program needs it.

In: masks, positions and labels as transformers' callers pass them. Out: which columns are tokens; the logits and the
loss that were asked for. Whatever a program cannot follow is a GenerationError.

Shape suffixes: B rows, T new columns (tokens and padding), V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lfm2_export.backends.base import Runner
from lfm2_export.errors import GenerationError, RunnerError


def attended(
    attention_mask: torch.Tensor | None, lengths: np.ndarray, past: int, batch_size: int, columns: int
) -> np.ndarray:
    """Which of the new columns are tokens, bool [B, T].

    Args:
        attention_mask: [B, past + T], nonzero for tokens; None where all are.
        lengths: int64 [B], the tokens that each row holds.
        past: the columns that came before.
        batch_size: B.
        columns: T.
    """
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
    _check_runs(new := mask[:, past:])
    return new


def _check_runs(new_BT: np.ndarray) -> None:
    """Every row has tokens among its new columns, and no padding between them."""
    if not new_BT.any(axis=1).all():
        row = int(np.argmin(new_BT.any(axis=1)))
        raise GenerationError(
            f"attention_mask: row {row} has no token among the {new_BT.shape[1]} new columns; pass more columns at once"
        )
    # More than one beginning of a run of tokens: there is padding in between.
    if ((np.diff(new_BT.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1) > 1).any():
        raise GenerationError("attention_mask: padding between tokens of one row is not possible; put it at an end")


def check_positions(position_ids: torch.Tensor | None, attended_BT: np.ndarray, lengths: np.ndarray) -> None:
    """Raises GenerationError for positions that are not the usual ones, counted per row without padding."""
    if position_ids is None:
        return
    usual_BT = lengths[:, None] + attended_BT.cumsum(axis=1) - 1
    given_BT = np.broadcast_to(position_ids.cpu().numpy(), usual_BT.shape)
    if (given_BT != usual_BT)[attended_BT].any():
        raise GenerationError("position_ids: an exported program counts each row's tokens itself; leave them out")


def all_logits(runner: Runner, rows: list[np.ndarray]) -> list[np.ndarray]:
    """The logits after every new token, [T_b, V] per row, from the scoring graph or token by token without one."""
    if runner.can_score:
        return runner.prefill_scored(rows)
    if len({len(row) for row in rows}) > 1:
        raise RunnerError("logits of every position in padded rows need the scoring graph; export the scheme again")
    steps = [runner.prefill(step[:, None]) for step in np.stack(rows).T]
    return list(np.stack(steps, axis=1))


def only_last(logits_to_keep: int | torch.Tensor) -> bool:
    """Whether each row's last token is all that was asked for."""
    return isinstance(logits_to_keep, int) and logits_to_keep == 1


def kept(logits_BTV: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The columns that were asked for: the last ones, or those of an index or mask."""
    if isinstance(logits_to_keep, int):
        return logits_BTV[:, -logits_to_keep:] if logits_to_keep else logits_BTV
    if logits_to_keep.ndim == 1:
        return logits_BTV[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return logits_BTV[logits_to_keep]
    return torch.take_along_dim(logits_BTV, logits_to_keep[..., None], dim=1)


def loss_of(
    logits_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    attention_mask: torch.Tensor | None,
    items: int | torch.Tensor | None,
) -> torch.Tensor:
    """transformers' loss, without the labels that would be predicted from padding: nothing was computed there.

    Args:
        items: what the sum is divided by, where it is not the number of labels.
    """
    if labels_BT.shape != logits_BTV.shape[:2]:
        raise GenerationError(f"labels have shape {list(labels_BT.shape)}; {list(logits_BTV.shape[:2])} expected")
    if attention_mask is not None:
        padding = attention_mask[:, -labels_BT.shape[1] :][:, :-1] == 0
        labels_BT = torch.cat([labels_BT[:, :1], labels_BT[:, 1:].masked_fill(padding, -100)], dim=1)
    return ForCausalLMLoss(
        logits=logits_BTV, labels=labels_BT, vocab_size=logits_BTV.shape[-1], num_items_in_batch=items
    )
