"""What stands at a position that carries no loss does not matter, whatever it is: NaN or infinite hidden states, token
weights, advantages, log-probs of other policies, and upstream gradients change no bit of any result or gradient."""

import pytest
import torch
import torch._dynamo

from tests.test_linear_loss import NAMES, ONE_PASS, gradients, naive, problem
from tests.tolerance import assert_result
from var_kernels import linear_logprob, linear_loss, linear_token_kl, linear_token_loss, linear_weighted_nll
from var_kernels.losses import LOSSES, grpo_loss, token_objective, weighted_sequence_nll
from var_kernels.ops.ava_literal import linear_prob_lse
from var_kernels.reference import linear_logprob_ref

N, D, V, D_REF = 37, 24, 131, 16
POISON = (0.0, torch.nan, -torch.inf)
by_name = pytest.mark.parametrize("poison", POISON[1:], ids=str)


class Tokens:
    """Leaves, labels, and tensors of one value or row a token: ``poison`` where the label is ignored."""

    def __init__(self, poison, dtype=torch.float32, device="cpu", targets=1):
        generator = torch.Generator().manual_seed(0)
        self.poison, self.generator, self.device = poison, generator, device
        self.labels = torch.randint(V, (N, targets) if targets > 1 else (N,), generator=generator).to(device)
        self.labels[::3] = -100
        self.ignored = (self.labels == -100).view(N, -1).all(1)
        self.weight = (0.4 * torch.randn(V, D, generator=generator)).to(device, dtype).requires_grad_()
        self.bias = torch.randn(V, generator=generator).to(device, dtype).requires_grad_()
        self.ref_weight = torch.randn(V, D_REF, generator=generator).to(device, dtype)
        self.right = (0.4 * torch.randn(V, 3, generator=generator)).to(device, dtype).requires_grad_()
        self.hidden, self.left = (self.of(D, dtype=dtype).requires_grad_() for _ in range(2))
        self.left = self.of(3, dtype=dtype).requires_grad_()
        self.ref_hidden = self.of(D_REF, dtype=dtype)

    def of(self, *width, dtype=torch.float32):
        values = torch.randn(N, *width, generator=self.generator).to(self.device, dtype)
        values[self.ignored] = self.poison
        return values

    def head(self, labels=None):
        return self.hidden, self.weight, self.labels if labels is None else labels

    @property
    def low_rank(self):
        return self.left, self.right

    @property
    def leaves(self):
        return self.hidden, self.weight, self.bias, self.left, self.right


def all_outputs(t, **options):
    asked = {"return_lse": True, "return_entropy": True, "label_smoothing": 0.1, "softcap": 5.0}
    return linear_logprob(*t.head(), t.bias, low_rank=t.low_rank, **asked, **options)


def frozen_head(t, **options):
    return linear_logprob(t.hidden, t.weight.detach(), t.labels, **options)


def weighted(reduction, engine):
    def weighted(t, **options):
        more = {"reduction": reduction, "engine": engine, "z_loss": 0.01, "return_logp": True}
        return linear_weighted_nll(*t.head(), t.of(), t.bias, low_rank=t.low_rank, **more, **options)

    return weighted


def a_weight_that_learns(t, **options):
    t.learned = t.of().requires_grad_()
    return linear_weighted_nll(*t.head(), t.learned, t.bias, **options)


def token_loss(engine):
    def token_loss(t, **options):
        f = token_objective(grpo_loss, beta=0.1, entropy_bonus=0.01)
        inputs = tuple(t.of() for _ in range(4))  # old and reference log-probs, advantage, token_weight
        return linear_token_loss(*t.head(), f, inputs, t.bias, entropy=True, engine=engine, **options)

    return token_loss


def token_kl(reduction, engine="auto"):
    def token_kl(t, **options):
        more = {"token_weight": t.of(), "reduction": reduction, "engine": engine, "low_rank": t.low_rank, **options}
        return linear_token_kl(t.hidden, t.weight, t.ref_hidden, t.ref_weight, t.labels, t.bias, **more)

    return token_kl


