"""The contract of the row kernels: what every backend (plain torch, Triton, C++) computes on one tile of logits.

A tile ``logits_nv`` holds the raw head output x = W h of n rows and one slice of the vocabulary, before bias and
transform. Three kernels, which know neither losses nor autograd:

    row_stats    reduces it into running statistics
    row_exp      does the same and stores exponentials that any gradient can be made of
    row_grad     overwrites it with the gradient in x

A backend is a module of the three, and of what ops/plan.py asks: ``DTYPES`` of a tile, ``temporary_bytes(n,
columns, tile)``, ``COPIES_GRADIENT``, ``CACHED_TILES``, ``READS_PIVOTS``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# ``row_exp`` raises a row's pivot where a sum of its exponentials exceeds this: they stay far inside bf16 and fp32, and
# so does a gradient's scale, which divides by them.
LARGEST_SUM = 1e17


# Rows of a tile start at multiples of so many elements: GEMMs and vector loads want 64 bytes, and read up to 32
# elements at once.
ROW_ELEMENTS = 32


def aligned(columns: int) -> int:
    """A row's stride."""
    return -(-columns // ROW_ELEMENTS) * ROW_ELEMENTS


def packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def spans(start: int, stop: int, step: int) -> list[slice]:
    """Consecutive pieces of a range."""
    return [slice(begin, min(begin + step, stop)) for begin in range(start, stop, step)]


@dataclass
class LogitTransform:
    """c(): z = softcap * tanh(logit_scale * x / softcap) / temperature; without a softcap z = logit_scale * x /
    temperature.

    ``scalars`` of the kernels: z = scale x, or cap tanh(inner x), 0 without a softcap. slope: dz/dx without the
    softcap's own derivative, which is 1 - (inverse_cap z)^2.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self):
        self.slope, self.cap, self.inner, self.inverse_cap = self.logit_scale / self.temperature, 0.0, 0.0, 0.0
        if self.softcap is not None:
            softcap = float(self.softcap)  # a launch takes no numpy.float32
            self.cap, self.inner = softcap / self.temperature, self.logit_scale / softcap
            self.inverse_cap = self.temperature / softcap
        self.is_identity = self.slope == 1.0 and self.softcap is None
        self.scalars = {"scale": self.slope, "cap": self.cap, "inner": self.inner}

    def apply(self, x: Tensor) -> Tensor:
        """z of raw logits x, bias included."""
        if self.softcap is None:
            return x * self.slope
        return (x * self.inner).tanh() * self.cap

    def apply_(self, x_nv: Tensor, bias_v: Tensor | None) -> Tensor:
        """z of raw logits x and a bias, in place."""
        if bias_v is not None:
            x_nv += bias_v
        if self.softcap is None:
            return x_nv if self.is_identity else x_nv.mul_(self.slope)
        return x_nv.mul_(self.inner).tanh_().mul_(self.cap)

    def cap_slope(self, z: Tensor) -> Tensor:
        """The softcap's own derivative where the transform gives z."""
        return (z * self.inverse_cap).square_().neg_().add_(1.0)


@dataclass
class RowStats:
    """Running statistics of z over the vocabulary slices seen so far; optional ones are None when nobody asked.

    max_N: maximum, -inf at the start. sumexp_N: sum exp(z - max). label_logit_NK: z at the label ids.
    shifted_sum_N: sum exp(z - max) (z - max), for the entropy. logit_sum_N: sum z, for label smoothing. argmax_N:
        first id of the maximum.
    Of ``row_exp``: max_N is a pivot that is known beforehand (the label's logit, where it is finite) and not a maximum;
        others_N: sum exp(z - pivot) without the label's; top_N: the maximum, for argmax_N; logp_N: log p of the label.
        ``start_rows`` and ``finish_rows`` of the label kernels write them before and after.
    """

    max_N: Tensor
    sumexp_N: Tensor
    label_logit_NK: Tensor
    shifted_sum_N: Tensor | None
    logit_sum_N: Tensor | None
    argmax_N: Tensor | None
    others_N: Tensor | None = None
    top_N: Tensor | None = None
    logp_N: Tensor | None = None

    @classmethod
    def empty(cls, n: int, k: int, like: Tensor, *, entropy: bool, mean: bool, argmax: bool) -> "RowStats":
        """Statistics of no slice at all, in fp32 (fp64 for fp64 ``like``)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return cls(
            max_N=like.new_full((n,), -torch.inf, dtype=dtype),
            sumexp_N=like.new_zeros(n, dtype=dtype),
            # NaN until a slice brings it: a label beyond the vocabulary, not looked for on a GPU, shows in the loss
            label_logit_NK=like.new_full((n, k), torch.nan, dtype=dtype),
            shifted_sum_N=like.new_zeros(n, dtype=dtype) if entropy else None,
            logit_sum_N=like.new_zeros(n, dtype=dtype) if mean else None,
            argmax_N=like.new_zeros(n, dtype=torch.int64) if argmax else None,
        )

    @classmethod
    def uninitialised(cls, n: int, like: Tensor, *, mean: bool, argmax: bool) -> "RowStats":
        """Memory for the statistics of ``row_exp``, which ``start_rows`` of the label kernels writes."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # Each of its own: an op's output is no part of another's memory.
        vectors = [torch.empty(n, dtype=dtype, device=like.device) for _ in range(5)]
        max_N, sumexp_N, label_logit_N, others_N, logp_N = vectors
        return cls(
            max_N,
            sumexp_N,
            label_logit_N.unsqueeze(1),
            shifted_sum_N=None,
            logit_sum_N=torch.empty_like(max_N) if mean else None,
            argmax_N=torch.empty_like(max_N, dtype=torch.int64) if argmax else None,
            others_N=others_N,
            top_N=torch.empty_like(max_N) if argmax else None,
            logp_N=logp_N,
        )

    def rows(self, rows: slice) -> "RowStats":
        """A view of some rows; updating it updates the whole."""
        if rows.start == 0 and rows.stop == len(self.max_N):
            return self
        return RowStats(*[None if t is None else t[rows] for t in vars(self).values()])

    def set_pivots(self, label_logit_N: Tensor) -> None:
        """Begin ``row_exp``: the label's logits are known, and are the pivots where they are finite."""
        self.label_logit_NK.copy_(label_logit_N.unsqueeze(1))
        self.max_N.copy_(label_logit_N.where(label_logit_N.isfinite(), -torch.inf))
        self.others_N.zero_()
        if self.logit_sum_N is not None:
            self.logit_sum_N.zero_()
        if self.argmax_N is not None:
            self.argmax_N.zero_()
            self.top_N.fill_(-torch.inf)

    @property
    def lse_N(self) -> Tensor:
        return self.max_N + self.sumexp_N.log()

    @property
    def norms_2N(self) -> Tensor:
        """max and log sum exp(z - max), in two parts: log p = (z - max) - log sum keeps the digits that lse, one
        number as large as the logits, would round away."""
        return torch.stack((self.max_N, self.sumexp_N.log()))

    @property
    def of_label(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Statistics of ``row_exp`` for a backward over exponentials, (N,) each: pivot, sum of the exponentials, the
        label's log p and logit.
        """
        return self.max_N, self.sumexp_N, self.logp_N, self.label_logit_NK.squeeze(1)

    def logp_NK(self, label_smoothing: float, vocabulary: int) -> Tensor:
        """(1 - e) log p_y + e mean_v log p_v; differences with the maximum first, which keeps the digits of large
        logits.
        """
        if self.logp_N is not None and not label_smoothing:
            return self.logp_N.unsqueeze(1)
        log_sum = self.sumexp_N.log().unsqueeze(1)
        logp = self.label_logit_NK - self.max_N.unsqueeze(1) - log_sum
        if self.logp_N is not None:
            logp = self.logp_N.unsqueeze(1)
        if label_smoothing:
            mean_logp = (self.logit_sum_N / vocabulary - self.max_N).unsqueeze(1) - log_sum
            # No difference of the two: both are -inf at a label that is forbidden.
            if label_smoothing == 1:
                return mean_logp.expand_as(logp).contiguous()
            logp = (1 - label_smoothing) * logp + label_smoothing * mean_logp
        return logp

    @property
    def entropy_N(self) -> Tensor:
        return self.sumexp_N.log() - self.shifted_sum_N / self.sumexp_N


@dataclass
class RowCoefficients:
    """The gradient in z of one row, for any loss on this head: dz_v = p_v (prob + logp_slope log p_v) + constant +
    sum_k label_k 1[v = y_k].

    prob_N, label_NK: always. logp_slope_N (entropy) and constant_N (label smoothing): None when absent.
    """

    prob_N: Tensor
    label_NK: Tensor
    logp_slope_N: Tensor | None = None
    constant_N: Tensor | None = None

    def rows(self, rows: slice) -> "RowCoefficients":
        if rows.start == 0 and rows.stop == len(self.prob_N):
            return self
        return RowCoefficients(*[None if t is None else t[rows] for t in vars(self).values()])

    @classmethod
    def from_upstream(
        cls,
        dlogp_NK: Tensor,
        label_smoothing: float,
        vocabulary: int,
        dlse_N: Tensor | None = None,
        dentropy_N: Tensor | None = None,
        entropy_N: Tensor | None = None,
    ) -> "RowCoefficients":
        """Coefficients from the upstream gradients of logp, lse and entropy (nats)."""
        total_N = dlogp_NK.sum(1) if dlogp_NK.shape[1] != 1 else dlogp_NK.squeeze(1)
        prob_N = -total_N if dlse_N is None else dlse_N - total_N
        if dentropy_N is not None:
            prob_N = prob_N - dentropy_N * entropy_N
        return cls(
            prob_N=prob_N,
            label_NK=(1 - label_smoothing) * dlogp_NK if label_smoothing else dlogp_NK,
            logp_slope_N=None if dentropy_N is None else -dentropy_N,
            constant_N=total_N * (label_smoothing / vocabulary) if label_smoothing else None,
        )
