"""var_loss and its parts: against the naive twin, padded against packed, accumulated, autograd, refusals."""

import math
from itertools import pairwise

import pytest
import torch
from torch._subclasses import FakeTensorMode

from var_kernels import VARLoss, linear_logprob, var_loss, var_weights
from var_kernels.losses import sequence_lengths, sequence_sum, weighted_sequence_nll
from var_kernels.reference import linear_logprob_ref, var_loss_ref

pytestmark = pytest.mark.filterwarnings("ignore::var_kernels.losses.CollapsedWeightsWarning")

FP32 = 2**-17  # the house's tiers: fp32 results, and gradients of fp32 inputs
BF16 = 2**-8
B, T, D, V = 7, 9, 72, 507
SETTINGS = {"lam": 0.4, "normalizer": "batch_mean", "reference": "sum"}


class Batch:
    """Odd sizes, ragged lengths, prompt and padding ignored, the last sequence without a token that carries loss."""

    def __init__(self, dtype=torch.float32, seed=0, b=B, t=T, d=D, v=V):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(b, t, d, generator=generator, dtype=torch.float64).to(dtype)
        self.lm_head_weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) / d**0.5).to(dtype)
        self.bias = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(0, v, (b, t), generator=generator)
        start = torch.randint(0, 3, (b,), generator=generator)
        end = torch.randint(4, t + 1, (b,), generator=generator)
        end[-1] = 0
        position = torch.arange(t)
        self.labels[(position < start[:, None]) | (position >= end[:, None])] = -100
        small = dtype if dtype == torch.float64 else torch.float32
        self.rewards = torch.rand(b, generator=generator, dtype=torch.float64).to(small)
        self.ref_logp = (-6 + torch.randn(b, generator=generator, dtype=torch.float64)).to(small)
        self.group_ids = torch.arange(b) // 3
        for name in ("hidden", "lm_head_weight", "bias"):
            getattr(self, name).requires_grad_()

    @property
    def inputs(self):
        return self.hidden, self.lm_head_weight, self.bias

    def loss(self, **options):
        return var_loss(
            self.hidden, self.lm_head_weight, self.labels, self.rewards, self.ref_logp, self.bias,
            **{**SETTINGS, **options},
        )  # fmt: skip

    def twin(self, token_reduction="sum", head=None, **weight_options):
        return var_loss_ref(
            self.hidden, self.lm_head_weight, self.labels, self.rewards, self.ref_logp, self.bias,
            token_reduction=token_reduction,
            weight_options={**SETTINGS, **weight_options},
            **(head or {}),
        )  # fmt: skip


def rms(values):
    return values.double().square().mean().sqrt().item()


def assert_matches(batch, loss, want, gradient_tolerance):
    assert abs(loss.item() - want.item()) <= FP32 * max(1.0, abs(want.item()))
    got = torch.autograd.grad(loss, batch.inputs)
    expected = torch.autograd.grad(want, batch.inputs)
    for g, e in zip(got, expected, strict=True):
        assert rms(g.double() - e.double()) <= gradient_tolerance * rms(e)


