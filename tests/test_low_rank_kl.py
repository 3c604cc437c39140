"""``low_rank`` of both models of ``linear_token_kl``, and of ``linear_prob_lse``: a second product in each tile."""

import pytest
import torch

from tests.kl_cases import BF16, FP64, KLCase, inputs, run_case
from tests.mutation import leave_a_tile_out
from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels.kernels import rows_torch
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import engines, kl_engine, linear_token_kl
from var_kernels.ops.ava_literal import linear_prob_lse
from var_kernels.ops.backend import use_backend
from var_kernels.reference import linear_token_kl_ref, logits_ref

FP32 = torch.float32
CASES = [
    KLCase("everything learns", factors=FP32),
    KLCase("LoRA: the weight is frozen", Case("", frozen=("weight",)), factors=FP32),
    KLCase("frozen factors", Case("", frozen=("weight",)), factors=FP32, frozen_factors=("left", "right")),
    KLCase("only left learns", Case("", frozen=("hidden", "weight")), factors=FP32, frozen_factors=("right",)),
    KLCase("only right learns", Case("", frozen=("hidden", "weight")), factors=FP32, frozen_factors=("left",)),
    KLCase("both models", ref_bias=True, factors=FP32, ref_factors=FP32),
    KLCase("the reference alone", ref_factors=FP32),
    KLCase("ragged chunks, softcap", Case("", tight=True, options={"softcap": 5.0}), factors=FP32, ref_factors=FP32),
    KLCase("rows split too", Case("", bias=True), workspace_mb=0.035, factors=FP32, ref_factors=FP32),
    KLCase("fp64, ragged", Case("", dtype=FP64, tight=True, bias=True), factors=FP64, ref_factors=FP64),
    KLCase("bf16", Case("", dtype=BF16, frozen=("weight",)), factors=BF16, ref_factors=BF16),
    KLCase("bf16, ragged, factors of fp32", Case("", dtype=BF16, tight=True), factors=FP32, ref_factors=FP32),
    KLCase("fp16, factors of fp32", Case("", dtype=torch.float16, frozen=("weight",)), factors=FP32),
]  # fmt: skip


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_token_kl(case, direction, engine, device, small_tiles):
    run_case(case, direction, engine, device)


def test_an_adapter_of_zeros_is_its_own_reference():
    """The policy is the reference and an adapter: at B = 0 they agree to the bit, and B alone has a gradient of 0."""
    hidden, weight, _, _, labels = inputs()
    left, right = torch.randn(63, 3), torch.zeros(507, 3, requires_grad=True)
    kl = linear_token_kl(hidden, weight, hidden, weight, labels, low_rank=(left, right))
    assert kl.count_nonzero() == 0
    kl.sum().backward()
    assert right.grad.abs().max() < 1e-5


def test_autocast_casts_both_models_factors():
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    factors = [t.requires_grad_() for t in (torch.randn(63, 3), torch.randn(507, 3))]
    of_ref = (torch.randn(63, 2), torch.randn(507, 2))
    with torch.autocast("cpu", BF16):
        kl = linear_token_kl(
            hidden, weight, ref_hidden, ref_weight, labels, low_rank=tuple(factors), ref_low_rank=of_ref
        )
    rounded = [t.detach().bfloat16() for t in (hidden, weight, ref_hidden, ref_weight, *factors, *of_ref)]
    expected = linear_token_kl(*rounded[:4], labels, low_rank=tuple(rounded[4:6]), ref_low_rank=tuple(rounded[6:]))
    assert torch.equal(kl.detach(), expected)
    kl.sum().backward()
    assert all(f.grad.dtype == FP32 and f.grad.any() for f in factors)


def test_leading_shape_and_ignored_rows():
    hidden, weight, ref_hidden, ref_weight, labels = inputs(FP64)
    left, right = torch.randn(63, 3, dtype=FP64), torch.randn(507, 3, dtype=FP64)
    shaped = [t.view(7, 9, -1).transpose(0, 1) for t in (hidden, ref_hidden, left)]
    options = {"low_rank": (shaped[2], right), "ref_low_rank": (-shaped[2], right)}
    kl = linear_token_kl(shaped[0], weight, shaped[1], ref_weight, labels.view(7, 9).t(), **options)
    options = {"low_rank": (left, right), "ref_low_rank": (-left, right)}
    truth = linear_token_kl_ref(hidden, weight, ref_hidden, ref_weight, labels, **options)
    assert_result(kl.t().reshape(-1), truth)


