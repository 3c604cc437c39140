"""The calls of liger-kernel 0.8's chunked preference losses, on ``linear_logprob``: a switch is an import.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss                   before
    from var_kernels.integrations.liger_chunked import LigerFusedLinearDPOLoss      after

Same arguments in the same order, same results, the (B, T, V) logits never made. What differs: results are fp32 whatever
the inputs are, a sequence without a label counts with log-prob 0 where it would be NaN, and the losses of pairs see a
whole batch. ``compiled`` and ``chunk_size`` are taken and not needed: a memory budget takes their place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from var_kernels.integrations.options_module import OptionsModule
from var_kernels.ops import linear_logprob

_ELSEWHERE = {
    "LigerFusedLinearGRPOLoss": "var_kernels.linear_loss('grpo', ...), or var_kernels.integrations.trl in a trainer",
    "LigerFusedLinearJSDLoss": "var_kernels.linear_token_kl for the KL divergences; their mixture is not served",
    "LigerFusedLinearCosineSimilarityLoss": "nothing here: it compares whole logit vectors",
}


def __getattr__(name: str):
    if name in _ELSEWHERE:
        raise ImportError(f"{name} is not among the losses of {__name__}; instead: {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- losses of c = beta (chosen log-ratio), r = beta (rejected log-ratio), (P,) each ---------------------------------


def _exo(margin: Tensor, smoothing: float) -> Tensor:
    epsilon = torch.tensor(smoothing, dtype=margin.dtype, device=margin.device)
    won = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-epsilon))
    return won + (-margin).sigmoid() * (logsigmoid(-margin) - epsilon.log())


def _robust(margin: Tensor, smoothing: float) -> Tensor:
    return (smoothing * logsigmoid(-margin) - (1 - smoothing) * logsigmoid(margin)) / (1 - 2 * smoothing)


def _discopop(margin: Tensor, tau: float) -> Tensor:
    return torch.lerp(-logsigmoid(margin), (-margin).exp(), (margin / tau).sigmoid())


_DPO: dict[str, Callable] = {
    "sigmoid": lambda c, r, _: -logsigmoid(c - r),
    "hinge": lambda c, r, _: torch.relu(1 - (c - r)),
    "exo_pair": lambda c, r, loss: _exo(c - r, loss.label_smoothing),
    "nca_pair": lambda c, r, _: -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r),
    "robust": lambda c, r, loss: _robust(c - r, loss.label_smoothing),
    "bco_pair": lambda c, r, _: -logsigmoid(c) - logsigmoid(-r),
    "sppo_hard": lambda c, r, loss: ((c - 0.5) / loss.beta).square() + ((r + 0.5) / loss.beta).square(),
    "apo_zero": lambda c, r, _: (-c).sigmoid() + r.sigmoid(),
    "apo_down": lambda c, r, _: c.sigmoid() + (r - c).sigmoid(),
    "discopop": lambda c, r, loss: _discopop(c - r, loss.discopop_tau),
}


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


# ---- what the classes share ------------------------------------------------------------------------------------------


def _sequence_logp(hidden, lm_head_weight, target, bias, ignore_index: int, average: bool) -> Tensor:
    """(B,) fp32 log-prob of each sequence's labels, summed or averaged over them, nats."""
    logp = linear_logprob(hidden, lm_head_weight, target, bias, ignore_index=ignore_index).sum(-1)
    return logp / (target != ignore_index).sum(-1).clamp(min=1) if average else logp


@torch.no_grad()
def _mean_logit(hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None) -> Tensor:
    """() mean of W h + b over rows and vocabulary."""
    mean = hidden.mean((0, 1), dtype=torch.float32) @ lm_head_weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.mean(dtype=torch.float32)


