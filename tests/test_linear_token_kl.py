# ruff: noqa: E501 (a table: one mistake a line)
"""``linear_token_kl`` against the full logits of both models in fp64: values, gradients, memory, refusals."""

from dataclasses import dataclass, field

import pytest
import torch

from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops import kl_engine, linear_logprob
from var_kernels.ops.kl import linear_token_kl
from var_kernels.reference import logits_ref

FP64, BF16 = torch.float64, torch.bfloat16
N, D, V, D_REF = 63, 72, 507, 40


def linear_token_kl_ref(
    hidden, weight, ref_hidden, ref_weight, bias, ref_bias, *, direction, dtype=FP64, options, ref_options
):
    """(N,) from full log-probs; tokens of probability 0 add nothing."""
    logp = logits_ref(hidden, weight, bias, dtype=dtype, **options).log_softmax(-1)
    logq = logits_ref(ref_hidden, ref_weight, ref_bias, dtype=dtype, **ref_options).log_softmax(-1)
    a, b = (logp, logq) if direction == "reverse" else (logq, logp)
    return torch.where(a.isneginf(), 0.0, a.exp() * (a - b).masked_fill(a.isneginf(), 0.0)).sum(-1)


SMALL = Case("")


@dataclass(frozen=True)
class KLCase:
    """One regime: the policy's ``Case``, and what the reference is. near: how far its logits lie from the policy's."""

    id: str
    policy: Case = SMALL
    ref_dtype: torch.dtype | None = None
    ref_bias: bool = False
    ref_options: dict = field(default_factory=dict)
    near: float | None = None
    workspace_mb: float | None = None

    def inputs(self, device):
        hidden, weight, labels, bias = self.policy.inputs(device)
        dtype = self.ref_dtype or self.policy.dtype
        ref = Case(
            "",
            dtype=dtype,
            shape=(*self.policy.shape[:1], D_REF, self.policy.shape[2]),
            bias=self.ref_bias,
            logits=self.policy.logits,
            offset=self.policy.offset,
        )
        ref_hidden, ref_weight, _, ref_bias = ref.inputs(device, seed=1)
        if self.near is not None:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight)
            ref_hidden, ref_weight = hidden, weight + self.near * noise
        return (
            hidden,
            weight,
            labels,
            bias,
            *(None if t is None else t.detach() for t in (ref_hidden, ref_weight, ref_bias)),
        )


CASES = [
    KLCase("plain"),
    KLCase("flat rows", Case("", logits=0.1)),
    KLCase("confident rows", Case("", logits=30.0)),
    KLCase("nearly equal models", near=1e-3),
    KLCase("ragged chunks", Case("", tight=True, bias=True), ref_bias=True),
    KLCase("rows split too", Case("", bias=True), ref_bias=True, workspace_mb=0.02),
    KLCase("softcap, scale, temperature", Case("", options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}, bias=True, tight=True), ref_options={"softcap": 3.0, "temperature": 1.5}),
    KLCase("every logit far below 0", Case("", bias=True, offset=-1e4), ref_bias=True),
    KLCase("frozen head", Case("", frozen=("weight",))),
    KLCase("frozen hidden", Case("", frozen=("hidden",), bias=True, tight=True)),
    KLCase("frozen weight, bias learns", Case("", frozen=("weight",), bias=True)),
    KLCase("one row", Case("", shape=(1, D, V), ignored=0.0)),
    KLCase("tiny vocabulary", Case("", shape=(17, 5, 3), bias=True)),
    KLCase("fp64, ragged", Case("", dtype=FP64, bias=True, tight=True, options={"softcap": 5.0}), ref_bias=True),
    KLCase("bf16", Case("", dtype=BF16, bias=True)),
    KLCase("bf16, ragged", Case("", dtype=BF16, tight=True)),
    KLCase("fp32 policy, bf16 reference", ref_dtype=BF16),
    KLCase("fp16", Case("", dtype=torch.float16)),
]  # fmt: skip


