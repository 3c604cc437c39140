"""``low_rank``: a second product added to the logits tile by tile, as a LoRA adapter of the head is."""

import math
from dataclasses import replace

import pytest
import torch

from tests.mutation import leave_a_tile_out
from tests.op_cases import BF16, Case
from tests.products import Products
from tests.tolerance import assert_gradient, assert_result
from var_kernels.losses import dft_loss
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import engines, linear_logprob, linear_token_loss, linear_weighted_nll
from var_kernels.ops.backend import choose_backend, use_backend
from var_kernels.reference import linear_logprob_ref, linear_weighted_nll_ref

FP32 = torch.float32
# (case, dtype of the factors, what is frozen)
CASES = [
    (Case("everything learns"), FP32, ()),
    (Case("LoRA: the weight is frozen", frozen=("weight",)), FP32, ()),
    (Case("frozen factors", frozen=("weight",)), FP32, ("left", "right")),
    (Case("only left learns", frozen=("weight", "hidden")), FP32, ("right",)),
    (Case("only right learns", frozen=("weight", "hidden")), FP32, ("left",)),
    (Case("ragged chunks, all outputs", tight=True, outputs=("lse", "entropy"), bias=True), FP32, ()),
    (Case("softcap, scale", tight=True, bias=True, options={"softcap": 5.0, "logit_scale": 0.5}), FP32, ()),
    (Case("label smoothing, several targets", targets=3, options={"label_smoothing": 0.1}), FP32, ()),
    (Case("fp64, ragged", dtype=torch.float64, tight=True, bias=True), torch.float64, ()),
    (Case("bf16", dtype=BF16, frozen=("weight",)), BF16, ()),
    (Case("bf16, ragged, factors of fp32", dtype=BF16, tight=True), FP32, ()),
    (Case("fp16, factors of fp32", dtype=torch.float16, frozen=("weight",)), FP32, ()),
]
IDS = [case.id for case, _, _ in CASES]
# Row kernels do not know of the factors, and Triton's interpreter is slow.
INTERPRETED = ("LoRA: the weight is frozen", "bf16")


def require(target, case):
    target.require(case.dtype)
    interpreted = target.device == "cpu" and choose_backend(torch.device("cpu"), FP32)[0] == "triton"
    if interpreted and case.id not in INTERPRETED:
        pytest.skip("interpreted in a few cases only")


class Problem:
    """Leaves of one run; the reference's are the same numbers in ``dtype``."""

    def __init__(self, case: Case, factors, frozen=(), device="cpu", dtype=None):
        hidden, weight, self.labels, bias = case.inputs(device)
        left, right = case.low_rank(factors, device=device)
        given = {"hidden": hidden, "weight": weight, "bias": bias, "left": left, "right": right}
        self.leaves = {}
        for name, t in given.items():
            if t is not None:
                learns = name not in (*case.frozen, *frozen)
                self.leaves[name] = t.detach().to(dtype or t.dtype).requires_grad_(learns)
        self.case, self.dtype = case, dtype

    def call(self, op, *rest, **options):
        t = self.leaves
        low_rank = (t["left"], t["right"])
        dtype = {} if self.dtype is None else {"dtype": self.dtype}
        return op(
            t["hidden"], t["weight"], self.labels, *rest, t.get("bias"),
            low_rank=low_rank, **dtype, **self.case.options, **options,
        )  # fmt: skip

    def gradients(self, outputs):
        generator = torch.Generator().manual_seed(1)
        total = 0.0
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            total = total + (out.double() * torch.randn(out.shape, generator=generator).to(out.device)).sum()
        total.backward()
        return {name: t.grad for name, t in self.leaves.items() if t.requires_grad}


def compare(case, factors, frozen, ours, theirs, device="cpu"):
    """ours(problem) against theirs(problem in fp64), and what plain torch reaches in the case's dtype."""
    problems = [Problem(case, factors, frozen, device, dtype) for dtype in (None, torch.float64, case.dtype)]
    outputs = [run(problem) for run, problem in zip((ours, theirs, theirs), problems, strict=True)]
    for got, truth in zip(*(o if isinstance(o, tuple) else (o,) for o in outputs[:2]), strict=True):
        scale = max(1.0, truth.abs().sum().item()) if truth.dim() == 0 else 1.0  # a sum of many terms
        assert_result(got / scale, truth / scale)
    found = [problem.gradients(o) for problem, o in zip(problems, outputs, strict=True)]
    for name, truth in found[1].items():
        assert found[0][name].dtype == problems[0].leaves[name].dtype
        assert_gradient(found[0][name].to(case.dtype), truth, found[2][name], f"d{name}")