class _PairLoss(OptionsModule):
    """mean over pairs of pair_loss, plus alpha times the NLL of the chosen labels."""

    average_log_prob, alpha, use_ref_model = False, 1.0, False

    def pair_loss(self, c: Tensor, r: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, lin_weight, _input, target, bias=None):
        return self._compute(lin_weight, _input, target, bias)

    def _compute(self, lin_weight, _input, target, bias, nll_target=None, reference=None):
        if _input.dim() != 3 or target.shape != _input.shape[:2] or len(target) % 2:
            raise ValueError(
                f"_input must be (2 P, T, D) and target (2 P, T), chosen before rejected, got {tuple(_input.shape)} "
                f"and {tuple(target.shape)}; for flat rows see var_kernels.linear_loss"
            )
        pairs = len(target) // 2
        token_logp = linear_logprob(_input, lin_weight, target, bias, ignore_index=self.ignore_index)
        kept = target != self.ignore_index
        logp = token_logp.sum(-1)
        if self.average_log_prob:
            logp = logp / kept.sum(-1).clamp(min=1)
        chosen, rejected = logp[:pairs], logp[pairs:]
        ref_chosen = ref_rejected = 0.0
        if reference is not None:
            with torch.no_grad():
                ref_chosen, ref_rejected = _sequence_logp(
                    *reference, ignore_index=self.ignore_index, average=self.average_log_prob
                ).split(pairs)
        c, r = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        nll = logp.new_zeros(())
        if self.compute_nll_loss:
            if nll_target is None:
                nll, count = -token_logp[:pairs].sum(), kept[:pairs].sum()
            else:
                wanted = nll_target[:pairs]
                nll = -linear_logprob(_input[:pairs], lin_weight, wanted, bias, ignore_index=self.ignore_index).sum()
                count = (wanted != self.ignore_index).sum()
            nll = nll / count.clamp(min=1)
        loss, *extras = self._reduced(c, r, chosen, rejected)
        means = [_mean_logit(half, lin_weight, bias) for half in (_input[:pairs], _input[pairs:])]
        metrics = (chosen, rejected, *means, nll, c, r, *extras)
        return self.alpha * nll + loss, tuple(metric.detach() for metric in metrics)

    def _reduced(self, c, r, chosen, rejected) -> tuple[Tensor, ...]:
        return (self.pair_loss(c, r).mean(),)


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_PairLoss):
    """``loss(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)`` -> (loss, metrics).

        c = beta (s_w - sr_w),  r = beta (s_l - sr_l),  "sigmoid": mean over pairs of -log sigmoid(c - r)

    and the nine other ``loss_type``; s is the sum (``average_log_prob``: the mean) of a sequence's log-probs. Peak
    memory: see ``linear_logprob``.

    Args:
        lin_weight (V, D), _input (2 P, T, D), target (2 P, T), bias (V,): chosen sequences before rejected ones.
        ref_input, ref_weight, ref_bias: the same of the reference; without use_ref_model unused.
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
                f"label_smoothing must be in {interval} for loss_type={self.loss_type!r}, got {self.label_smoothing}"
            )

    def pair_loss(self, c, r):
        return _DPO[self.loss_type](c, r, self)

    def forward(self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None):
        return self._compute(
            lin_weight, _input, target, bias, reference=_reference(self, target, ref_input, ref_weight, ref_bias)
        )


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

    def pair_loss(self, c, r):
        return _smoothed(c - r, self.label_smoothing)


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_MarginLoss):
    """SimPO: as CPO with c - r - gamma for c - r, on mean log-probs.

    Call, results, errors: as ``LigerFusedLinearDPOLoss``, without a reference.
    """

    average_log_prob = True

    gamma: float = 0.5
    chunk_size: int = 1

    def pair_loss(self, c, r):
        return _smoothed(c - r - self.gamma, self.label_smoothing)


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

    def _reduced(self, c, r, chosen, rejected):
        log_odds = (chosen - torch.log(-torch.expm1(chosen))) - (rejected - torch.log(-torch.expm1(rejected)))
        ratio = logsigmoid(log_odds).mean()
        return -self.beta * ratio, ratio, log_odds.mean()

    def forward(self, lin_weight, _input, target, bias=None, nll_target=None):
        return self._compute(lin_weight, _input, target, bias, nll_target)


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(OptionsModule):
    """``loss(_input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl)``.

        mean over sequences of 1 - sigmoid(+-beta (s - sr - kl)), + where preference_labels holds

    Args:
        _input (B, T, D), lin_weight (V, D), target (B, T), bias (V,); preference_labels (B,) bool; kl: float or (B,).
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
        _input,
        lin_weight,
        target,
        bias=None,
        preference_labels=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        kl=None,
    ):
        if preference_labels is None:
            raise ValueError("preference_labels: expected (B,) bool, True where the sequence is desirable, got None")
        how = {"ignore_index": self.ignore_index, "average": self.average_log_prob}
        logp = _sequence_logp(_input, lin_weight, target, bias, **how)
        ratio = logp
        reference = _reference(self, target, ref_input, ref_weight, ref_bias)
        if reference is not None:
            with torch.no_grad():
                ref_logp = _sequence_logp(*reference, **how)
            ratio = logp - ref_logp
        desirable = preference_labels.bool()
        margin = self.beta * (ratio if kl is None else ratio - kl)
        loss = (-torch.where(desirable, margin, -margin)).sigmoid().mean()
        logits = [self._logit_sum(_input[rows], lin_weight, bias) for rows in (desirable, ~desirable)]
        sums = [values[rows].sum() for values in (logp, self.beta * ratio) for rows in (desirable, ~desirable)]
        return loss, tuple(metric.detach() for metric in (*sums[:2], *logits, *sums[2:]))

    @staticmethod
    def _logit_sum(hidden, lin_weight, bias) -> Tensor:
        rows = hidden.shape[0] * hidden.shape[1]
        return _mean_logit(hidden, lin_weight, bias) * rows * len(lin_weight) if rows else hidden.new_zeros(()).float()


def _reference(loss, target, ref_input, ref_weight, ref_bias) -> tuple | None:
    if not loss.use_ref_model:
        return None
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(f"{missing}: expected the reference's tensor with use_ref_model=True, got None")
    return ref_input, ref_weight, target, ref_bias