def run_case(case, direction, engine, device):
    policy = case.policy
    hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias = case.inputs(device)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(labels.shape, generator=generator, dtype=FP64).to(device)
    prefixed = {f"ref_{name}": value for name, value in case.ref_options.items()}
    common = {**policy.options, **prefixed, "direction": direction}
    workspace = {"workspace_mb": 0.15 if policy.dtype == FP64 else 0.08} if policy.tight else {}
    inputs = (hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias)
    workspace = workspace if case.workspace_mb is None else {"workspace_mb": case.workspace_mb}
    wide = upstream.to(torch.float64 if policy.dtype == FP64 else torch.float32)
    if engine == "two_pass":
        kl = linear_token_kl(*inputs, **common, **workspace)
        (kl * wide).sum().backward()
    else:
        if policy.tight and policy.dtype == BF16:
            workspace = {"workspace_mb": 0.3}  # and an fp32 dW
        kl = linear_token_kl(*inputs, token_weight=wide, reduction="sum", engine="one_pass", **common, **workspace)
        kl.backward()

    def reference(dtype):
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (hidden, weight, bias)
        ]
        constants = [None if t is None else t.to(dtype) for t in (ref_hidden, ref_weight, ref_bias)]
        values = linear_token_kl_ref(
            *leaves[:2],
            *constants[:2],
            leaves[2],
            constants[2],
            direction=direction,
            dtype=dtype,
            options=policy.options,
            ref_options=case.ref_options,
        )
        values = values.where(labels != -100, 0.0)
        weighted = values * upstream.to(dtype)
        weighted.sum().backward()
        return (values if engine == "two_pass" else weighted.sum()), leaves

    truth, truth_leaves = reference(FP64)
    _, own_leaves = reference(policy.dtype)
    scale = 1.0 if engine == "two_pass" else upstream.abs().sum().item()
    assert_result(kl / scale, truth / scale, "KL", policy.largest_logit)
    for name, leaf, expected, own in zip(
        ("dhidden", "dweight", "dbias"), (hidden, weight, bias), truth_leaves, own_leaves, strict=True
    ):
        if leaf is not None and leaf.requires_grad:
            assert_gradient(leaf.grad, expected.grad, own.grad, name)


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_the_full_logits(case, direction, engine, device, small_tiles):
    run_case(case, direction, engine, device)


def test_by_hand():
    """Two tokens: p = (1/2, 1/2), q = (3/4, 1/4)."""
    hidden, weight = torch.ones(1, 1, dtype=FP64), torch.zeros(2, 1, dtype=FP64)
    ref_weight = torch.tensor([[3.0], [1.0]], dtype=FP64).log()
    half, three = torch.tensor(0.5, dtype=FP64).log(), torch.tensor([0.75, 0.25], dtype=FP64)
    reverse = linear_token_kl(hidden, weight, hidden, ref_weight)
    assert reverse.item() == pytest.approx((0.5 * (half - three.log())).sum().item(), rel=1e-12)
    forward = linear_token_kl(hidden, weight, hidden, ref_weight, direction="forward")
    assert forward.item() == pytest.approx((three * (three.log() - half)).sum().item(), rel=1e-12)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, ref_hidden, ref_weight = (
        torch.randn(shape, generator=generator, dtype=FP64) for shape in ((3, 4), (7, 4), (7,), (3, 2), (7, 2))
    )
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    token_weight = torch.randn(3, generator=generator, dtype=FP64).requires_grad_()

    def kl(hidden, weight, bias):
        return linear_token_kl(hidden, weight, ref_hidden, ref_weight, None, bias, direction=direction, softcap=4.0)

    def weighted(hidden, weight, bias, token_weight):
        return linear_token_kl(
            hidden, weight, ref_hidden, ref_weight, None, bias, direction=direction, token_weight=token_weight, reduction="sum"
        )  # fmt: skip

    assert torch.autograd.gradcheck(kl, leaves)
    assert torch.autograd.gradcheck(weighted, (*leaves, token_weight))