# ---- the normaliser of probabilities ---------------------------------------------------------------------------------

PROB_LSE_CASES = [
    (Case("everything learns", bias=True), FP32),
    (Case("ragged, softcap", tight=True, bias=True, options={"softcap": 5.0, "temperature": 0.7}), FP32),
    (Case("fp64, frozen weight", dtype=FP64, frozen=("weight",)), FP64),
    # flat rows: where two tokens share a row's probability their entries cancel in dleft, and are rounded before
    (Case("bf16, factors of fp32", dtype=BF16, tight=True, logits=0.1), FP32),
]


@pytest.mark.parametrize(("case", "factors"), PROB_LSE_CASES, ids=[case.id for case, _ in PROB_LSE_CASES])
def test_prob_lse(case, factors, small_tiles):
    hidden, weight, labels, bias = case.inputs()
    leaves = (hidden, weight, bias, *(t.requires_grad_() for t in case.low_rank(factors)))
    got = linear_prob_lse(
        hidden, weight, labels, bias, alpha=20.0, low_rank=leaves[3:], **case.options, **case.workspace()
    )
    upstream = torch.linspace(-1, 1, labels.numel(), dtype=FP64)
    (got * upstream.to(got.dtype)).sum().backward()

    def reference(dtype):
        own = [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in leaves]
        z = logits_ref(*own[:3], low_rank=own[3:], dtype=dtype, **case.options)
        value = (20.0 * z.softmax(-1)).logsumexp(-1).where(labels != -100, 0.0)
        (value * upstream.to(dtype)).sum().backward()
        return value, own

    (truth, truth_leaves), (_, own_leaves) = reference(FP64), reference(case.dtype)
    assert_result(got, truth)
    for leaf, expected, own in zip(leaves, truth_leaves, own_leaves, strict=True):
        if leaf is not None and leaf.requires_grad:
            assert_gradient(leaf.grad.to(case.dtype), expected.grad, own.grad)


# ---- cost ------------------------------------------------------------------------------------------------------------

N, D, V, R, WORKSPACE_MB = 256, 32, 12_000, 8, 4


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_no_merged_weight_and_no_logits(engine, dtype, monkeypatch):
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 1 << 14)  # the temporaries of its usual blocks take 3 MiB
    torch.manual_seed(0)
    sizes = ((N, D), (V, D), (N, D), (V, D))
    hidden, weight, ref_hidden, ref_weight = (torch.randn(*size).to(dtype) for size in sizes)
    left, right, *of_ref = (torch.randn(n, R) for n in (N, V, N, V))
    leaves = [t.requires_grad_() for t in (hidden, left, right)]

    def step():
        total = linear_token_kl(
            hidden, weight, ref_hidden, ref_weight, reduction="sum", engine=engine,
            low_rank=(left, right), ref_low_rank=tuple(of_ref), workspace_mb=WORKSPACE_MB,
        )  # fmt: skip
        return torch.autograd.grad(total, leaves)

    returned = N * D * dtype.itemsize + (N + V) * R * 4
    sums = N * D * 4 if dtype == BF16 and engine == "two_pass" else 0
    bound = (WORKSPACE_MB << 20) + returned + sums + 40 * 8 * N
    peak = peak_extra_bytes(step)
    assert peak <= bound, f"{peak / 2**20:.2f} MiB above {bound / 2**20:.2f}"
    assert bound < 2 * N * V * 4 / 3


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 2], ids=["of the policy", "of the reference"])
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_a_product_left_out_is_refused(engine, rank, small_tiles, monkeypatch):
    original = engines.low_rank_into

    def leaves_one_out(out, left, right):
        if left.shape[1] != rank:
            original(out, left, right)
        else:
            out.zero_()

    monkeypatch.setattr(engines, "low_rank_into", leaves_one_out)
    with use_backend("torch"), pytest.raises(AssertionError, match="KL"):
        run_case(KLCase("", factors=FP32, ref_factors=FP32), "reverse", engine, "cpu")


@pytest.mark.parametrize("which", ["dleft_NR", "dright_VR"])
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_a_tile_left_out_of_a_gradient_is_refused(which, engine, small_tiles, monkeypatch):
    calls = leave_a_tile_out(monkeypatch, which, engines, kl_engine)
    with use_backend("torch"), pytest.raises(AssertionError, match=which[:-3]):
        run_case(KLCase("", Case("", tight=True), factors=FP32), "forward", engine, "cpu")
    assert len(calls) >= 2