def prob_lse(t, **options):
    return linear_prob_lse(*t.head(), t.bias, alpha=3.0, **options)


OPS = {
    "logprob": all_outputs,
    "logprob, frozen head": frozen_head,
    "weighted_nll, one pass": weighted("mean", "one_pass"),
    "weighted_nll, two passes": weighted("sum", "two_pass"),
    "weighted_nll, per token": weighted("none", "auto"),
    "weighted_nll, a weight that learns": a_weight_that_learns,
    "token_loss, one pass": token_loss("one_pass"),
    "token_loss, two passes": token_loss("two_pass"),
    "token_kl": token_kl("none"),
    "token_kl, one pass": token_kl("sum", "one_pass"),
    "token_kl, two passes": token_kl("sum", "two_pass"),
    "prob_lse": prob_lse,
}


def results(op, t, **options):
    """Outputs and gradients under an upstream gradient that is poisoned too, where it is one a token."""
    outputs = op(t, **options)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.is_floating_point()]
    learns = [out for out in outputs if out.requires_grad]
    upstream = [t.of().to(out.dtype) if out.dim() else torch.ones_like(out) for out in learns]
    leaves = [*t.leaves, *([t.learned] if hasattr(t, "learned") else [])]
    found = torch.autograd.grad(learns, leaves, upstream, allow_unused=True)
    return [*(out.detach() for out in outputs), *(g for g in found if g is not None)]


def assert_untouched(op, poison, dtype=torch.float32, device="cpu", **options):
    clean, found = (results(op, Tokens(value, dtype, device), **options) for value in (0.0, poison))
    assert len(clean) == len(found) >= 2
    for expected, got in zip(clean, found, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, expected)


@by_name
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op(op, poison, target):
    assert_untouched(op, poison, device=target.device)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_in_16_bit(op):
    assert_untouched(op, torch.nan, torch.bfloat16)


@by_name
@pytest.mark.parametrize("name", OPS)
def test_where_rows_are_masked(name, poison):
    """With a count that is larger than needed some rows that do not count are computed."""
    assert_untouched(OPS[name], poison, num_active=N - N // 3 + 3)


@pytest.mark.parametrize("name", [name for name in OPS if name != "token_loss, one pass"])
def test_compiled(name):
    """There all rows are computed, and those that do not count masked."""
    found = []
    for poison in POISON[:2]:
        torch._dynamo.reset()
        t = Tokens(poison)
        given = [t.of() for _ in range(5)]
        of = iter(given)
        t.of = lambda *_, of=of: next(of)
        compiled = torch.compile(lambda t=t, name=name: OPS[name](t), backend="aot_eager")
        outputs = compiled()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        learns = [out for out in outputs if out.requires_grad]
        upstream = [torch.full_like(out, 0.3) for out in learns]
        for g in upstream:
            if g.dim():
                g[t.ignored] = poison
        grads = torch.autograd.grad(learns, t.leaves, upstream, allow_unused=True)
        found.append([*(out.detach() for out in outputs), *(g for g in grads if g is not None)])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)


@by_name
def test_some_targets_of_a_row(poison):
    """Weights and upstream gradients of the targets that do not count, in rows of which others do."""
    found = []
    for value in (0.0, poison):
        t = Tokens(0.0, targets=3)
        t.labels[torch.arange(N) % 4 == 1, 1] = -100
        off = t.labels == -100
        token_weight, upstream = (torch.full(t.labels.shape, x).masked_fill(off, value) for x in (0.7, 1.3))
        loss = linear_weighted_nll(*t.head(), token_weight, t.bias, reduction="mean")
        logp = linear_logprob(*t.head(), t.bias)
        found.append([loss, logp, *torch.autograd.grad([loss, logp], t.leaves[:3], [torch.ones(()), upstream])])
        truth = linear_logprob_ref(t.hidden, t.weight, t.labels, t.bias, dtype=torch.float64)
        count = (t.labels != -100).any(1).sum()
        assert_result(loss, -(truth * 0.7).sum() / count)
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)