CASES = {  # what var_loss gets, what the twin gets
    "defaults": ({}, {}),
    "length-normalised": (dict(token_reduction="mean"), dict(token_reduction="mean")),
    "softcap, scale, temperature": (
        dict(softcap=5.0, logit_scale=0.7, temperature=1.3),
        dict(head=dict(softcap=5.0, logit_scale=0.7, temperature=1.3)),
    ),
    "two passes, little workspace": (dict(engine="two_pass", workspace_mb=0.5), {}),
    "per-token mean reference": (dict(reference="mean"), dict(reference="mean")),
    "no reference": (dict(reference="none"), dict(reference="none")),
    "batch": (dict(normalizer="batch"), dict(normalizer="batch")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_to_the_naive_twin(case, dtype):
    options, twin = CASES[case]
    batch = Batch(dtype)
    assert_matches(batch, batch.loss(**options), batch.twin(**twin), FP32 if dtype == torch.float32 else 1e-12)


def test_groups_equal_to_the_naive_twin():
    batch = Batch()
    for normalizer in ("group", "self_normalised"):
        reference = "sum" if normalizer == "group" else "none"
        options = dict(normalizer=normalizer, reference=reference, group_ids=batch.group_ids)
        assert_matches(batch, batch.loss(**options), batch.twin(**options), FP32)


@pytest.mark.parametrize("t", [T, B], ids=["T > B", "T = B"])
def test_cross_equal_to_the_naive_twin(t):
    batch = Batch(t=t)  # with T = B the (B, B) scores have the shape of the labels
    batch.ref_logp = -6 + torch.randn(B, B, generator=torch.Generator().manual_seed(3))
    assert_matches(batch, batch.loss(normalizer="cross"), batch.twin(normalizer="cross"), FP32)


def test_bf16_equal_to_the_naive_twin():
    batch = Batch(torch.bfloat16)
    assert_matches(batch, batch.loss(), batch.twin(), BF16)


def test_by_hand():
    # two one-token responses; all logits equal, so each log-prob is -log 4; weights 1/4 and 3/4 of the batch
    hidden, lm_head_weight = torch.ones(2, 1, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    labels = torch.tensor([[0], [3]])
    rewards = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    loss = var_loss(hidden, lm_head_weight, labels, rewards, lam=1.0, normalizer="batch", reference="none")
    assert loss.item() == pytest.approx(math.log(4))
    # two tokens for the first response: it counts twice in the sum, once in the mean
    hidden, labels = torch.ones(2, 2, 3, dtype=torch.float64), torch.tensor([[0, 1], [3, -100]])
    options = dict(lam=1.0, normalizer="batch", reference="none")
    loss = var_loss(hidden, lm_head_weight, labels, rewards, **options)
    assert loss.item() == pytest.approx((2 / 4 + 3 / 4) * math.log(4))
    loss = var_loss(hidden, lm_head_weight, labels, rewards, token_reduction="mean", **options)
    assert loss.item() == pytest.approx(math.log(4))


def test_equal_rewards_without_reference_are_sft():
    batch = Batch(torch.float64)
    batch.rewards = torch.full((B,), 0.3, dtype=torch.float64)
    logp = linear_logprob(batch.hidden, batch.lm_head_weight, batch.labels, batch.bias)
    assert batch.loss(reference="none").item() == pytest.approx(-logp.sum().item(), rel=1e-12)


def test_infinite_lam_is_sft_and_tiny_lam_the_best_response():
    batch = Batch(torch.float64)
    batch.rewards[-1] = 100.0  # the sequence without tokens is no candidate, whatever its reward
    logp = linear_logprob(batch.hidden, batch.lm_head_weight, batch.labels, batch.bias).sum(-1)
    loss = batch.loss(reference="none", lam=1e12)
    assert loss.item() == pytest.approx(-logp.sum().item(), rel=1e-9)
    loss = batch.loss(normalizer="batch", reference="none", lam=1e-6)
    assert loss.item() == pytest.approx(-logp[batch.rewards[:-1].argmax()].item(), rel=1e-12)


def test_gradcheck():
    batch = Batch(torch.float64, b=3, t=4, d=5, v=11)

    def loss(hidden, lm_head_weight, bias):
        return var_loss(hidden, lm_head_weight, batch.labels, batch.rewards, batch.ref_logp, bias, **SETTINGS)

    assert torch.autograd.gradcheck(loss, batch.inputs)


def test_rewards_and_reference_get_no_gradient():
    batch = Batch()
    batch.rewards.requires_grad_()
    batch.ref_logp.requires_grad_()
    batch.loss().backward()
    assert batch.rewards.grad is None
    assert batch.ref_logp.grad is None
    assert batch.hidden.grad.abs().sum() > 0


def pack(batch):
    """Each sequence's kept rows behind one ignored row: hidden (N, D), labels (N,), cu_seqlens (B + 1,)."""
    rows, lengths = [], []
    for i in range(B):
        kept = (batch.labels[i] != -100).nonzero().flatten().tolist()
        ignored = (batch.labels[i] == -100).nonzero().flatten().tolist()[:1]
        rows += [(i, t) for t in ignored + kept]
        lengths.append(len(ignored + kept))
    index = torch.tensor(rows).T
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return batch.hidden[index[0], index[1]], batch.labels[index[0], index[1]], cu_seqlens


@pytest.mark.parametrize("token_reduction", ["sum", "mean"])
@pytest.mark.parametrize("reference", ["sum", "mean"])
def test_packed_equals_padded(token_reduction, reference):
    batch = Batch(torch.float64)
    options = dict(lam=0.4, reference=reference, token_reduction=token_reduction, normalizer="batch_mean")
    want = batch.loss(**options)
    hidden, labels, cu_seqlens = pack(batch)
    for layout in ((hidden, labels), (hidden.unsqueeze(0), labels.unsqueeze(0))):
        got = var_loss(
            layout[0], batch.lm_head_weight, layout[1], batch.rewards, batch.ref_logp, batch.bias,
            cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for g, w in zip(
            torch.autograd.grad(got, batch.inputs, retain_graph=True),
            torch.autograd.grad(want, batch.inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_reference_per_token_equals_its_sum():
    batch = Batch(torch.float64)
    token_logp = -torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    per_token = token_logp.masked_fill(batch.labels == -100, float("nan"))  # what is ignored may hold anything
    batch.ref_logp = per_token
    got = batch.loss()
    batch.ref_logp = token_logp.masked_fill(batch.labels == -100, 0.0).sum(-1)
    torch.testing.assert_close(got, batch.loss())
    _, labels, cu_seqlens = pack(batch)
    packed = torch.arange(labels.numel(), dtype=torch.float64)
    want = torch.stack([packed[a:b][labels[a:b] != -100].sum() for a, b in pairwise(cu_seqlens)])
    torch.testing.assert_close(sequence_sum(packed, labels, cu_seqlens=cu_seqlens), want)
    torch.testing.assert_close(sequence_lengths(labels, cu_seqlens=cu_seqlens), (batch.labels != -100).sum(-1))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_sum_gradcheck(packed):
    values = torch.randn(6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, -100, 2, 3, -100, 4])
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32) if packed else None
    shape = (6,) if packed else (2, 3)

    def total(v):
        return sequence_sum(v.view(shape), labels.view(shape), cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(total, values)
    assert total(values).shape == (3 if packed else 2,)


def test_lists_in_place_of_tensors_are_refused_by_name():
    batch = Batch(torch.float32)
    with pytest.raises(TypeError, match=r"cu_seqlens must be a tensor \(B \+ 1,\), got list"):
        sequence_sum(torch.zeros(6), cu_seqlens=[0, 2, 6])
    with pytest.raises(TypeError, match=r"ref_logp must be a floating-point tensor .*, got list"):
        var_loss(batch.hidden, batch.lm_head_weight, batch.labels, batch.rewards, batch.ref_logp.tolist(), **SETTINGS)
    rows = (batch.hidden, batch.lm_head_weight, batch.labels)
    with pytest.raises(TypeError, match=r"labels must be a torch.Tensor, got list"):
        var_loss(*rows[:2], batch.labels.tolist(), batch.rewards, lam=1.0)
    with pytest.raises(TypeError, match=r"lengths must be a torch.Tensor, got list"):
        var_loss(*rows, batch.rewards, lam=1.0, lengths=[2] * len(batch.rewards))
    with pytest.raises(TypeError, match=r"sample_weight must be a torch.Tensor, got list"):
        weighted_sequence_nll(*rows, batch.rewards.tolist())
    with pytest.raises(TypeError, match=r"labels must be a torch.Tensor, got list"):
        sequence_lengths([[1, 2]])


def test_sequence_sum_keeps_its_digits():
    values = torch.full((100_000,), -0.1)  # fp32 alone, added one by one, is off by more than a nat
    cu_seqlens = torch.tensor([0, 100_000], dtype=torch.int32)
    want = 100_000 * torch.tensor(-0.1).double().item()
    assert sequence_sum(values, cu_seqlens=cu_seqlens).item() == pytest.approx(want, rel=2**-23)
    assert sequence_sum(values.unsqueeze(0)).item() == pytest.approx(want, rel=2**-23)


def test_accumulated_micro_batches_equal_the_whole_batch():
    batch = Batch(torch.float64)
    want = torch.autograd.grad(batch.loss(), batch.inputs)
    lengths = sequence_lengths(batch.labels)
    weights = var_weights(batch.rewards, batch.ref_logp, lengths=lengths, **SETTINGS)
    for rows in (slice(0, 2), slice(2, 3), slice(3, B)):
        weighted_sequence_nll(
            batch.hidden[rows], batch.lm_head_weight, batch.labels[rows], weights.weight[rows], batch.bias
        ).backward()
    for tensor, gradient in zip(batch.inputs, want, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_normaliser_per_micro_batch_is_another_objective():
    batch = Batch(torch.float64)
    whole = batch.loss(normalizer="batch")
    parts = sum(
        var_loss(
            batch.hidden[rows], batch.lm_head_weight, batch.labels[rows], batch.rewards[rows], batch.ref_logp[rows],
            batch.bias, lam=0.4, normalizer="batch", reference="sum",
        )
        for rows in (slice(0, 3), slice(3, B))
    )  # fmt: skip
    assert abs(parts.item() - whole.item()) > 0.1 * abs(whole.item())


def test_stats():
    batch = Batch(torch.float64)
    stats = batch.loss(return_stats=True)
    torch.testing.assert_close(stats.loss, batch.loss())
    logp = linear_logprob_ref(batch.hidden, batch.lm_head_weight, batch.labels, batch.bias).sum(-1)
    torch.testing.assert_close(stats.logp[:-1], logp[:-1].detach())
    assert not stats.logp.requires_grad
    assert stats.logp[-1].isnan()  # weight 0: never computed
    torch.testing.assert_close(-(stats.weights.weight * stats.logp)[:-1].sum(), stats.loss.detach())
    assert stats.loss.requires_grad


def test_module_equals_function():
    batch = Batch()
    options = dict(lam=0.4, normalizer="group", reference="mean", token_reduction="mean", softcap=5.0, z_loss=1e-3)
    module = VARLoss(**options)
    arguments = (batch.hidden, batch.lm_head_weight, batch.labels, batch.rewards, batch.ref_logp, batch.bias)
    got = module(*arguments, group_ids=batch.group_ids)
    assert torch.equal(got, var_loss(*arguments, group_ids=batch.group_ids, **options))
    assert "lam=0.4, normalizer='group', reference='mean'" in repr(module)
    assert not list(module.parameters())
    assert not module.state_dict()


LAYOUTS = {
    "batch": {},
    "one sequence": {"rows": 1},
    "groups": {"normalizer": "group", "reference": None, "ref_logp": None, "grouped": True},
    "means": {"reference": "mean", "token_reduction": "mean"},
    "packed": {"packed": True},
}


@pytest.fixture(params=LAYOUTS)
def of_layout(request):
    """(hidden, weight) -> loss, and that hidden."""
    options = {**SETTINGS, **LAYOUTS[request.param]}
    batch, rows = Batch(), options.pop("rows", B)
    labels, rewards = batch.labels[:rows], batch.rewards[:rows]
    ref_logp = options.pop("ref_logp", batch.ref_logp[:rows])
    if options.pop("grouped", False):
        options["group_ids"] = batch.group_ids[:rows]
    hidden = batch.hidden.detach()[:rows].requires_grad_()
    packed = options.pop("packed", False)
    if packed:
        labels, options["cu_seqlens"] = labels.flatten(), torch.arange(rows + 1) * T

    def loss(hidden, weight):
        return var_loss(hidden.flatten(0, 1) if packed else hidden, weight, labels, rewards, ref_logp, **options)

    return loss, hidden, batch.lm_head_weight


@pytest.mark.filterwarnings("ignore::var_kernels.losses.IgnoredRewardsWarning")
def test_compiled_in_one_graph(of_layout):
    loss, *leaves = of_layout
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    pairs = zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)), strict=True)
    for got, eager in pairs:
        torch.testing.assert_close(got, eager)


def test_shapes_without_values():
    with FakeTensorMode():
        batch = Batch()
        batch.loss().backward()
        assert batch.lm_head_weight.grad.shape == (V, D)
        cu_seqlens = torch.arange(B + 1) * T
        packed = (batch.hidden.flatten(0, 1), batch.lm_head_weight, batch.labels.flatten(), batch.rewards)
        assert var_loss(*packed, lam=1.0, cu_seqlens=cu_seqlens).shape == ()


def test_all_ignored_batch_gives_a_differentiable_zero():
    batch = Batch()
    batch.labels.fill_(-100)
    loss = batch.loss()
    loss.backward()
    assert loss.item() == 0
    assert batch.lm_head_weight.grad.abs().sum() == 0


def test_ignore_index_can_be_another():
    batch = Batch()
    want = batch.loss(token_reduction="mean", reference="mean")
    batch.labels = batch.labels.masked_fill(batch.labels == -100, -1)
    assert torch.equal(batch.loss(token_reduction="mean", reference="mean", ignore_index=-1), want)


REFUSED = {  # what is changed on the batch, options, error, words of the message
    "labels not aligned": (dict(labels=lambda b: b.labels[:, 1:]), {}, ValueError, r"hidden\[:, :-1\]"),
    "rewards too few": (dict(rewards=lambda b: b.rewards[1:]), {}, ValueError, "one per sequence"),
    "rewards (B, K)": (dict(rewards=lambda b: b.rewards.view(1, B)), {}, ValueError, "group_ids"),
    "rewards a list": (dict(rewards=lambda b: b.rewards.tolist()), {}, ValueError, "got list"),
    "flat labels without cu_seqlens": (
        dict(labels=lambda b: b.labels.flatten(), hidden=lambda b: b.hidden.flatten(0, 1)), {}, ValueError, "cu_seq",
    ),
    "cu_seqlens floating": ({}, dict(cu_seqlens=torch.zeros(B + 1)), ValueError, "int32 or int64"),
    "cu_seqlens too short": (
        {}, dict(cu_seqlens=torch.arange(B + 1)), ValueError, f"must increase from 0 to the number of rows, {B * T}",
    ),
    "cu_seqlens falling": ({}, dict(cu_seqlens=torch.tensor([0, 9, 5, B * T])), ValueError, "must increase"),
    "unknown token_reduction": ({}, dict(token_reduction="none"), ValueError, "token_reduction must be"),
    "unknown option": ({}, dict(soft_cap=3.0), TypeError, "options of the head must be among .*softcap.* got soft_cap"),
    "option of the op that breaks the loss": ({}, dict(reduction="mean"), TypeError, "options .* got reduction"),
    "no reference": (dict(ref_logp=lambda b: None), {}, ValueError, "ref_logp must be given"),
    "NaN reward": (
        dict(rewards=lambda b: b.rewards.index_fill(0, torch.tensor(2), math.nan)), {}, ValueError, r"\(2,\)",
    ),
    "lam": ({}, dict(lam=0.0), ValueError, "lam must be > 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_and_the_remedy(case):
    changes, options, error, message = REFUSED[case]
    batch = Batch()
    for name, change in changes.items():
        setattr(batch, name, change(batch))
    with pytest.raises(error, match=message):
        batch.loss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lam=-1.0), "lam must be > 0"),
        (dict(lam=1.0, normalizer="self_normalised", reference="sum"), "must be 'none'"),
        (dict(lam=1.0, token_reduction="max"), "token_reduction"),
        (dict(lam=1.0, workspace=3), "options of the head must be among .* got workspace"),
    ],
)
def test_module_refuses_at_construction(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VARLoss(**options)


def test_sample_weight_of_another_size_is_refused():
    batch = Batch()
    with pytest.raises(ValueError, match="sample_weight must be"):
        weighted_sequence_nll(batch.hidden, batch.lm_head_weight, batch.labels, torch.ones(B - 1))
    with pytest.raises(ValueError, match="for packed rows pass cu_seqlens"):
        sequence_sum(torch.zeros(5))
    with pytest.raises(ValueError, match="align them"):
        sequence_sum(torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int64))
