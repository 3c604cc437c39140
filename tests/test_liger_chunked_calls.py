"""The calls of liger-kernel's chunked preference losses, against full logits and, where installed, itself."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from var_kernels import linear_loss
from var_kernels.integrations import liger_chunked as ours
from var_kernels.integrations.liger_chunked import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

P, T, D, V = 3, 7, 12, 53
NAMES = ["DPO", "CPO", "SimPO", "ORPO", "KTO"]
DPO_TYPES = [
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]


def tensors(seed=0):
    """lin_weight, _input, target, bias in fp64; ragged rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(V, (2 * P, T), generator=torch.Generator().manual_seed(9))
    target[0, :3] = target[4, 5:] = -100
    return normal(V, D).requires_grad_(), normal(2 * P, T, D).requires_grad_(), target, normal(V).requires_grad_()


def sequences(weight, hidden, target, bias, average=False):
    logp = (hidden @ weight.T + bias).log_softmax(-1)
    kept = target != -100
    logp = logp.gather(-1, target.where(kept, 0)[..., None])[..., 0].where(kept, 0.0)
    return logp.sum(-1) / kept.sum(-1) if average else logp.sum(-1)


def dpo_by_hand(loss_type, chosen, rejected, beta, smoothing, tau):
    """TRL's and liger-kernel's formulas, of log-ratios."""
    m = beta * (chosen - rejected)
    epsilon = torch.tensor(smoothing, dtype=m.dtype)
    return {
        "sigmoid": lambda: -F.logsigmoid(m),
        "hinge": lambda: torch.relu(1 - m),
        "exo_pair": lambda: (
            torch.sigmoid(m) * (F.logsigmoid(m) - torch.log(1 - epsilon))
            + torch.sigmoid(-m) * (F.logsigmoid(-m) - torch.log(epsilon))
        ),
        "nca_pair": lambda: (
            -F.logsigmoid(beta * chosen) - 0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)
        ),
        "robust": lambda: (-(1 - smoothing) * F.logsigmoid(m) + smoothing * F.logsigmoid(-m)) / (1 - 2 * smoothing),
        "bco_pair": lambda: -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected),
        "sppo_hard": lambda: (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected),
        "apo_down": lambda: torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected)),
        "discopop": lambda: -F.logsigmoid(m) * (1 - torch.sigmoid(m / tau)) + torch.exp(-m) * torch.sigmoid(m / tau),
    }[loss_type]().mean()