# ---- the registry ----------------------------------------------------------------------------------------------------


def poisoned(name, poison):
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    if LOSSES[name].item != "pair" and "group_ids" not in LOSSES[name].tensors:
        labels[2] = -100  # a sequence without a label
    ignored = labels == -100
    with torch.no_grad():
        hidden[ignored] = poison
    inputs = {key: x.masked_fill(ignored, poison) if x.shape == labels.shape else x for key, x in inputs.items()}
    return hidden, weight, labels, inputs, item_weight, options


@by_name
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_of_the_registry(name, poison):
    for engine in ["auto", *(["one_pass", "two_pass"] if name in ONE_PASS else [])]:
        found = []
        for value in (0.0, poison):
            hidden, weight, labels, inputs, item_weight, options = poisoned(name, value)
            loss = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, engine=engine, **options)
            found.append([loss.detach(), *gradients(loss, (hidden, weight))])
        for expected, got in zip(*found, strict=True):
            assert got.isfinite().all()
            assert torch.equal(got, expected)
    hidden, weight, labels, inputs, item_weight, options = poisoned(name, 0.0)
    truth = naive(name, hidden, weight, labels, inputs, item_weight, options, torch.float64)
    assert_result(found[1][0] / 320, truth.detach() / 320, name)


@by_name
@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_a_sequence_without_a_label(name, poison):
    """Of a loss of tokens it does not matter; of one of sequences the value is part of the loss, and is refused."""
    given = [key for key in LOSSES[name].inputs if key not in ("group_ids", "desirable")]
    for key in given:
        hidden, weight, labels, inputs, item_weight, options = poisoned(name, 0.0)
        labels[2] = -100
        if LOSSES[name].reads_tokens and inputs[key].shape == labels.shape:
            continue
        inputs[key] = inputs[key].clone()
        clean = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)
        inputs[key][2] = poison
        try:
            loss = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)
        except ValueError as error:
            message = str(error)
        else:
            assert torch.equal(loss, clean), key
            continue
        assert f"{key.split('_')[-1]} must be finite" in message, key
        assert "drop that sequence" in message


@by_name
def test_the_weight_of_a_sequence_without_a_label(poison):
    t = Tokens(0.0)
    labels = t.labels[:36].view(4, 9).clone()
    labels[1] = -100
    hidden, found = t.hidden[:36].view(4, 9, D), []
    for value in (0.0, poison):
        weights = torch.tensor([0.5, value, 1.5, -1.0])
        for reduction in ("sum", "mean"):
            loss = weighted_sequence_nll(hidden, t.weight, labels, weights, token_reduction=reduction)
            found.append([loss, *torch.autograd.grad(loss, t.leaves[:2])])
    for expected, got in zip(found[0] + found[1], found[2] + found[3], strict=True):
        assert torch.equal(got, expected)


def test_a_weight_that_counts_is_still_refused():
    t = Tokens(0.0)
    weight = torch.ones(N)
    weight[1] = torch.nan
    assert t.labels[1] != -100
    with pytest.raises(ValueError, match="token_weight must be finite, got NaN or inf"):
        linear_weighted_nll(*t.head(), weight)


@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=str)
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_no_item_where_no_row_counts(engine, num_items):
    """A rank without a label in a step without one: 0, and gradients of 0."""
    t = Tokens(torch.nan)
    nothing = torch.full_like(t.labels, -100)
    for count in (None, 3):
        loss = linear_weighted_nll(
            *t.head(nothing), None, t.bias, reduction="mean", num_items=num_items, num_active=count, engine=engine
        )
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, t.leaves[:3]))
