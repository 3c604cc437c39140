"""The tolerances can fail: mistakes that such kernels really have had, put into ours, must each be refused."""

import pytest
import torch

from tests import triton_interpreter
from tests.mutation import mutant_of
from tests.op_cases import Case, check_logprob, check_weighted_nll
from var_kernels.kernels import gemm_torch, rows_torch
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats
from var_kernels.ops.backend import use_backend

BF16 = torch.bfloat16
REAL = {
    "logits_into": gemm_torch.logits_into,
    "add_product": gemm_torch.add_product,
    "product_into": gemm_torch.product_into,
    "row_stats": rows_torch.row_stats,
    "row_grad": rows_torch.row_grad,
    "merge": rows_torch._merge_block,
    "from_upstream": RowCoefficients.from_upstream.__func__,
    "logp": RowStats.logp_NK,
}


def zero_padded_tail(stats):
    """The last slice read beyond the vocabulary: three columns of logit 0."""

    def row_stats(logits_nv, labels_nk, stats, v_start, bias_v, transform):
        REAL["row_stats"](logits_nv, labels_nk, stats, v_start, bias_v, transform)
        if v_start + logits_nv.shape[1] == 507:
            stats.sumexp_N += 3 * torch.exp(-stats.max_N)

    return row_stats


def dropped_column(_):
    def row_stats(logits_nv, labels_nk, stats, v_start, bias_v, transform):
        bias_v = None if bias_v is None else bias_v[:-1]
        REAL["row_stats"](logits_nv[:, :-1], labels_nk, stats, v_start, bias_v, transform)

    return row_stats


def maximum_from_zero(_):
    def merge(z_nv, labels_nk, stats, v_start):
        REAL["merge"](z_nv, labels_nk, stats, v_start)
        lifted = stats.max_N.clamp(min=0.0)
        stats.sumexp_N.mul_((stats.max_N - lifted).exp())
        stats.max_N.copy_(lifted)

    return merge


def forgotten_rescale(_):
    """Slices summed without decay when a later slice brings a new maximum."""

    def merge(z_nv, labels_nk, stats, v_start):
        before, had = stats.sumexp_N.clone(), stats.max_N.clone()
        REAL["merge"](z_nv, labels_nk, stats, v_start)
        kept = (had - stats.max_N).clamp(min=-1e30).exp()
        stats.sumexp_N.add_(before * (1 - kept))

    return merge


def rounded_logits(_):
    """16-bit logits behind a 'fp32' promise."""

    def logits_into(out, hidden, weight, *rest):
        REAL["logits_into"](out, hidden, weight, *rest)
        out.copy_(out.bfloat16())

    return logits_into


def narrow_accumulator(_):
    """dH or dW accumulated in 16 bit."""

    def add_product(total, left, right, *rest):
        REAL["add_product"](total, left, right, *rest)
        total.copy_(total.bfloat16())

    return add_product


def narrow_result(_):
    """dW rounded twice on its way: to 10 bits, then to bf16."""

    def product_into(out, left, right, *rest):
        REAL["product_into"](out, left, right, *rest)
        out.copy_(torch.ldexp(torch.frexp(out.float())[0].mul(64).round().div(64), torch.frexp(out.float())[1]))

    return product_into


def label_off_by_one_slice(_):
    def row_grad(logits_nv, labels_nk, norms_2n, coefficients, v_start, bias_v, transform, out):
        return REAL["row_grad"](
            logits_nv, labels_nk + (v_start > 0), norms_2n, coefficients, v_start, bias_v, transform, out
        )

    return row_grad


def no_softcap_slope(_):
    def row_grad(logits_nv, labels_nk, norms_2n, coefficients, v_start, bias_v, transform, out):
        z_nv = rows_torch._transformed(logits_nv, bias_v, transform, inplace=True)
        return REAL["row_grad"](z_nv, labels_nk, norms_2n, coefficients, v_start, None, LogitTransform(), out)

    return row_grad


