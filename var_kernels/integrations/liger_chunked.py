"""The calls of liger-kernel 0.8's chunked preference losses, on ``linear_logprob``: a switch is an import.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss                   before
    from var_kernels.integrations.liger_chunked import LigerFusedLinearDPOLoss      after

Same arguments in the same order, same results, the (B, T, V) logits never made. What differs: results are fp32 whatever
the inputs are, a sequence without a label counts with log-prob 0 where it would be NaN, a label that is forbidden
(-inf) or certain gives the limit of the loss, no pairs give 0, and the losses of pairs see a whole batch. ``compiled``
and ``chunk_size`` are taken and not needed: a memory budget takes their place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var_kernels.integrations.liger import OptionsModule
from var_kernels.losses.checks import times
from var_kernels.losses.margin import log_odds
from var_kernels.losses.sequences import sequence_lengths, sequence_sum
from var_kernels.ops import linear_logprob

_ELSEWHERE = {
    "LigerFusedLinearGRPOLoss": "var_kernels.linear_loss('grpo', ...), or var_kernels.integrations.trl in a trainer",
    "LigerFusedLinearJSDLoss": "var_kernels.linear_token_kl(..., direction='jsd', beta=...)",
    "LigerFusedLinearCosineSimilarityLoss": "nothing here: it compares whole logit vectors",
}


def __getattr__(name: str):
    if name.startswith("liger_fused_linear_") or (name.startswith("LigerFused") and name.endswith("Function")):
        raise ImportError(f"{name} is not among the losses of {__name__}; use its class, LigerFusedLinear...Loss")
    if name in _ELSEWHERE:
        raise ImportError(f"{name} is not among the losses of {__name__}; instead: {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- losses of the log-ratios a = chosen, b = rejected, (P,) each, in units of nats ----------------------------------


def _margin(a: Tensor, b: Tensor, loss) -> Tensor:
    return loss.beta * (a - b)


def _exo(margin: Tensor, smoothing: float) -> Tensor:
    """KL of (sigmoid(m), sigmoid(-m)) from (1 - e, e)."""
    terms: Any = 0.0
    for log_q, p in ((logsigmoid(margin), 1 - smoothing), (logsigmoid(-margin), smoothing)):
        q = log_q.exp()
        terms = terms + q * (log_q - math.log(p)).where(q > 0, 0.0)
    return terms


def _robust(margin: Tensor, smoothing: float) -> Tensor:
    flipped = times(smoothing, logsigmoid(-margin))
    return (flipped - (1 - smoothing) * logsigmoid(margin)) / (1 - 2 * smoothing)


def _discopop(margin: Tensor, tau: float) -> Tensor:
    """-(1 - q) log sigmoid(m) + q exp(-m) with q = sigmoid(m / tau); the second term as one exponential, for exp(-m)
    overflows where q makes it small.
    """
    exponent = torch.where(margin < 0, margin * (1 / tau - 1), -margin) - (-margin.abs() / tau).exp().log1p()
    return (-margin / tau).sigmoid() * -logsigmoid(margin) + exponent.exp()


_DPO: dict[str, Callable] = {
    "sigmoid": lambda a, b, loss: -logsigmoid(_margin(a, b, loss)),
    "hinge": lambda a, b, loss: torch.relu(1 - _margin(a, b, loss)),
    "exo_pair": lambda a, b, loss: _exo(_margin(a, b, loss), loss.label_smoothing),
    "nca_pair": lambda a, b, loss: (
        -logsigmoid(loss.beta * a) - 0.5 * logsigmoid(-loss.beta * a) - 0.5 * logsigmoid(-loss.beta * b)
    ),
    "robust": lambda a, b, loss: _robust(_margin(a, b, loss), loss.label_smoothing),
    "bco_pair": lambda a, b, loss: -logsigmoid(loss.beta * a) - logsigmoid(-loss.beta * b),
    "sppo_hard": lambda a, b, loss: (a - 0.5 / loss.beta).square() + (b + 0.5 / loss.beta).square(),
    "apo_zero": lambda a, b, loss: (-loss.beta * a).sigmoid() + (loss.beta * b).sigmoid(),
    "apo_down": lambda a, b, loss: (loss.beta * a).sigmoid() + (-_margin(a, b, loss)).sigmoid(),
    "discopop": lambda a, b, loss: _discopop(_margin(a, b, loss), loss.discopop_tau),
}


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -times(1 - smoothing, logsigmoid(margin)) - times(smoothing, logsigmoid(-margin))


# ---- what the classes share ------------------------------------------------------------------------------------------


def _log_probs(loss, hidden: Tensor, lm_head_weight: Tensor, target: Tensor, bias) -> tuple[Tensor, Tensor]:
    """(B, T) log-probs of the labels, and (B,) their sum or mean in each sequence, fp32, nats; 0 without a label."""
    token_logp = linear_logprob(hidden, lm_head_weight, target, bias, ignore_index=loss.ignore_index)
    logp = sequence_sum(token_logp, target, ignore_index=loss.ignore_index)
    if loss.average_log_prob:
        logp = logp / sequence_lengths(target, ignore_index=loss.ignore_index).clamp(min=1)
    return token_logp, logp


def _log_ratio(loss, logp: Tensor, target: Tensor, ref_input=None, ref_weight=None, ref_bias=None) -> Tensor:
    """(B,) ``logp`` less the reference's, which are constants; itself without use_ref_model."""
    if not loss.use_ref_model:
        return logp
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(
            f"{missing} must be the reference's tensor with use_ref_model=True, got None; pass it, or "
            "use_ref_model=False"
        )
    with torch.no_grad():
        _, ref_logp = _log_probs(loss, ref_input, ref_weight, target, ref_bias)
    return logp - ref_logp


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)