def inputs(dtype=torch.float32):
    hidden, weight, labels, _, ref_hidden, ref_weight, _ = KLCase("", Case("", dtype=dtype)).inputs("cpu")
    return hidden, weight, ref_hidden, ref_weight, labels


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_model_lies_at_0_from_itself(direction, small_tiles):
    hidden, weight, *_ = inputs()
    for workspace in (0.08, None):
        kl = linear_token_kl(hidden, weight, hidden, weight, direction=direction, workspace_mb=workspace)
        assert kl.count_nonzero() == 0
        kl.sum().backward()
        assert hidden.grad.abs().max() < 1e-5
        hidden.grad = weight.grad = None


def test_gradients_of_the_two_directions_and_the_cross_entropy():
    """KL(q||p) for a q that is certain of one token is that token's negative log-prob."""
    hidden, weight, _, _, labels = inputs(FP64)
    labels = labels.clamp(min=0)
    ref_weight = torch.eye(V, dtype=FP64) * 1e4
    certain = torch.nn.functional.one_hot(labels, V).double()
    kl = linear_token_kl(hidden, weight, certain, ref_weight, direction="forward")
    logp = linear_logprob(hidden, weight, labels)
    torch.testing.assert_close(kl, -logp)
    got = torch.autograd.grad(kl.sum(), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(-logp.sum(), (hidden, weight)))


def test_forbidden_tokens():
    hidden, weight, ref_hidden, ref_weight, labels = inputs(FP64)
    forbids = torch.zeros(V, dtype=FP64)
    forbids[100:] = -torch.inf
    both = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, forbids, forbids)
    fewer = linear_token_kl(hidden, weight[:100], ref_hidden, ref_weight[:100], labels != -100)
    torch.testing.assert_close(both, fewer)
    gradient = torch.autograd.grad(both.sum(), hidden)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(fewer.sum(), hidden)[0])
    kept = labels != -100
    assert linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, None, forbids)[kept].isposinf().all()
    assert linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, forbids)[kept].isfinite().all()


def test_rows_by_labels_mask_or_none():
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    kept = labels != -100
    whole = linear_token_kl(hidden, weight, ref_hidden, ref_weight)
    by_labels = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    by_mask = linear_token_kl(hidden, weight, ref_hidden, ref_weight, kept)
    assert torch.equal(by_labels, by_mask)
    assert by_labels[~kept].count_nonzero() == 0
    torch.testing.assert_close(by_labels[kept], whole[kept])
    padded = linear_token_kl(hidden.view(7, 9, D), weight, ref_hidden.view(7, 9, D_REF), ref_weight, labels.view(7, 9))
    assert torch.equal(padded.view(-1), by_labels)
    # what does not count may hold anything, in either model
    broken, ref_broken = hidden.detach().clone(), ref_hidden.clone()
    broken[~kept] = ref_broken[~kept] = torch.nan
    assert torch.equal(linear_token_kl(broken, weight, ref_broken, ref_weight, labels), by_labels)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_nothing_counts(reduction):
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, torch.full_like(labels, -100), reduction=reduction)
    assert kl.count_nonzero() == 0
    kl.sum().backward()
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_the_reference_is_a_constant():
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    ref_hidden.requires_grad_()
    ref_weight.requires_grad_()
    linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels).sum().backward()
    assert ref_hidden.grad is None
    assert ref_weight.grad is None


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained head", "frozen head"])
def test_backward_twice(frozen):
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    weight.requires_grad_("weight" not in frozen)
    kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels).sum()
    kl.backward(retain_graph=True)
    first = hidden.grad.clone()
    kl.backward()
    torch.testing.assert_close(hidden.grad, 2 * first)