def assert_same(make, by_hand):
    """Loss and every gradient, with an upstream gradient of 0.7."""
    leaves, truth_leaves = tensors(), tensors()
    (0.7 * make(*leaves)).backward()
    truth = by_hand(*truth_leaves)
    torch.testing.assert_close(make(*leaves), truth, rtol=1e-10, atol=1e-10)
    (0.7 * truth).backward()
    for got, expected in zip(leaves, truth_leaves, strict=True):
        if got.is_floating_point():
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo(loss_type):
    ref_weight, ref_input, _, ref_bias = (t.detach() for t in tensors(1))
    options = {"beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.4}
    loss = LigerFusedLinearDPOLoss(loss_type=loss_type, compute_nll_loss=True, alpha=0.5, **options)

    def by_hand(weight, hidden, target, bias):
        policy = sequences(weight, hidden, target, bias)
        ratio = policy - sequences(ref_weight, ref_input, target, ref_bias)
        nll = -policy[:P].sum() / (target[:P] != -100).sum()
        return dpo_by_hand(loss_type, ratio[:P], ratio[P:], 0.3, 0.1, 0.4) + 0.5 * nll

    assert_same(lambda *leaves: loss(*leaves, ref_input, ref_weight, ref_bias)[0], by_hand)


def test_the_metrics_of_dpo():
    weight, hidden, target, bias = tensors()
    loss = LigerFusedLinearDPOLoss(use_ref_model=False, average_log_prob=True)
    chosen, rejected, chosen_logit, rejected_logit, nll, c, r = loss(weight, hidden, target, bias)[1]
    logp, logits = sequences(weight, hidden, target, bias, average=True), hidden @ weight.T + bias
    torch.testing.assert_close(torch.cat([chosen, rejected]), logp)
    torch.testing.assert_close(torch.cat([c, r]), 0.1 * logp)
    torch.testing.assert_close(chosen_logit.double(), logits[:P].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rejected_logit.double(), logits[P:].mean(), rtol=1e-5, atol=1e-6)
    assert nll == 0
    assert not any(metric.requires_grad for metric in (chosen, c, r, chosen_logit))


def test_cpo_simpo_orpo():
    def nll(weight, hidden, target, bias):
        return -sequences(weight, hidden, target, bias)[:P].sum() / (target[:P] != -100).sum()

    def smoothed(m):
        return (-0.9 * F.logsigmoid(m) - 0.1 * F.logsigmoid(-m)).mean()

    def cpo(*leaves):
        logp = 0.2 * sequences(*leaves)
        return smoothed(logp[:P] - logp[P:]) + 2 * nll(*leaves)

    def simpo(*leaves):
        logp = 0.2 * sequences(*leaves, average=True)
        return smoothed(logp[:P] - logp[P:] - 0.4) + nll(*leaves)

    def orpo(*leaves):
        logp = sequences(*leaves, average=True)
        odds = logp - torch.log1p(-logp.exp())
        return nll(*leaves) - 0.2 * F.logsigmoid(odds[:P] - odds[P:]).mean()

    options = {"beta": 0.2, "label_smoothing": 0.1}
    assert_same(lambda *leaves: LigerFusedLinearCPOLoss(alpha=2.0, **options)(*leaves)[0], cpo)
    assert_same(lambda *leaves: LigerFusedLinearSimPOLoss(gamma=0.4, **options)(*leaves)[0], simpo)
    assert_same(lambda *leaves: LigerFusedLinearORPOLoss(beta=0.2)(*leaves)[0], orpo)


def test_kto():
    ref_weight, ref_input, _, ref_bias = (t.detach() for t in tensors(1))
    desirable = torch.tensor([True, False, True, True, False, False])
    loss = LigerFusedLinearKTOLoss(beta=0.3, use_ref_model=True)

    def make(weight, hidden, target, bias):
        return loss(hidden, weight, target, bias, desirable, ref_input, ref_weight, ref_bias, 0.2)

    def by_hand(*leaves):
        ratio = sequences(*leaves) - sequences(ref_weight, ref_input, leaves[2], ref_bias)
        sign = torch.where(desirable, 1.0, -1.0)
        return (1 - torch.sigmoid(0.3 * (ratio - 0.2) * sign)).mean()

    assert_same(lambda *leaves: make(*leaves)[0], by_hand)
    weight, hidden, target, bias = tensors()
    good, bad, good_logits, _, good_reward, _ = make(weight, hidden, target, bias)[1]
    logp, logits = sequences(weight, hidden, target, bias), hidden @ weight.T + bias
    torch.testing.assert_close(torch.stack([good, bad]), torch.stack([logp[desirable].sum(), logp[~desirable].sum()]))
    torch.testing.assert_close(good_logits.double(), logits[desirable].sum(), rtol=1e-4, atol=1e-3)
    ratio = logp - sequences(ref_weight, ref_input, target, ref_bias)
    torch.testing.assert_close(good_reward, 0.3 * ratio[desirable].sum())


# ---- at the edge -----------------------------------------------------------------------------------------------------


CALLS = {
    **{
        f"DPO {kind}": lambda kind=kind: LigerFusedLinearDPOLoss(
            use_ref_model=False, beta=0.3, loss_type=kind, discopop_tau=0.4,
            label_smoothing=0.1 if kind == "exo_pair" else 0.0,
        )
        for kind in DPO_TYPES
    },
    "CPO": lambda: LigerFusedLinearCPOLoss(beta=0.3, alpha=0.0),
    "SimPO": lambda: LigerFusedLinearSimPOLoss(beta=0.3, alpha=0.0),
    "ORPO": lambda: LigerFusedLinearORPOLoss(beta=0.3, compute_nll_loss=False),
}  # fmt: skip
BETA = 0.3


def limit_by_hand(name, chosen, rejected):
    """() fp64 loss of one pair of summed log-probs (for SimPO and ORPO: means), the limit where they are infinite."""
    if name == "ORPO":  # the odds are finite up to the probability 1 - eps of fp64
        odds = [(lp := min(logp, -(2.0**-52))) - math.log(-math.expm1(lp)) for logp in (chosen, rejected)]
        return BETA * F.softplus(torch.tensor(odds[1] - odds[0], dtype=torch.float64))
    a, b = (torch.tensor(max(logp, -1e5), dtype=torch.float64) for logp in (chosen, rejected))  # exp(-1e5) is 0
    kind = {"CPO": "sigmoid", "SimPO": "sigmoid"}.get(name, name.removeprefix("DPO "))
    if kind == "discopop":  # in logs: exp(-m) overflows where its factor is 0
        m = BETA * (a - b)
        return -F.logsigmoid(m) * torch.sigmoid(-m / 0.4) + (-m + F.logsigmoid(m / 0.4)).exp()
    shift = 0.5 / BETA if name == "SimPO" else 0.0
    return dpo_by_hand(kind, a - shift, b, BETA, 0.1 if kind == "exo_pair" else 0.0, 0.4)


def edge_pair(chosen, rejected):
    """fp64 tensors of one pair in which each half is "ordinary", "empty", "certain", "forbidden" or "unlikely", and the
    two log-probs.
    """
    weight, hidden, target, bias = (t.detach().clone() for t in tensors())
    hidden, target = hidden[[0, P]], target[[0, P]]
    for row, kind in enumerate((chosen, rejected)):
        target[row] = torch.arange(T) + 10 * row
        if kind == "empty":
            target[row] = -100
        elif kind == "certain":
            hidden[row] = 1e4 * weight[target[row]]
        elif kind == "forbidden":
            target[row, 2] = V - 1
        elif kind == "unlikely":
            hidden[row] = -weight[target[row]] * 40
    bias[V - 1] = -torch.inf  # nobody else's label
    logits = (hidden @ weight.T + bias).log_softmax(-1)
    kept = target != -100
    logp = logits.gather(-1, target.where(kept, 0)[..., None])[..., 0].where(kept, 0.0)
    leaves = [weight.requires_grad_(), hidden.requires_grad_(), target, bias]
    return leaves, logp.sum(-1).tolist(), (logp.sum(-1) / kept.sum(-1).clamp(min=1)).tolist()


PAIRS = [
    ("ordinary", "empty"), ("empty", "ordinary"), ("empty", "empty"), ("certain", "certain"), ("certain", "ordinary"),
    ("ordinary", "certain"), ("certain", "empty"), ("forbidden", "ordinary"), ("ordinary", "forbidden"),
    ("empty", "forbidden"), ("unlikely", "ordinary"), ("ordinary", "unlikely"), ("unlikely", "unlikely"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", CALLS)
def test_a_half_at_the_edge_gives_the_limit(name, pair, dtype):
    """A half without a label, certain (log-prob 0), of a forbidden label (-inf) or of thousands of nats: no NaN."""
    leaves, sums, means = edge_pair(*pair)
    leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in leaves]
    loss, metrics = CALLS[name]()(*leaves)
    truth = limit_by_hand(name, *(means if name in ("SimPO", "ORPO") else sums))
    assert not loss.isnan()
    if truth > 1e4 and "forbidden" in pair:
        assert loss == torch.inf
    elif dtype == torch.float64:
        torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-12)
    elif name != "ORPO" or not {"certain", "empty"} & set(pair):  # whose odds end at the dtype's own eps
        torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-4)
    assert not any(metric.isnan().any() for metric in metrics[5:])
    if loss.isfinite():
        gradients = torch.autograd.grad(loss, leaves[:2])
        assert all(g.isfinite().all() for g in gradients)


