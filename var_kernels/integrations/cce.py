"""The call of cut-cross-entropy, on ``linear_weighted_nll``: a switch is an import.

    from cut_cross_entropy import linear_cross_entropy                   before
    from var_kernels.integrations.cce import linear_cross_entropy        after

Same arguments by name, same results, no filtering of small gradients: ``filter_eps``, ``filter_e_grad``,
``filter_c_grad``, ``accum_e_fp32``, ``accum_c_fp32`` and ``impl`` are taken and change nothing, every gradient is whole
and summed in fp32. What differs: it runs on CPUs, and the result is fp32 whatever the inputs are.
"""

from dataclasses import dataclass

from torch import Tensor

from var_kernels.integrations.options_module import OptionsModule
from var_kernels.ops import linear_weighted_nll


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str = "cce",
    vocab_parallel_options: None = None,
) -> Tensor:
    """Cross-entropy of softcap(e c^T + bias) and targets; the logits are never made. Memory: ``linear_weighted_nll``.

    Args:
        e (..., D), c (V, D), targets (...) int64, bias (V,). The release 25.1.1 has no bias: its fourth argument by
            position is ignore_index.
        shift: s: row t is scored by targets[t + s], the last s rows by nothing; True is 1.
        reduction: "mean" (over the rows that are not ignored), "sum", "none".
    Returns:
        () or, for "none", the shape of targets, fp32, nats; with shift s columns fewer.
    Raises:
        ValueError: shift out of range, vocab_parallel_options (see ``var_kernels.ops.vocab_parallel_logprob``).
        TypeError: a bias that is no tensor.
    """
    if vocab_parallel_options is not None:
        raise ValueError(
            "vocab_parallel_options: expected None; for a vocabulary spread over ranks use "
            "var_kernels.ops.vocab_parallel_logprob"
        )
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a tensor or None, got {type(bias).__name__} {bias!r}; name what follows it")
    steps = int(shift)
    if not 0 <= steps < targets.shape[-1]:
        raise ValueError(f"shift: expected 0 to {targets.shape[-1] - 1}, got {shift}")
    if steps:
        e, targets = e[..., :-steps, :], targets[..., steps:]
    return linear_weighted_nll(
        e, c, targets, None, bias, reduction=reduction, ignore_index=ignore_index, softcap=softcap
    )


@dataclass(eq=False, repr=False)
class LinearCrossEntropy(OptionsModule):
    """``linear_cross_entropy`` as a module: options first, then ``loss(e, c, targets, bias=None)``."""

    ignore_index: int = -100
    softcap: float | None = None
    reduction: str = "mean"
    shift: bool | int = 0
    filter_eps: float | str | None = "auto"
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True
    impl: str = "cce"

    def forward(self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(e, c, targets, bias, self.ignore_index, self.softcap, self.reduction, self.shift)
