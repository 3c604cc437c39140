"""``linear_token_loss``: losses of a token's own log-prob in one pass, against autograd over the fp64 reference."""

import pytest
import torch

from tests.op_cases import Case
from tests.products import Products
from tests.tolerance import assert_gradient, assert_result
from var_kernels import linear_token_loss
from var_kernels.reference import linear_logprob_ref


def clipped_ratio(logp, advantage, old_logp):
    """PPO: -min(ratio A, clip(ratio) A)."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def entropy_bonus(logp, entropy, advantage, old_logp):
    return clipped_ratio(logp, advantage, old_logp) - 0.1 * entropy


def detached_probability(logp, advantage, old_logp):
    """DFT: -sg(p) log p."""
    return -logp.detach().exp() * logp


LOSSES = {
    "clipped ratio": (clipped_ratio, False),
    "entropy bonus": (entropy_bonus, True),
    "detached": (detached_probability, False),
}
CASES = [
    Case("plain"),
    Case("ragged chunks", tight=True, bias=True),
    Case("softcap", options={"softcap": 5.0, "temperature": 0.8}, bias=True),
    Case("frozen head", frozen=("weight",)),
    Case("fp64", dtype=torch.float64, bias=True),
    Case("bf16", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_autograd_over_the_reference(case, loss, engine, target, small_tiles):
    target.require(case.dtype)
    token_loss, entropy = loss
    hidden, weight, labels, bias = case.inputs(target.device)
    generator = torch.Generator().manual_seed(3)
    advantage = torch.randn(labels.shape, generator=generator).to(target.device)
    with torch.no_grad():
        now = linear_logprob_ref(hidden, weight, labels, bias, **case.options)
    old_logp = (now + 0.3 * torch.randn(labels.shape, generator=generator).to(now)).float()
    got, logp = linear_token_loss(
        hidden,
        weight,
        labels,
        token_loss,
        (advantage, old_logp),
        bias,
        entropy=entropy,
        engine=engine,
        return_logp=True,
        **case.options,
        **case.workspace(),
    )
    (0.7 * got).backward()

    def reference(dtype):
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (hidden, weight, bias)
        ]
        known = linear_logprob_ref(*leaves[:2], labels, leaves[2], dtype=dtype, return_entropy=entropy, **case.options)
        known = known if entropy else (known,)
        kept = labels != -100
        loss = token_loss(*(t[kept] for t in (*known, advantage, old_logp))).sum()
        (0.7 * loss).backward()
        return loss, known[0], leaves

    truth, truth_logp, truth_leaves = reference(torch.float64)
    _, _, own_leaves = reference(case.dtype)
    assert_result(got / labels.numel(), truth / labels.numel(), "loss")
    assert_result(logp, truth_logp, "logp")
    for leaf, expected, own in zip((hidden, weight, bias), truth_leaves, own_leaves, strict=True):
        if leaf is not None and leaf.requires_grad:
            assert_gradient(leaf.grad, expected.grad, own.grad)


def test_one_pass_computes_the_logits_once():
    hidden, weight, labels, _ = Case("").inputs()
    with Products() as products:
        linear_token_loss(hidden, weight, labels, lambda logp: -logp).backward()
    assert len(products.sizes) == 3


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("entropy", [False, True])
def test_entropy_beside_the_loss(engine, entropy):
    hidden, weight, labels, _ = Case("").inputs()
    loss = (lambda logp, entropy: -logp) if entropy else (lambda logp: -logp)
    options = {"entropy": entropy, "engine": engine}
    value, logp, got, argmax = linear_token_loss(
        hidden, weight, labels, loss, **options, return_logp=True, return_entropy=True, return_argmax=True
    )
    truth_logp, truth = linear_logprob_ref(hidden, weight, labels, dtype=torch.float64, return_entropy=True)
    assert_result(got, truth, "entropy")
    assert_result(logp, truth_logp, "logp")
    assert torch.equal(argmax, (hidden @ weight.T).argmax(-1).where(labels != -100, -1))
    assert not logp.requires_grad
    assert not got.requires_grad
    value.backward()
    made, hidden.grad = hidden.grad, None
    linear_token_loss(hidden, weight, labels, lambda logp: -logp, engine=engine).backward()
    torch.testing.assert_close(made, hidden.grad, rtol=1e-5, atol=1e-6)


def test_nothing_counts():
    hidden, weight, labels, _ = Case("").inputs()
    loss = linear_token_loss(hidden, weight, torch.full_like(labels, -100), lambda logp: -logp, engine="one_pass")
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.count_nonzero() == 0


BAD = {
    "no function": (lambda h, w, y: linear_token_loss(h, w, y, 3.0), TypeError, "token_loss must be a function"),
    "a bare tensor": (
        lambda h, w, y: linear_token_loss(h, w, y, lambda p, a: p * a, torch.ones(63)),
        TypeError,
        r"token_inputs must be a tuple.*write \(tensor,\)",
    ),
    "per sequence": (
        lambda h, w, y: linear_token_loss(h, w, y, lambda p, a: p * a, (torch.ones(3),)),
        ValueError,
        r"token_inputs\[0\] must be a tensor in the shape of labels, \(63,\).*expand",
    ),
    "summed": (
        lambda h, w, y: linear_token_loss(h, w, y, lambda p: p.sum()),
        ValueError,
        "token_loss must return one loss a token.*leave the sum",
    ),
    "learns elsewhere": (
        lambda h, w, y: linear_token_loss(h, w, y, lambda p: -torch.ones(3, requires_grad=True).exp()[0] * p),
        ValueError,
        r"token_loss must learn from the head alone in one pass, got .* of shape \(3,\); detach it, or .*two_pass",
    ),
    "several targets": (
        lambda h, w, y: linear_token_loss(h, w, y.clamp(min=0).unsqueeze(1), lambda p: p),
        ValueError,
        "labels must hold one target a row",
    ),
}


@pytest.mark.parametrize(("mistake", "error", "message"), BAD.values(), ids=BAD.keys())
def test_refused_by_name(mistake, error, message):
    hidden, weight, labels, _ = Case("").inputs()
    with pytest.raises(error, match=message):
        mistake(hidden, weight, labels)


@pytest.mark.parametrize("frozen", [(), ("hidden", "weight")], ids=["trained head", "frozen head"])
def test_another_tensor_learns_in_two_passes(frozen):
    hidden, weight, labels, _ = Case("", frozen=frozen).inputs()
    scale = torch.tensor(2.0, requires_grad=True)
    engine = "auto" if frozen else "two_pass"
    loss = linear_token_loss(hidden, weight, labels, lambda logp: -scale * logp, engine=engine)
    loss.backward()
    assert scale.grad.item() == pytest.approx(loss.item() / 2)


def test_a_constant_has_no_slope():
    hidden, weight, labels, _ = Case("").inputs()
    linear_token_loss(hidden, weight, labels, torch.zeros_like).backward()
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("entropy", [False, True])
def test_without_gradients(mode, entropy):
    hidden, weight, labels, _ = Case("").inputs()

    def loss_of(logp, *entropies):
        return sum(entropies, -logp)

    expected = linear_token_loss(hidden, weight, labels, loss_of, entropy=entropy).item()
    with mode():
        got = linear_token_loss(hidden.clone(), weight.clone(), labels, loss_of, entropy=entropy)
    assert got.item() == pytest.approx(expected, rel=2**-17)
    assert not got.requires_grad


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained head", "frozen head"])
def test_a_masked_row_adds_nothing_whatever_it_holds(engine, frozen):
    """Token 0 stands in for its label: forbidden here, log-prob -inf. Its inputs are NaN."""
    hidden, weight, labels, bias = Case("", bias=True, frozen=(*frozen, "bias")).inputs()
    bias.data[:5] = -torch.inf
    ignored = labels == -100
    labels = labels.where(ignored | (labels >= 5), 7)
    advantage = torch.ones(labels.shape).masked_fill(ignored, torch.nan)

    def token_loss(logp, entropy, advantage):
        return logp.exp() * logp * advantage - 0.1 * entropy * advantage

    leaves = [t for t in (hidden, weight) if t.requires_grad]
    results = []
    for num_active in (None, labels.numel()):
        loss = linear_token_loss(
            hidden, weight, labels, token_loss, (advantage,), bias, entropy=True, engine=engine, num_active=num_active
        )
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for masked, left_out in zip(*results, strict=True):
        torch.testing.assert_close(masked, left_out, rtol=1e-5, atol=1e-6)