def no_bias_in_backward(_):
    def row_grad(logits_nv, labels_nk, norms_2n, coefficients, v_start, bias_v, transform, out):
        return REAL["row_grad"](logits_nv, labels_nk, norms_2n, coefficients, v_start, None, transform, out)

    return row_grad


def coarse_lse(_):
    """lse and recomputed logits of different precision."""

    def row_grad(logits_nv, labels_nk, norms_2n, *rest):
        return REAL["row_grad"](logits_nv, labels_nk, norms_2n.bfloat16().float(), *rest)

    return row_grad


def entropy_gradient_without_mean(_):
    def from_upstream(cls, dlogp, smoothing, v, dlse=None, dentropy=None, entropy=None):
        zero = None if entropy is None else torch.zeros_like(entropy)
        return REAL["from_upstream"](cls, dlogp, smoothing, v, dlse, dentropy, zero)

    return classmethod(from_upstream)


def lse_gradient_dropped(_):
    def from_upstream(cls, dlogp, smoothing, v, dlse=None, dentropy=None, entropy=None):
        return REAL["from_upstream"](cls, dlogp, smoothing, v, None, dentropy, entropy)

    return classmethod(from_upstream)


def smoothing_without_mean(_):
    def logp_nk(self, label_smoothing, vocabulary):
        return (1 - label_smoothing) * REAL["logp"](self, 0.0, vocabulary)

    return logp_nk


@pytest.fixture(autouse=True)
def plain_torch():
    """The backend that the mutants are put into."""
    with use_backend("torch"):
        yield


ENTROPY = (
    "entropy",
)  # its gradient is made of logits, by row_stats and row_grad; tests/test_stored_exp.py has row_exp
TAIL = Case("", logits=0.1, tight=True, outputs=ENTROPY)
MUTANTS = [
    (zero_padded_tail, rows_torch, "row_stats", TAIL),
    (dropped_column, rows_torch, "row_stats", TAIL),
    (maximum_from_zero, rows_torch, "_merge_block", Case("", bias=True, offset=-1e4, outputs=ENTROPY)),
    (forgotten_rescale, rows_torch, "_merge_block", Case("", tight=True, outputs=ENTROPY)),
    (rounded_logits, gemm_torch, "logits_into", Case("")),
    (rounded_logits, gemm_torch, "logits_into", Case("", dtype=BF16)),
    (narrow_accumulator, gemm_torch, "add_product", Case("", tight=True)),
    (narrow_accumulator, gemm_torch, "add_product", Case("", dtype=BF16, tight=True, ignored=0.0)),
    (narrow_result, gemm_torch, "product_into", Case("", dtype=BF16, outputs=ENTROPY)),
    (label_off_by_one_slice, rows_torch, "row_grad", Case("", tight=True)),
    (no_softcap_slope, rows_torch, "row_grad", Case("", options={"softcap": 5.0}, outputs=ENTROPY)),
    (no_bias_in_backward, rows_torch, "row_grad", Case("", bias=True, outputs=ENTROPY)),
    (coarse_lse, rows_torch, "row_grad", Case("", logits=30.0, outputs=ENTROPY)),
    (entropy_gradient_without_mean, RowCoefficients, "from_upstream", Case("", outputs=("entropy",))),
    (lse_gradient_dropped, RowCoefficients, "from_upstream", Case("", outputs=("lse",))),
    (smoothing_without_mean, RowStats, "logp_NK", Case("", options={"label_smoothing": 0.1})),
]


@pytest.mark.parametrize(
    ("mutant", "owner", "name", "case"), MUTANTS, ids=[f"{m[0].__name__}-{m[3].dtype}" for m in MUTANTS]
)
def test_mutant_is_refused(mutant, owner, name, case, small_tiles, monkeypatch):
    check_logprob(case)
    monkeypatch.setattr(owner, name, mutant(None))
    with pytest.raises(AssertionError):
        check_logprob(case)


