"""The two primitives: autograd, choice of engine and backend. They know no loss and no model."""

from var_kernels.ops.logprob import linear_logprob
from var_kernels.ops.weighted_nll import linear_weighted_nll

__all__ = ["linear_logprob", "linear_weighted_nll"]