def test_a_frozen_head_recomputes_nothing(monkeypatch):
    calls = []
    original = kl_engine.logits_into
    monkeypatch.setattr(kl_engine, "logits_into", lambda *a: (calls.append(1), original(*a)))
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    linear_token_kl(hidden, weight.detach(), ref_hidden, ref_weight, labels).sum().backward()
    assert len(calls) == 2


def test_strided_inputs_and_upstream():
    hidden, weight, ref_hidden, ref_weight, labels = inputs(FP64)
    expected = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    weights = torch.linspace(-1, 1, 2 * N, dtype=FP64)[::2]
    want = torch.autograd.grad(expected, (hidden, weight), weights.contiguous())
    strided = [torch.stack([t.detach(), t.detach()], -1)[..., 0] for t in (hidden, weight, ref_hidden, ref_weight)]
    leaves = [t.requires_grad_() for t in strided[:2]]
    kl = linear_token_kl(*strided, labels)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(torch.autograd.grad(kl, leaves, weights), want)


def test_without_gradients():
    args = inputs()
    expected = linear_token_kl(*args)
    with torch.inference_mode():
        got = linear_token_kl(*args)
        total = linear_token_kl(*args, reduction="sum")
    assert not got.requires_grad
    assert torch.equal(got, expected.detach())
    assert_result(total, got.sum())


def test_autocast():
    hidden, weight, ref_hidden, ref_weight, labels = inputs()
    rounded = [t.detach().bfloat16() for t in (hidden, weight, ref_hidden, ref_weight)]
    with torch.autocast("cpu", torch.bfloat16):
        kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    assert torch.equal(kl.detach(), linear_token_kl(*rounded, labels))
    kl.sum().backward()
    assert hidden.grad.dtype == torch.float32


def test_fast_precision():
    hidden, weight, ref_hidden, ref_weight, labels = inputs(BF16)
    fine = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
    fast = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, precision="fast")
    assert fast.dtype == torch.float32
    assert 0 < (fine - fast).abs().max() < 0.2
    fast.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.slow
def test_compiled_breaks_the_graph_and_agrees():
    args = inputs()
    compiled = torch.compile(lambda *a: 2 * linear_token_kl(*a), backend="eager")
    assert torch.equal(compiled(*args), 2 * linear_token_kl(*args))


# ---- memory ----------------------------------------------------------------------------------------------------------

BIG_N, BIG_D, BIG_V, WORKSPACE_MB = 256, 32, 12_000, 4
ROW_VECTORS = 40 * 8 * BIG_N


def big(dtype):
    torch.manual_seed(0)
    tensors = [
        torch.randn(BIG_N, BIG_D),
        torch.randn(BIG_V, BIG_D),
        torch.randn(BIG_N, BIG_D),
        torch.randn(BIG_V, BIG_D),
    ]
    hidden, weight, ref_hidden, ref_weight = (t.to(dtype) for t in tensors)
    return hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight


def step(name, args):
    if name == "forward":
        with torch.no_grad():
            return linear_token_kl(*args, workspace_mb=WORKSPACE_MB)
    if name == "two passes":
        total = linear_token_kl(*args, workspace_mb=WORKSPACE_MB).sum()
    else:
        budget = WORKSPACE_MB + (BIG_V * BIG_D * 4 / 2**20 if args[1].dtype == BF16 else 0)
        total = linear_token_kl(*args, workspace_mb=budget, reduction="sum", engine="one_pass")
    return torch.autograd.grad(total, args[:2])


def bound(name, dtype):
    gradients, wide = (BIG_N + BIG_V) * BIG_D * dtype.itemsize, dtype == BF16
    extra = {
        "forward": 0,
        "two passes": gradients + wide * BIG_N * BIG_D * 4,
        "one pass": gradients + wide * BIG_V * BIG_D * 4,
    }
    return (WORKSPACE_MB << 20) + extra[name] + ROW_VECTORS


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", ["forward", "two passes", "one pass"])
def test_peak_is_bounded(name, dtype):
    args = big(dtype)
    peak = peak_extra_bytes(lambda: step(name, args))
    assert peak <= bound(name, dtype), f"{peak / 2**20:.1f} MiB above {bound(name, dtype) / 2**20:.1f}"
    assert bound(name, dtype) < 2 * BIG_N * BIG_V * 4 / 3, "the bound would not notice the logits"