# Text of the Triton row kernels, what replaces it, a case that must notice; run by the interpreter, in fp32.
_K = "tl.load(labels_ptr + row * K + k)"
_CASES = {
    "capped": Case("", options={"softcap": 5.0}, outputs=ENTROPY),
    "scaled": Case("", options={"logit_scale": 0.5}, outputs=ENTROPY),
    "smoothed": Case("", tight=True, options={"label_smoothing": 0.1}),
    "entropy": Case("", tight=True, outputs=("entropy",)),
    "argmax": Case("", tight=True, outputs=("entropy", "argmax")),
    "whole": Case("", outputs=("entropy",)),  # several steps of a row, one slice
    "flat": TAIL,
    "low": Case("", bias=True, offset=-1e4, outputs=ENTROPY),
    "tight": Case("", tight=True, outputs=ENTROPY),
    "three": Case("", targets=3),
    "biased": Case("", bias=True, outputs=ENTROPY),
}
TRITON_MUTANTS = {
    "tail counted": ('z = tl.where(mask, z, float("-inf"))', "z = tl.where(columns < C + 3, z, -1e38)", "flat"),
    "last column dropped": ("mask = columns < C\n", "mask = columns < C - 1\n", "flat"),
    "maximum from 0": ("lowest = -1e38", "lowest = 0.0", "low"),
    "forgotten rescale in a lane": ("lane_sum * decay + 1.0", "lane_sum + 1.0", "whole"),
    "forgotten rescale of slices": ("+ old_decay * old_sum)", "+ old_sum)", "tight"),
    "label off by one slice": (f"{_K} - v_start\n            grad", f"{_K}\n            grad", "tight"),
    "second target lost": (f"{_K} - v_start\n        inside", f"{_K[:-5]}) - v_start\n        inside", "three"),
    "no slope of the softcap": ("grad *= 1.0 - tanh * tanh", "grad *= 1.0", "capped"),
    "no slope of the scale": ("(grad * scale)", "grad", "scaled"),
    "no bias": ("x += tl.load(bias_ptr", "x + tl.load(bias_ptr", "biased"),
    "entropy not shifted": ("lane_shifted - finite * lane_sum", "lane_shifted", "whole"),
    "entropy of slices not shifted": ("old_shifted + tl.maximum(old_drop, -1e30) * old_sum", "old_shifted", "entropy"),
    "entropy's slope halved": ("p * (prob + logp_slope *", "p * (prob + 0.5 * logp_slope *", "entropy"),
    "smoothing's constant lost": ("grad += constant", "grad += 0.0", "smoothed"),
    "mean of the last slice": ("tl.load(logit_sum_ptr + row) + tl.sum", "tl.sum", "smoothed"),
    "argmax without its slice": ("slice_argmax.to(tl.int64) + v_start", "slice_argmax.to(tl.int64)", "argmax"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted on machines without a GPU")
@pytest.mark.parametrize("name", TRITON_MUTANTS)
def test_triton_mutant_is_refused(name, small_tiles, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    triton_interpreter.mend()
    from var_kernels.kernels import rows_triton

    before, after, case = TRITON_MUTANTS[name]
    case = _CASES[case]
    mutant = mutant_of(rows_triton, before, after, tmp_path)
    with use_backend("triton"):
        check_logprob(case)
        mutant.BLOCK_COLUMNS = rows_triton.BLOCK_COLUMNS
        monkeypatch.setattr(rows_triton, "row_stats", mutant.row_stats)
        monkeypatch.setattr(rows_triton, "row_grad", mutant.row_grad)
        with pytest.raises(AssertionError):
            check_logprob(case)


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_mutant_weights_are_refused(engine, small_tiles, monkeypatch):
    """A weight that reaches the label's entry but not the rest of the row."""
    check_weighted_nll(Case(""), engine)

    def from_upstream(cls, dlogp, *rest):
        coefficients = REAL["from_upstream"](cls, dlogp, *rest)
        coefficients.prob_N = coefficients.prob_N.sign()
        return coefficients

    monkeypatch.setattr(RowCoefficients, "from_upstream", classmethod(from_upstream))
    with pytest.raises(AssertionError):
        check_weighted_nll(Case(""), engine)