def test_orpo_is_linear_loss():
    """The same odds as the registry's, for a half without a label and for one that is certain."""
    for pair in PAIRS:
        if "forbidden" in pair:
            continue
        (weight, hidden, target, bias), *_ = edge_pair(*pair)
        loss = LigerFusedLinearORPOLoss(beta=BETA)(weight, hidden, target, bias)[0]
        expected = linear_loss("orpo", hidden, weight, target, bias=bias, odds_weight=BETA)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        assert loss.isfinite()


def test_no_pair_and_no_sequence():
    weight, hidden, target, bias = tensors()
    for name, make in CALLS.items():
        loss = make()(weight, hidden[:0], target[:0], bias)[0]
        assert loss == 0, name
        loss.backward()
    labels = torch.empty(0, dtype=torch.bool)
    assert LigerFusedLinearKTOLoss()(hidden[:0], weight, target[:0], bias, labels)[0] == 0


@pytest.mark.parametrize("name", [*CALLS, "KTO"])
def test_padding_may_hold_anything(name):
    """NaN at rows that do not count, of the policy and of the reference."""
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        weight, hidden, target, bias = tensors()
        ref_weight, ref_hidden, _, ref_bias = (t.detach() for t in tensors(1))
        target[5] = -100
        with torch.no_grad():
            hidden[target == -100] = ref_hidden[target == -100] = poison
        if name == "KTO":
            desirable = torch.tensor([True, False, True, True, False, False])
            call = LigerFusedLinearKTOLoss(use_ref_model=True)
            loss = call(hidden, weight, target, bias, desirable, ref_hidden, ref_weight, ref_bias)[0]
        elif name.startswith("DPO"):
            call = CALLS[name]()
            call.use_ref_model = True
            loss = call(weight, hidden, target, bias, ref_hidden, ref_weight, ref_bias)[0]
        else:
            loss = CALLS[name]()(weight, hidden, target, bias)[0]
        results.append([loss.detach(), *torch.autograd.grad(loss, (weight, hidden, bias))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["DPO sigmoid", "KTO"])
def test_the_reference_is_a_constant(name):
    """Also where its tensors require gradients, as those of a model that nobody froze."""
    weight, hidden, target, bias = tensors()
    ref_weight, ref_hidden, _, ref_bias = tensors(1)
    reference = ref_hidden, ref_weight, ref_bias
    if name == "KTO":
        labels = torch.tensor([True, False] * P)
        loss = LigerFusedLinearKTOLoss(use_ref_model=True)(hidden, weight, target, bias, labels, *reference)[0]
    else:
        loss = LigerFusedLinearDPOLoss()(weight, hidden, target, bias, *reference)[0]
    assert torch.autograd.grad(loss, reference, retain_graph=True, allow_unused=True) == (None, None, None)
    assert torch.autograd.grad(loss, hidden)[0].any()


def test_sppo_in_fp32_is_as_near_as_the_formula():
    """beta (s - sr) divided by beta again would round twice more: 1/(2 beta) is added to the log-ratio itself."""
    generator = torch.Generator().manual_seed(3)
    a, b = (-80 * torch.rand(4000, generator=generator) for _ in range(2))
    loss = LigerFusedLinearDPOLoss(loss_type="sppo_hard", beta=0.1)
    truth = (a.double() - 5).square() + (b.double() + 5).square()
    error = (loss.pair_loss(a, b) - truth).abs() / truth
    twice_rounded = ((0.1 * a - 0.5) / 0.1).square() + ((0.1 * b + 0.5) / 0.1).square()
    assert error.max() <= 2.0**-22
    assert error.max() < ((twice_rounded - truth).abs() / truth).max()


def test_refusals():
    weight, hidden, target, bias = tensors()
    with pytest.raises(ValueError, match="loss_type must be one of"):
        LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \(0, 0\.5\) for loss_type='exo_pair'"):
        LigerFusedLinearDPOLoss(loss_type="exo_pair")
    with pytest.raises(ValueError, match="ref_input must be the reference's tensor"):
        LigerFusedLinearDPOLoss()(weight, hidden, target, bias)
    with pytest.raises(ValueError, match="chosen before rejected"):
        LigerFusedLinearCPOLoss()(weight, hidden[:3], target[:3], bias)
    with pytest.raises(ValueError, match="preference_labels must be"):
        LigerFusedLinearKTOLoss()(hidden, weight, target, bias)
    with pytest.raises(ImportError, match=r"LigerFusedLinearGRPOLoss is not among .*linear_loss"):
        from var_kernels.integrations.liger_chunked import LigerFusedLinearGRPOLoss  # noqa: F401
    with pytest.raises(ImportError, match=r"liger_fused_linear_dpo is not among .*its class"):
        from var_kernels.integrations.liger_chunked import liger_fused_linear_dpo  # noqa: F401


# liger-kernel 0.8.5's own, by position: of the constructor, of the call
POSITIONS = {
    "DPO": (
        ["ignore_index", "beta", "alpha", "compute_nll_loss", "compiled", "use_ref_model", "average_log_prob",
         "chunk_size", "loss_type", "label_smoothing", "discopop_tau"],
        ["lin_weight", "_input", "target", "bias", "ref_input", "ref_weight", "ref_bias"],
    ),
    "CPO": (
        ["ignore_index", "beta", "alpha", "label_smoothing", "compute_nll_loss", "compiled", "average_log_prob",
         "chunk_size"],
        ["lin_weight", "_input", "target", "bias"],
    ),
    "SimPO": (
        ["ignore_index", "beta", "alpha", "label_smoothing", "compute_nll_loss", "compiled", "gamma", "chunk_size"],
        ["lin_weight", "_input", "target", "bias"],
    ),
    "ORPO": (
        ["ignore_index", "beta", "compute_nll_loss", "compiled", "chunk_size"],
        ["lin_weight", "_input", "target", "bias", "nll_target"],
    ),
    "KTO": (
        ["ignore_index", "beta", "compiled", "use_ref_model", "average_log_prob", "chunk_size"],
        ["_input", "lin_weight", "target", "bias", "preference_labels", "ref_input", "ref_weight", "ref_bias", "kl"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_positions(name):
    of_constructor, of_call = POSITIONS[name]
    loss = getattr(ours, f"LigerFusedLinear{name}Loss")
    assert list(inspect.signature(loss).parameters) == of_constructor
    assert list(inspect.signature(loss.forward).parameters) == ["self", *of_call]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_numbers_are_theirs(name):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    name = f"LigerFusedLinear{name}Loss"
    for call in ("__init__", "forward"):
        got, expected = (inspect.signature(getattr(getattr(m, name), call)).parameters for m in (ours, theirs))
        assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in expected.values()]
    weight, hidden, target, bias = (t.float() if t.is_floating_point() else t for t in tensors())
    options = {"compiled": False, **({"use_ref_model": False} if "DPO" in name else {})}
    args = (weight, hidden, target, bias)
    if "KTO" in name:
        args = (hidden, weight, target, bias, torch.tensor([True, False] * P))
    (loss, metrics), (their_loss, their_metrics) = (getattr(m, name)(**options)(*args) for m in (ours, theirs))
    assert math.isclose(loss.item(), their_loss.item(), rel_tol=1e-5)
    for got, expected in zip(metrics, their_metrics, strict=True):
        torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-4, atol=1e-4)