def test_the_bound_notices_materialised_logits(monkeypatch):
    original = kl_engine.plan_forward
    monkeypatch.setattr(kl_engine, "plan_forward", lambda n, v, budget, cost: original(n, v, 1 << 40, cost))
    assert peak_extra_bytes(lambda: step("forward", big(torch.float32))) > bound("forward", torch.float32)


# ---- refusals --------------------------------------------------------------------------------------------------------

H, W, RH, RW, LABELS = torch.randn(6, 4), torch.randn(9, 4), torch.randn(6, 3), torch.randn(9, 3), torch.arange(6)


def call(h=H, w=W, rh=RH, rw=RW, labels=LABELS, *rest, **options):
    return linear_token_kl(h, w, rh, rw, labels, *rest, **options)


BAD = {
    "direction": (lambda: call(direction="jensen"), ValueError, "direction must be one of 'reverse', 'forward', got 'jensen'"),
    "reduction": (lambda: call(reduction="mean"), ValueError, "reduction must be one of 'none', 'sum'"),
    "one pass, no scalar": (lambda: call(engine="one_pass"), ValueError, "engine='one_pass' needs one scalar"),
    "another vocabulary": (lambda: call(rw=torch.randn(8, 3)), ValueError, r"ref_lm_head_weight must have shape \(9, D_ref\).*one tokenizer"),
    "another number of rows": (lambda: call(rh=torch.randn(5, 3)), ValueError, r"ref_hidden must have shape \(6, 3\).*got \(5, 3\)"),
    "another width": (lambda: call(rh=torch.randn(6, 4)), ValueError, r"ref_hidden must have shape \(6, 3\)"),
    "ref_bias": (lambda: call(H, W, RH, RW, LABELS, None, torch.zeros(8)), ValueError, r"ref_bias must have shape \(9,\)"),
    "mixed reference": (lambda: call(rw=RW.bfloat16()), TypeError, "ref_lm_head_weight is torch.bfloat16 but ref_hidden is torch.float32.*autocast"),
    "mixed policy": (lambda: call(w=W.bfloat16()), TypeError, "lm_head_weight is torch.bfloat16 but hidden"),
    "reference of integers": (lambda: call(rh=RH.long()), TypeError, "ref_hidden must be a floating-point tensor, got torch.int64"),
    "no reference": (lambda: call(rw=None), TypeError, "ref_lm_head_weight must be a floating-point tensor, got NoneType"),
    "another device": (lambda: call(rw=RW.to("meta")), ValueError, "ref_lm_head_weight is on meta but hidden is on cpu"),
    "labels of tokens": (lambda: call(labels=LABELS[1:]), ValueError, r"labels must have shape \(6,\).*nothing is shifted"),
    "several targets": (lambda: call(labels=LABELS.unsqueeze(1)), ValueError, r"labels must have shape \(6,\)"),
    "a float mask": (lambda: call(labels=torch.ones(6)), TypeError, "labels must be int64 or int32"),
    "ref_temperature": (lambda: call(ref_temperature=0.0), ValueError, "temperature must be positive"),
    "weight a sequence": (lambda: call(token_weight=torch.ones(2)), ValueError, r"token_weight must have the shape of labels, \(6,\)"),
    "too small": (lambda: linear_token_kl(*(torch.randn(s) for s in ((6, 4), (30_000, 4), (6, 4), (30_000, 4))), workspace_mb=1e-4), ValueError, "workspace_mb=.* is too small for the forward pass"),
}  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "message"), BAD.values(), ids=BAD.keys())
def test_refused_by_name(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()
