"""Rows that hold several sequences: where each begins, and whether the model keeps them apart.

transformers' masks do, by position_ids, where there is no attention_mask; flash attention by cu_seq_lens_q. Many models
carry something over (recurrent states, position biases, masks of their own), so each is tried once on eight tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels.integrations.hf.calibration import keeps_sequences_apart
from var_kernels.integrations.hf.model import inner_model


def tokens_of(batch: Mapping[str, Any]) -> Tensor | None:
    """(B, T) the batch's input_ids, of several ids a position the first, or numbers in their place where it has
    inputs_embeds alone; None without both.
    """
    ids = batch.get("input_ids")
    ids = batch.get("inputs_embeds") if ids is None else ids
    return ids[..., 0].detach() if isinstance(ids, Tensor) and ids.dim() == 3 else ids


def sequence_starts(batch: Mapping[str, Any]) -> Tensor | None:
    """(B, T) bool, True where a sequence begins, of rows that may hold several; None where nothing says so.

    By cu_seq_lens_q, or position_ids that are 0 or do not rise.
    """
    tokens, positions, ends = tokens_of(batch), batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(ends, Tensor):
        starts = torch.zeros_like(tokens, dtype=torch.bool).flatten()
        # an entry at the end begins nothing
        starts = F.pad(starts, (0, 1)).index_fill(0, ends.to(starts.device, torch.int64), True)[:-1]
        return starts.view_as(tokens)
    if not isinstance(positions, Tensor) or positions.shape[-1] != tokens.shape[-1] or positions.dim() != 2:
        return None
    starts = F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0), value=True) | (positions == 0)
    return starts.expand_as(tokens)


def check_apart(model: nn.Module, inputs: Mapping[str, Any], starts: Tensor) -> None:
    """Refuse rows of several sequences whose hidden states depend on one another in this model.

    A model that does not keep them apart costs a look at the values of ``starts`` (B, T) in every call.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        return  # the caller says who sees whom
    if keeps_sequences_apart(model, inputs):
        return
    inside = starts[:, 1:]
    if mask is not None:
        inside = inside & ((mask[:, 1:] != 0) & (mask[:, :-1] != 0)).to(inside.device)
    if inside.any():
        remedy = "pad the sequences, one in a row"
        if mask is not None:
            remedy = "leave attention_mask out, which makes transformers ignore position_ids; or " + remedy
        elif inputs.get("position_ids") is None:
            remedy = "pass position_ids, which attention other than flash attention needs; or " + remedy
        raise ValueError(
            "position_ids must be those of one sequence per row, got several in one, where the hidden states of "
            f"{type(inner_model(model)).__name__} depend on the sequences before them; {remedy}"
        )
