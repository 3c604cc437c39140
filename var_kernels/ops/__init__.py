"""The primitives: autograd, choice of engine and backend. They know no loss and no model."""

from var_kernels.ops.kl import linear_token_kl
from var_kernels.ops.logprob import linear_logprob
from var_kernels.ops.token_loss import linear_token_loss
from var_kernels.ops.vocab_parallel import vocab_parallel_logprob, vocab_parallel_token_kl
from var_kernels.ops.weighted_nll import linear_weighted_nll

__all__ = [
    "linear_logprob",
    "linear_token_kl",
    "linear_token_loss",
    "linear_weighted_nll",
    "vocab_parallel_logprob",
    "vocab_parallel_token_kl",
]