@pytest.mark.parametrize(("case", "factors", "frozen"), CASES, ids=IDS)
def test_logprob(case, factors, frozen, target, small_tiles):
    require(target, case)
    asked = {f"return_{name}": True for name in case.outputs}
    compare(
        case, factors, frozen,
        lambda p: p.call(lambda h, w, y, b, **o: linear_logprob(h, w, y, b, **asked, **o), **case.workspace()),
        lambda p: p.call(lambda h, w, y, b, **o: linear_logprob_ref(h, w, y, b, **asked, **o)),
        target.device,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize(("case", "factors", "frozen"), CASES, ids=IDS)
def test_weighted_nll(case, factors, frozen, engine, target, small_tiles):
    require(target, case)
    if engine == "one_pass" and case.tight:
        case = replace(case, tight=False)
    labels = case.inputs()[2]
    token_weight = torch.randn(labels.shape, generator=torch.Generator().manual_seed(3)).double()
    token_weight = token_weight.to(target.device)
    compare(
        case, factors, frozen,
        lambda p: p.call(linear_weighted_nll, token_weight, engine=engine, z_loss=0.01, **case.workspace()),
        lambda p: p.call(linear_weighted_nll_ref, token_weight, z_loss=0.01),
        target.device,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_token_loss(engine):
    case = Case("", frozen=("weight",), bias=True)

    def truth(problem):
        logp = problem.call(linear_logprob_ref)
        return dft_loss(logp).masked_fill(problem.labels == -100, 0.0).sum()

    compare(case, FP32, (), lambda p: p.call(linear_token_loss, dft_loss, (), engine=engine), truth)


def test_gradcheck_fp64(small_tiles):
    torch.manual_seed(0)
    tensors = [torch.randn(n, d, dtype=torch.float64, requires_grad=True) for n, d in ((5, 4), (9, 4), (5, 2), (9, 2))]
    labels = torch.tensor([0, 8, -100, 3, 3])

    def op(hidden, weight, left, right):
        return linear_logprob(
            hidden, weight, labels, low_rank=(left, right), softcap=2.0, return_lse=True, return_entropy=True
        )

    assert torch.autograd.gradcheck(op, tensors)


def test_the_budget_does_not_change_the_result(small_tiles):
    results = []
    for workspace_mb in (0.05, 0.12, 64):
        problem = Problem(Case("", bias=True, frozen=("weight",)), FP32)
        results.append(problem.gradients(problem.call(linear_logprob, workspace_mb=workspace_mb)))
    for other in results[:-1]:
        for name, truth in results[-1].items():
            torch.testing.assert_close(other[name], truth, rtol=0, atol=3e-6 * truth.abs().max().item())


def test_leading_shape_ignored_rows_and_a_known_count():
    case = Case("", shape=(60, 72, 507))
    problem, flat = Problem(case, FP32), Problem(case, FP32)
    t = problem.leaves
    low_rank = (t["left"].view(5, 12, -1).transpose(0, 1), t["right"])
    hidden = t["hidden"].view(5, 12, -1).transpose(0, 1)
    labels = problem.labels.view(5, 12).t()
    count = int((labels != -100).sum()) + 3
    logp = linear_logprob(hidden, t["weight"], labels, low_rank=low_rank, num_active=count)
    got = problem.gradients(logp.t().reshape(-1))
    expected = flat.gradients(flat.call(linear_logprob))
    for name, truth in expected.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-4, atol=1e-5)
    ignored = Problem(case, FP32)
    ignored.labels = torch.full_like(ignored.labels, -100)
    assert all(not g.any() for g in ignored.gradients(ignored.call(linear_logprob)).values())


def test_autocast_casts_the_factors_too():
    problem = Problem(Case("", frozen=("weight",)), FP32)
    with torch.autocast("cpu", BF16):
        logp = problem.call(linear_logprob)
    assert logp.dtype == FP32
    gradients = problem.gradients(logp)
    assert all(g.dtype == FP32 and g.isfinite().all() and g.any() for g in gradients.values())


# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "big"), [("one_pass", 2), ("two_pass", 3)])
def test_a_frozen_weight_costs_no_product_of_its_own(engine, big, small_tiles):
    """Of 2NDV FLOP each: logits and dhidden, with two passes the logits once more; dW is never computed."""
    case = Case("", frozen=("weight",), ignored=0.0)
    n, d, v = case.shape
    problem = Problem(case, FP32)
    budget = {"workspace_mb": 0.02} if engine == "two_pass" else {}  # keeps no logits
    with use_backend("torch"), Products() as products:
        problem.gradients(problem.call(linear_weighted_nll, None, engine=engine, **budget))
    whole, small = n * d * v, n * 3 * v
    # dleft and dright, and the factors' product each time that there are logits.
    assert sum(math.prod(size) for size in products.sizes) == big * whole + (2 + big - 1) * small


N, D, V, R = 1024, 64, 24_000, 8


@pytest.mark.parametrize(("dtype", "factors"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=str)
def test_no_merged_weight_and_no_logits(dtype, factors):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).to(dtype).requires_grad_(), (torch.randn(V, D) * 0.1).to(dtype)
    left, right = (torch.randn(n, R).to(factors).requires_grad_() for n in (N, V))
    labels = torch.randint(0, V, (N,))
    budget = 5 << 20

    def step():
        logp = linear_logprob(hidden, weight, labels, low_rank=(left, right), workspace_mb=5)
        return torch.autograd.grad(logp.sum(), (hidden, left, right))

    returned = N * D * dtype.itemsize + (N + V) * R * factors.itemsize
    sums = (N * D if dtype != FP32 else 0) * 4 + ((N + V) * R * 4 if factors != FP32 else 0)
    bound = budget + returned + sums + 40 * 8 * N
    peak = peak_extra_bytes(step)
    assert peak <= bound, f"{peak / 2**20:.2f} MiB above {bound / 2**20:.2f}"
    assert bound < budget + 2 * V * D * dtype.itemsize + sums + returned
    assert bound < N * V * 4 / 4


# ---- mistakes --------------------------------------------------------------------------------------------------------


def forgotten_in_the_last_slice(out, left, right):
    last = not out.storage_offset() and right.storage_offset() // 3 + len(right) == 507
    out.copy_(0 * out if last else left @ right.t())


def rounded(out, left, right):
    out.copy_(left.bfloat16() @ right.bfloat16().t())


def transposed_rows(out, left, right):
    out.copy_(left.flip(0) @ right.t())


@pytest.mark.parametrize("mutant", [forgotten_in_the_last_slice, rounded, transposed_rows, lambda out, *_: out.zero_()])
def test_mutant_of_the_product_is_refused(mutant, small_tiles, monkeypatch):
    monkeypatch.setattr(engines, "low_rank_into", mutant)
    runs = [lambda p: p.call(linear_logprob, workspace_mb=0.06), lambda p: p.call(linear_logprob_ref)]
    with use_backend("torch"), pytest.raises(AssertionError):
        compare(Case("", tight=True), FP32, (), *runs)


@pytest.mark.parametrize("which", ["dleft_NR", "dright_VR"])
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_mutant_of_the_gradient_is_refused(which, engine, small_tiles, monkeypatch):
    """A block of rows or columns that adds nothing."""
    calls = leave_a_tile_out(monkeypatch, which, engines)
    case, budget = Case("", tight=True), {"workspace_mb": 0.06}
    runs = [
        lambda p: p.call(linear_weighted_nll, None, engine=engine, **budget),
        lambda p: p.call(linear_weighted_nll_ref, None),
    ]
    with use_backend("torch"), pytest.raises(AssertionError, match=which[:-3]):
        compare(case, FP32, (), *runs)
    assert len(calls) >= 2


HIDDEN, WEIGHT, LABELS = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
LEFT, RIGHT = torch.randn(6, 2), torch.randn(9, 2)
BAD = {
    "one tensor": (LEFT, {}, TypeError, r"low_rank must be a pair of tensors.*got Tensor"),
    "A in place of left": ((torch.randn(2, 4), RIGHT), {}, ValueError, r"left \(6, 'R'\) and right.*got \(2, 4\)"),
    "B transposed": ((LEFT, RIGHT.T), {}, ValueError, r"low_rank must have the shapes.*got \(6, 2\) and \(2, 9\)"),
    "two dtypes": ((LEFT, RIGHT.bfloat16()), {}, TypeError, r"one dtype, torch.float32 beside hidden.*bfloat16; cast"),
    "narrow factors": ((LEFT.bfloat16(), RIGHT.bfloat16()), {}, TypeError, r"torch.float32 beside hidden of"),
    "another device": ((LEFT, RIGHT.to("meta")), {}, ValueError, r"right must be on cpu like hidden, got meta"),
    "no workspace": ((LEFT, RIGHT), {"workspace_mb": 0}, ValueError, r"workspace_mb must be positive with low_rank"),
}  # fmt: skip


@pytest.mark.parametrize(("low_rank", "options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_refused_by_name(low_rank, options, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(HIDDEN, WEIGHT, LABELS, low_rank=low_rank, **options)