@torch.no_grad()
def _mean_logit(hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None) -> Tensor:
    """() mean of W h + b over rows and vocabulary."""
    mean = hidden.mean((0, 1), dtype=torch.float32) @ lm_head_weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.mean(dtype=torch.float32)


class _PairLoss(OptionsModule):
    """mean over pairs of pair_loss, plus alpha times the NLL of the chosen labels."""

    average_log_prob, alpha, use_ref_model = False, 1.0, False

    def pair_loss(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
        return self._compute(lin_weight, _input, target, bias)

    def _compute(self, lin_weight, _input, target, bias, nll_target=None, reference=()):
        if _input.dim() != 3 or target.shape != _input.shape[:2] or len(target) % 2:
            raise ValueError(
                f"_input must be (2 P, T, D) and target (2 P, T), chosen before rejected, got {tuple(_input.shape)} "
                f"and {tuple(target.shape)}; for flat rows see var_kernels.linear_loss"
            )
        pairs = len(target) // 2
        token_logp, logp = _log_probs(self, _input, lin_weight, target, bias)
        ratio = _log_ratio(self, logp, target, *reference)
        nll = logp.new_zeros(())
        if self.compute_nll_loss:
            wanted = (target if nll_target is None else nll_target)[:pairs]
            token_nll = -token_logp[:pairs]
            if nll_target is not None:
                token_nll = -linear_logprob(_input[:pairs], lin_weight, wanted, bias, ignore_index=self.ignore_index)
            nll = token_nll.sum() / (wanted != self.ignore_index).sum().clamp(min=1)
        loss, *extras = self._reduced(ratio[:pairs], ratio[pairs:])
        means = [_mean_logit(half, lin_weight, bias) for half in (_input[:pairs], _input[pairs:])]
        metrics = (*logp.split(pairs), *means, nll, *(self.beta * ratio).split(pairs), *extras)
        return times(self.alpha, nll) + loss, tuple(metric.detach() for metric in metrics)

    def _reduced(self, a, b) -> tuple[Tensor, ...]:
        return (_mean(self.pair_loss(a, b)),)


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_PairLoss):
    """``loss(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)`` -> (loss, metrics).

        c = beta (s_w - sr_w),  r = beta (s_l - sr_l),  "sigmoid": mean over pairs of -log sigmoid(c - r)

    and the nine other ``loss_type``; s is the sum (``average_log_prob``: the mean) of a sequence's log-probs. Peak
    memory: see ``linear_logprob``.

    Args:
        lin_weight (V, D), _input (2 P, T, D), target (2 P, T), bias (V,): chosen sequences before rejected ones.
        ref_input, ref_weight, ref_bias: the same of the reference, constants: nothing of it learns, whatever requires a
            gradient. Without use_ref_model unused.
        label_smoothing: of "robust" and "exo_pair"; discopop_tau: of "discopop".

    Returns:
        loss () and (chosen_logps (P,), rejected_logps (P,), mean chosen logit, mean rejected logit, NLL of the chosen,
        chosen rewards c (P,), rejected rewards r (P,)), detached; nats.

    Raises:
        ValueError: an unknown loss_type, label_smoothing out of range, a missing reference, shapes that are not pairs.
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self):
        if self.loss_type not in _DPO:
            raise ValueError(f"loss_type must be one of {sorted(_DPO)}, got {self.loss_type!r}")
        interval = {"exo_pair": "(0, 0.5)", "robust": "[0, 0.5)"}.get(self.loss_type)
        lowest = self.label_smoothing > 0 or (self.label_smoothing == 0 and self.loss_type == "robust")
        if interval is not None and not (lowest and self.label_smoothing < 0.5):
            raise ValueError(
                f"label_smoothing must be in {interval} for loss_type={self.loss_type!r}, got "
                f"{self.label_smoothing}; it is the share of flipped labels"
            )

    def pair_loss(self, a: Tensor, b: Tensor) -> Tensor:
        return _DPO[self.loss_type](a, b, self)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Any:
        return self._compute(lin_weight, _input, target, bias, reference=(ref_input, ref_weight, ref_bias))


@dataclass(eq=False, repr=False)
class _MarginLoss(_PairLoss):
    """The first options of CPO and SimPO, in their order."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(_MarginLoss):
    """CPO: -(1 - e) log sigmoid(c - r) - e log sigmoid(r - c) with c = beta s_w, r = beta s_l, plus alpha NLL.

    Call, results, errors: as ``LigerFusedLinearDPOLoss``, without a reference.
    """

    average_log_prob: bool = False
    chunk_size: int = 1

    def pair_loss(self, a: Tensor, b: Tensor) -> Tensor:
        return _smoothed(_margin(a, b, self), self.label_smoothing)


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_MarginLoss):
    """SimPO: as CPO with c - r - gamma for c - r, on mean log-probs.

    Call, results, errors: as ``LigerFusedLinearDPOLoss``, without a reference.
    """

    average_log_prob = True

    gamma: float = 0.5
    chunk_size: int = 1

    def pair_loss(self, a: Tensor, b: Tensor) -> Tensor:
        return _smoothed(_margin(a, b, self) - self.gamma, self.label_smoothing)


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(_PairLoss):
    """ORPO: NLL of the chosen - beta log sigmoid(log odds_w - log odds_l), on mean log-probs.

    Call, results, errors: as ``LigerFusedLinearDPOLoss``, without a reference; ``nll_target`` (2 P, T): labels of the
    NLL where they are others. Two metrics more: the mean of log sigmoid and of the log-odds' difference.
    """

    average_log_prob = True

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

    def _reduced(self, a, b):
        difference = log_odds(a) - log_odds(b)
        ratio = _mean(logsigmoid(difference))
        return -times(self.beta, ratio), ratio, _mean(difference)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Any:
        return self._compute(lin_weight, _input, target, bias, nll_target)


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(OptionsModule):
    """``loss(_input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl)``.

        mean over sequences of 1 - sigmoid(+-beta (s - sr - kl)), + where preference_labels holds

    Args:
        _input (B, T, D), lin_weight (V, D), target (B, T), bias (V,); preference_labels (B,) bool; kl: float or (B,).
        ref_input, ref_weight, ref_bias: as of ``LigerFusedLinearDPOLoss``, constants.

    Returns:
        loss () and (log-probs of the desirable, of the undesirable, their logits, their rewards), each pair summed over
        its sequences; detached.

    Raises:
        ValueError: preference_labels or the reference missing.
    """

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> Any:
        if preference_labels is None:
            raise ValueError("preference_labels must be (B,) bool, got None; True where the sequence is desirable")
        _, logp = _log_probs(self, _input, lin_weight, target, bias)
        ratio = _log_ratio(self, logp, target, ref_input, ref_weight, ref_bias)
        desirable = preference_labels.bool()
        margin = self.beta * (ratio if kl is None else ratio - kl)
        loss = _mean((-torch.where(desirable, margin, -margin)).sigmoid())
        logits = [self._logit_sum(_input[rows], lin_weight, bias) for rows in (desirable, ~desirable)]
        sums = [values[rows].sum() for values in (logp, self.beta * ratio) for rows in (desirable, ~desirable)]
        return loss, tuple(metric.detach() for metric in (*sums[:2], *logits, *sums[2:]))

    @staticmethod
    def _logit_sum(hidden, lin_weight, bias) -> Tensor:
        rows = hidden.shape[0] * hidden.shape[1]
        return _mean_logit(hidden, lin_weight, bias) * rows * len(lin_weight) if rows else hidden.new_zeros(()).float()
