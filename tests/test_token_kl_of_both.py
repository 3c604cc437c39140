"""``linear_token_kl`` with ``ref_grad``: gradients of both models against fp64, and the limits at extremes."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from tests.kl_cases import BF16, FP64, KLCase, inputs, run_case
from tests.op_cases import Case
from tests.tolerance import assert_gradient
from var_kernels.ops import kl, linear_token_kl
from var_kernels.reference import linear_token_kl_ref

DIRECTIONS = ("reverse", "forward", "jsd")
CASES = [
    KLCase("plain"),
    KLCase("confident rows", Case("", logits=30.0)),
    KLCase("ragged chunks", Case("", tight=True, bias=True), ref_bias=True),
    KLCase(
        "softcap, scale, temperature",
        Case("", options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}, bias=True, tight=True),
        ref_options={"softcap": 3.0, "temperature": 1.5, "logit_scale": 1.2},
    ),
    KLCase("every logit far below 0", Case("", bias=True, offset=-1e4), ref_bias=True),
    KLCase("a policy that is a constant", Case("", frozen=("hidden", "weight"))),
    KLCase("low rank of both", ref_bias=True, factors=torch.float32, ref_factors=torch.float32),
    KLCase("bf16", Case("", dtype=BF16, bias=True)),
    KLCase("fp32 policy, bf16 reference", ref_dtype=BF16),
]


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_both(case, direction, engine, device, small_tiles):
    run_case(case, direction, engine, device, ref_grad=True)


def leaves():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4), (7, 4), (5, 3), (7, 3), (7,), (7,))
    return [torch.randn(shape, generator=generator, dtype=FP64).requires_grad_() for shape in shapes]


OPTIONS = {"softcap": 4.0, "ref_softcap": 3.0, "temperature": 1.3, "ref_logit_scale": 0.8, "beta": 0.3}


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction, reduction):
    labels = torch.tensor([1, -100, 3, 0, 2])
    weight = torch.linspace(-1, 2, 5, dtype=FP64).requires_grad_()

    def op(hidden, head, ref_hidden, ref_head, bias, ref_bias, token_weight):
        options = {"direction": direction, "token_weight": token_weight, "reduction": reduction, **OPTIONS}
        return linear_token_kl(hidden, head, ref_hidden, ref_head, labels, bias, ref_bias, ref_grad=True, **options)

    assert torch.autograd.gradcheck(op, (*leaves(), weight))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_head_in_two_roles(direction):
    """Two dropouts of one model (R-Drop): the head learns from both sides."""
    hidden, weight, ref_hidden, *_ = leaves()
    other = torch.cat([ref_hidden, ref_hidden[:, :1]], 1)

    def gradient(op, **options):
        value = op(hidden, weight, other, weight, direction=direction, **options)
        return torch.autograd.grad(value.sum(), (hidden, weight, ref_hidden), retain_graph=True)

    for got, expected in zip(gradient(linear_token_kl, ref_grad=True), gradient(linear_token_kl_ref), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_of_1e4(direction):
    """Of both signs, in fp32: no gradient is NaN, and each is as near to fp64 as plain torch's."""
    generator = torch.Generator().manual_seed(1)
    z, w = (torch.randint(-4, 5, (6, 507), generator=generator) * 2500.0 for _ in range(2))
    z[:, 3] = w[:, 3] = w[0, 5] = 1e4  # one token in common, so that no difference alone decides
    eye, given = torch.eye(507), []
    for dtype, op in (
        (torch.float32, linear_token_kl),
        (FP64, linear_token_kl_ref),
        (torch.float32, linear_token_kl_ref),
    ):
        both = [t.to(dtype).requires_grad_() for t in (z, w)]
        options = {"ref_grad": True} if op is linear_token_kl else {"dtype": dtype}
        value = op(both[0], eye.to(dtype), both[1], eye.to(dtype), direction=direction, **options)
        given.append((value, torch.autograd.grad(value.sum(), both)))
    (got, found), (truth, expected), (_, own) = given
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6)
    for name, *each in zip(("policy", "reference"), found, expected, own, strict=True):
        assert_gradient(*each, name)


# (direction, who forbids): whether value, policy's gradient and reference's gradient are finite; elsewhere all are
ONE_SIDED = {("reverse", "reference"): (False, False, True), ("forward", "policy"): (False, True, False)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("forbids", ["policy", "reference", "both"])
def test_a_forbidden_token(forbids, direction):
    """KL(p||q) where q forbids what p allows: inf, NaN for p, and q - p for q. Elsewhere all is finite: the limit
    of a probability that goes to 0.
    """
    hidden, weight, ref_hidden, ref_weight, _, _ = leaves()
    barred = torch.zeros(7, dtype=FP64)
    barred[2] = -torch.inf
    of = {"bias": barred if forbids != "reference" else None, "ref_bias": barred if forbids != "policy" else None}
    given = (hidden, weight, ref_hidden, ref_weight)
    value = linear_token_kl(*given, direction=direction, ref_grad=True, **of)
    found = torch.autograd.grad(value.sum(), given)
    finite = (bool(value.isfinite().all()), *(bool(g.isfinite().all()) for g in (found[0], found[2])))
    assert finite == ONE_SIDED.get((direction, forbids), (True, True, True))
    if not finite[0]:
        assert value.isposinf().all()
        p, q = (torch.softmax(h @ w.T + (0 if b is None else b), -1) for h, w, b in (
            (hidden, weight, of["bias"]), (ref_hidden, ref_weight, of["ref_bias"])))  # fmt: skip
        other, slope = (found[2], (q - p) @ ref_weight) if direction == "reverse" else (found[0], (p - q) @ weight)
        torch.testing.assert_close(other, slope)
        return
    low = barred.clamp(min=-60.0)  # the limit: e^-60 of a probability
    near = {name: None if b is None else low for name, b in of.items()}
    if forbids == "both":
        kept = [0, 1, 3, 4, 5, 6]
        expected = linear_token_kl_ref(hidden, weight[kept], ref_hidden, ref_weight[kept], direction=direction)
    else:
        expected = linear_token_kl_ref(*given, direction=direction, **near)
    torch.testing.assert_close(value, expected)
    for got, wanted in zip(found, torch.autograd.grad(expected.sum(), given), strict=True):
        torch.testing.assert_close(got, wanted)


def test_without_gradients():
    args = inputs()
    with torch.no_grad():
        assert torch.equal(linear_token_kl(*args, ref_grad=True), linear_token_kl(*args))


@pytest.mark.parametrize("mistake", ["direction", "beta", "weight"])
def test_mutant_is_refused(mistake, monkeypatch):
    original = kl._one_sided
    wrong = {
        "direction": lambda of: of | {"direction": kl._EXCHANGED[of["direction"]]},
        "beta": lambda of: of | {"beta": 1 - of["beta"]},
        "weight": lambda of: of | {"token_weight": None},
    }[mistake]
    calls = []

    def mutated(policy, reference, **options):
        calls.append(1)
        return original(policy, reference, **(wrong(options) if len(calls) % 2 == 0 else options))

    monkeypatch.setattr(kl, "_one_sided", mutated)
    with pytest.raises(GradcheckError):
        test_gradcheck("jsd" if mistake == "beta" else "reverse", "none")
