"""``linear_token_loss``: any loss of each token's own log-prob and entropy, in one pass over the head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from var_kernels.kernels.rows import RowCoefficients, RowStats
from var_kernels.ops import checks
from var_kernels.ops.define import Forward, define_op
from var_kernels.ops.engines import one_pass
from var_kernels.ops.head import Head, prepare
from var_kernels.ops.logprob import apply_logprob
from var_kernels.ops.plan import takes_one_pass
from var_kernels.ops.signatures import ENGINES, Engine, RowKeywords, TokenLossKeywords, names_options

TokenLoss = Callable[..., Tensor]


@overload
def linear_token_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    token_inputs: tuple[Tensor, ...] = (),
    bias: Tensor | None = None,
    *,
    return_logp: Literal[False] = False,
    return_entropy: Literal[False] = False,
    return_argmax: Literal[False] = False,
    **options: Unpack[TokenLossKeywords],
) -> Tensor: ...


@overload
def linear_token_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    token_inputs: tuple[Tensor, ...] = (),
    bias: Tensor | None = None,
    *,
    return_logp: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    **options: Unpack[TokenLossKeywords],
) -> Tensor | tuple[Tensor, ...]: ...


@names_options
def linear_token_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    token_inputs: tuple[Tensor, ...] = (),
    bias: Tensor | None = None,
    *,
    entropy: bool = False,
    return_logp: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    engine: Engine = "auto",
    **options: Unpack[RowKeywords],
) -> Tensor | tuple[Tensor, ...]:
    """Sum over tokens of a loss that depends on each token's own log-prob (and entropy), without the [N, V] logits.

        loss = sum_n f(logp_n[, entropy_n], inputs_n)

    f is ordinary differentiable torch on vectors. It is called for a chunk of tokens at a time, as soon as their
    log-probs are known, and its gradient there is all that the chunk needs: one pass, 3 GEMMs, where autograd over
    ``linear_logprob`` takes 4. PPO's and GRPO's clipped ratio, DFT, an entropy bonus, a per-token KL estimate fit; a
    loss of a sequence's sum (DPO) does not: with f's arguments cut into chunks it would be another loss.

    Args:
        hidden, lm_head_weight, bias, num_active, workspace_mb, precision, engine, the head's options: see
            ``linear_weighted_nll``.
        labels: (...) int64, one target a row.
        token_loss: f(logp (n,), *inputs (n,)) -> (n,), or f(logp, entropy, *inputs) with ``entropy=True``; fp32 (fp64
            for fp64 inputs). Element by element: row i of the result may depend on row i of the arguments alone. What
            else it reads is a constant, but for engine="two_pass", where such a tensor may learn.
        token_inputs: tensors in the shape of labels (advantages, old log-probs, masks), constants for the gradient.

    Returns:
        A scalar fp32 (fp64 for fp64 inputs); an all-ignored batch gives a differentiable 0. If asked for, a tuple with
        the detached logp and entropy in the shape of labels, 0 where ignored, and argmax (...) int64, -1 there, in this
        order.

    Raises:
        TypeError, ValueError: argument, what was expected, what came, the remedy.
    """
    checks.check_choice("engine", engine, ENGINES)
    checks.check_token_inputs(token_loss, token_inputs, labels, hidden)
    options = checks.complete_options("linear_token_loss", options, RowKeywords)
    asked = {"entropy": entropy or return_entropy, "argmax": return_argmax}
    call = prepare(hidden, lm_head_weight, labels, bias, options, **asked)
    inputs = [call.select_targets(t.detach()).squeeze(1) for t in token_inputs]
    # A compiled graph cannot call back; there autograd runs over the log-probs, as where none of the head learns.
    if any(call.head.needs) and not call.traced and takes_one_pass(call.head, engine):
        arguments = TokenLossArguments(call.head, call.active_NK.squeeze(1), token_loss, entropy, inputs)
        loss, logp_NK, entropy_N, argmax_N = _token_loss(arguments)
    else:
        logp_NK, _, entropy_N, argmax_N = apply_logprob(call)
        known = [logp_NK.squeeze(1), *([entropy_N] if entropy else [])]
        loss = _evaluate(token_loss, known, inputs, call.active_NK.squeeze(1)).sum()
    logp_NK = logp_NK.detach() if return_logp else None
    return call.outputs(loss, logp_NK, entropy_N.detach() if return_entropy else None, argmax_N=argmax_N)


def _evaluate(token_loss: TokenLoss, known: list[Tensor], inputs: list[Tensor], active_n: Tensor) -> Tensor:
    """(n,) losses, 0 where a row does not count (there are such rows only where they are masked)."""
    # Masked on both sides: such a row may have a slope of NaN, which a mask of the result alone lets through.
    loss_n = token_loss(*(t.where(active_n, 0.0) for t in known), *inputs)
    if not isinstance(loss_n, Tensor) or loss_n.shape != active_n.shape:
        got = tuple(loss_n.shape) if isinstance(loss_n, Tensor) else type(loss_n).__name__
        raise ValueError(
            f"token_loss must return one loss a token, shape {tuple(active_n.shape)}, got {got}; leave the sum to "
            "linear_token_loss"
        )
    return loss_n.where(active_n, 0.0)


def _check_constants(loss_n: Tensor, leaves: list[Tensor]) -> None:
    """Refuse a loss that another tensor than ``leaves`` learns from: its gradient would be lost."""
    pending, seen = [loss_n.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                "token_loss must learn from the head alone in one pass, got another tensor that requires gradients, of "
                f"shape {tuple(variable.shape)}; detach it, or pass engine='two_pass'"
            )


@dataclass
class TokenLossArguments:
    head: Head
    active_N: Tensor
    token_loss: TokenLoss
    entropy: bool
    inputs: list[Tensor]


def _forward(arguments: TokenLossArguments) -> Forward:
    """The sum of token_loss; log-probs, entropy and argmax for the caller's metrics; finished gradients."""
    head, losses = arguments.head, []

    def evaluate(known: list[Tensor], rows: slice) -> Tensor:
        inputs = [t[rows] for t in arguments.inputs]
        return _evaluate(arguments.token_loss, known, inputs, arguments.active_N[rows])

    def known_of(stats: RowStats) -> list[Tensor]:
        return [stats.logp_NK(0.0, head.v).squeeze(1), *([stats.entropy_N] if arguments.entropy else [])]

    def coefficients_of(rows: slice, stats: RowStats) -> RowCoefficients:
        leaves = [t.requires_grad_() for t in known_of(stats)]
        with torch.enable_grad():
            loss_n = evaluate(leaves, rows)
            if not losses:
                _check_constants(loss_n, leaves)
            slopes = ()
            if loss_n.requires_grad:  # else it is a constant
                slopes = torch.autograd.grad(loss_n.sum(), leaves, allow_unused=True)
        losses.append(loss_n.detach().sum())
        slope_n, entropy_slope_n = (*slopes, None, None)[:2]
        slope_N1 = torch.zeros_like(leaves[0]) if slope_n is None else slope_n
        entropy_n = None if entropy_slope_n is None else leaves[1].detach()
        return RowCoefficients.from_upstream(slope_N1.unsqueeze(1), 0.0, head.v, None, entropy_slope_n, entropy_n)

    stats, gradients = one_pass(head, coefficients_of)
    logp_NK, entropy_N = stats.logp_NK(0.0, head.v), stats.entropy_N if head.options.entropy else None
    loss = torch.stack(losses).sum() if losses else logp_NK.new_zeros(())
    return Forward((loss, logp_NK, entropy_N, stats.argmax_N), gradients)


# A graph cannot call back.
_token_loss = define_op("token_loss", TokenLossArguments, _forward, None, None, outputs=4)
