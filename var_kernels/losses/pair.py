"""Losses of (chosen, rejected) pairs: pure functions of the sequences' log-probs. Class C: two passes of the head."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    policy_chosen_logp: Tensor,
    policy_rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, with conservative (label-smoothed) DPO as an option.

        m = beta ((s_w - sr_w) - (s_l - sr_l))
        loss = -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m)

    With labels drawn from Bradley-Terry on a reward r, sigmoid(r_w - r_l), the minimiser is pi_ref exp(r / beta) / Z:
    VAR's pi* at lam = beta.

    Args:
        policy_chosen_logp, policy_rejected_logp: (P,) summed log-probs under the policy, nats; differentiated.
        ref_chosen_logp, ref_rejected_logp: (P,) the same under the frozen reference, nats; taken as constants.
        beta: > 0, the KL temperature.
        label_smoothing: in [0, 0.5): probability that a label is flipped.

    Returns:
        (P,) loss of each pair, nats, fp32 (fp64 for fp64 inputs); the caller reduces over pairs.

    Raises:
        TypeError, ValueError: beta or label_smoothing out of range, shapes that differ, integer tensors.

    Source: arXiv 2305.18290 eq. 7; label smoothing as in the authors' code (cDPO).
    """
    _check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}; above 0.5 swap chosen and rejected"
        )
    pairs = {
        "policy_chosen_logp": policy_chosen_logp,
        "policy_rejected_logp": policy_rejected_logp,
        "ref_chosen_logp": ref_chosen_logp,
        "ref_rejected_logp": ref_rejected_logp,
    }
    _check_pairs(pairs)
    chosen_P = _log_ratio(policy_chosen_logp, ref_chosen_logp)
    rejected_P = _log_ratio(policy_rejected_logp, ref_rejected_logp)
    margin_P = beta * (chosen_P - rejected_P)
    return -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def implicit_reward(policy_logp: Tensor, ref_logp: Tensor, *, beta: float) -> Tensor:
    """beta (s - sr), (P,) detached, for metrics: the reward, up to a constant a prompt, that the policy is optimal for.

    Args:
        policy_logp, ref_logp: (P,) summed log-probs, nats.  beta: > 0.

    Source: arXiv 2305.18290 eq. 5.
    """
    _check_positive("beta", beta)
    _check_pairs({"policy_logp": policy_logp, "ref_logp": ref_logp})
    return beta * _log_ratio(policy_logp.detach(), ref_logp)


def _log_ratio(policy_logp: Tensor, ref_logp: Tensor) -> Tensor:
    # bf16 sums are off by whole nats at hundreds of nats: the difference is formed in fp32 at least
    dtype = torch.promote_types(policy_logp.dtype, torch.float32)
    return policy_logp.to(dtype) - ref_logp.detach().to(dtype)


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"{name} must be finite and > 0, got {value}; swap chosen and rejected to reverse the preference"
        )


def _check_pairs(tensors: dict[str, Tensor]) -> None:
    first, *others = tensors
    for name, values in tensors.items():
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(
                f"{name} must be a floating-point tensor (P,), got {got}; pass the sequences' summed log-probs"
            )
    shape = tensors[first].shape
    if len(shape) != 1:
        raise ValueError(f"{first} must be (P,), one per pair, got {tuple(shape)}; sum tokens with sequence_sum first")
    for name in others:
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} must be {tuple(shape)} like {first}, got {tuple(tensors[name].shape)}; pair the rows up"
            )
