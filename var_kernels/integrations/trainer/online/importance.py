"""Draws of another engine than the policy itself: how far its log-probs are from the policy's, and weights for it."""

import math

import torch
from torch import Tensor

from var_kernels.integrations.data import EncodedRows
from var_kernels.integrations.trainer.online.buffer import Drawn


def sampler_logps(drawn: list[Drawn], rows: EncodedRows) -> Tensor | None:
    """(tokens,) fp32 beside ``rows.token_ids``: the sampler's log-probs of completions, NaN on prompts; None where it
    gave none."""
    if any(entry.completion_logps is None for entry in drawn):
        return None
    found = torch.full(rows.token_ids.shape, math.nan)
    values = (logps for entry in drawn for logps in entry.completion_logps)
    for row, logps in enumerate(values):
        first = int(rows.offset[row] + rows.prompt_length[row])
        found[first : first + len(logps)] = torch.tensor(logps)
    return found


def mean_gap(policy_logp: Tensor, sampler_logp: Tensor) -> float:
    """Mean |lp - lp_sampler| over the tokens of completions, nats: 0 where the sampler is the policy."""
    return (policy_logp - sampler_logp).abs().nanmean().item()


def truncated_weights(policy_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """(tokens,) min(exp(lp - lp_sampler), cap), 1 on prompts: truncated importance sampling.

    Source: arXiv 1802.01561 (V-trace), for samplers of another engine as TRL and verl have it.
    """
    return (policy_logp - sampler_logp).clamp(max=math.log(cap)).exp().nan_to_num(nan=1.0)
