"""Gradients of first order: whoever differentiates them is told so."""

import functools

import torch
from torch import Tensor


def first_order(backward):
    """For the backward of an autograd.Function, in place of ``once_differentiable``: that one looks at the upstream
    gradients alone, and where those are constants (``loss.sum()``) a gradient penalty would silently add nothing.
    """

    @functools.wraps(backward)
    def run(ctx, *upstream):
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # no create_graph=True
            return gradients
        anchor = torch.zeros((), requires_grad=True)
        return tuple(None if g is None else _Refusal.apply(g, anchor) for g in gradients)

    return run


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "the gradients of var_kernels' ops cannot be differentiated again, and this backward asks for it (a "
            "gradient penalty, a Hessian); detach them, or take full logits: hidden @ lm_head_weight.T"
        )
