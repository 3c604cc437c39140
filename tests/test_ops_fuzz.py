"""The ops on random sizes, strides, options and frozen tensors, each against its fp64 twin. A seed is a case."""

import math
import random
from dataclasses import dataclass

import pytest
import torch

from tests.tolerance import rms
from var_kernels import linear_logprob, linear_token_kl, linear_token_loss, linear_weighted_nll
from var_kernels.kernels import rows_native
from var_kernels.ops.backend import use_backend
from var_kernels.reference import linear_logprob_ref, linear_token_kl_ref, linear_weighted_nll_ref

SEEDS = range(160)
BACKENDS = ["torch", *([] if rows_native.obstacle() else ["native", "native"])]
NAMES = ("hidden", "weight", "bias", "left", "right")


def strided(t: torch.Tensor, choose: random.Random) -> torch.Tensor:
    """The same numbers: as they are, every second element, transposed, or in rows with NaN behind them."""
    kind = choose.randrange(4)
    if kind == 1:
        return torch.stack([t, t], -1)[..., 0]
    if kind == 2 and t.dim() == 2:
        return t.t().contiguous().t()
    if kind == 3:
        padded = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
        padded[..., :-3] = t
        return padded[..., :-3]
    return t


@dataclass
class Problem:
    leaves: dict[str, torch.Tensor | None]
    labels: torch.Tensor
    token_weight: torch.Tensor | None
    reference: tuple[torch.Tensor, torch.Tensor]
    options: dict
    workspace: dict
    num_active: int | None

    def copy(self, dtype: torch.dtype) -> "Problem":
        leaves = {
            name: None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)
            for name, t in self.leaves.items()
        }
        weight = None if self.token_weight is None else self.token_weight.detach().clone()
        if weight is not None:
            weight.requires_grad_(self.token_weight.requires_grad)
        return Problem(leaves, self.labels.long(), weight, self.reference, self.options, {}, None)

    @property
    def low_rank(self) -> dict:
        left = self.leaves["left"]
        return {} if left is None else {"low_rank": (left, self.leaves["right"])}

    def learned(self) -> dict[str, torch.Tensor]:
        every = {**self.leaves, "token_weight": self.token_weight}
        return {name: t for name, t in every.items() if t is not None and t.requires_grad}


def problem(choose: random.Random, several: bool) -> Problem:
    generator = torch.Generator().manual_seed(choose.randrange(1 << 30))
    dtype = choose.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    n, d, v = (choose.choice(sizes) for sizes in ([0, 1, 2, 5, 33, 63], [1, 2, 3, 17, 72], [1, 2, 3, 50, 65, 200, 507]))
    scale = choose.choice([0.1, 1, 3, 30])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def leaf(t, dtype=dtype):
        return strided(t.to(dtype), choose).detach().requires_grad_(choose.random() < 0.65)

    bias = normal(v) if choose.random() < 0.5 else None
    shape = (n, choose.randint(1, 4)) if several and choose.random() < 0.4 else (n,)
    labels = torch.randint(0, v, shape, generator=generator)
    forbids = bias is not None and v > 3 and choose.random() < 0.4
    if forbids:
        bias[torch.randperm(v, generator=generator)[: v // 3]] = -math.inf
        allowed = bias.isfinite().nonzero().squeeze(1)
        labels = allowed[torch.randint(len(allowed), shape, generator=generator)]
    labels[torch.rand(shape, generator=generator) < choose.choice([0, 0.3, 0.3, 1.0])] = -100
    options = {}
    for name, values in (("softcap", [2.0, 30.0]), ("logit_scale", [0.1, 2.0]), ("temperature", [0.3, 2.0])):
        if choose.random() < 0.4:
            options[name] = choose.choice(values)
    left = right = None
    if choose.random() < 0.4:
        rank, factors = choose.choice([0, 1, 3, 8]), choose.choice([dtype, torch.float32])
        factors = factors if dtype.itemsize == 2 else dtype
        left, right = leaf(normal(n, rank), factors), leaf(normal(v, rank) * scale / max(rank, 1) ** 0.5, factors)
    given = (leaf(normal(n, d)), leaf(normal(v, d) * scale / d**0.5), None if bias is None else leaf(bias), left, right)
    token_weight = None
    if choose.random() < 0.6:
        token_weight = normal(*shape).to(torch.promote_types(dtype, torch.float32))
        token_weight[torch.rand(shape, generator=generator) < 0.2] = 0
        token_weight.requires_grad_(choose.random() < 0.3)
    wide = choose.choice([1, 5, 40])
    return Problem(
        dict(zip(NAMES, given, strict=True)),
        labels.to(choose.choice([torch.int64, torch.int64, torch.int32])),
        token_weight,
        (normal(n, wide).to(dtype), (normal(v, wide) * scale / wide**0.5).to(dtype)),
        options,
        {"workspace_mb": choose.choice([None, None, 0.3])},
        choose.choice([None, None, n, n + 3]),
    )


def call_logprob(choose):
    asked = {f"return_{name}": choose.random() < 0.5 for name in ("lse", "entropy", "argmax")}
    smoothing = choose.choice([0.0, 0.0, 0.2])

    def call(p: Problem, dtype=None):
        h, w, b = (p.leaves[name] for name in NAMES[:3])
        forbids = b is not None and bool(b.isinf().any())
        options = {**asked, **p.options, **p.low_rank, "label_smoothing": 0.0 if forbids else smoothing}
        if dtype:
            return linear_logprob_ref(h, w, p.labels, b, dtype=dtype, **options)
        return linear_logprob(h, w, p.labels, b, num_active=p.num_active, **options, **p.workspace)

    return call


def call_weighted_nll(choose):
    asked = {"reduction": choose.choice(["sum", "mean", "none"]), "z_loss": choose.choice([0.0, 0.01])}
    engine = choose.choice(["auto", "two_pass"])

    def call(p: Problem, dtype=None):
        h, w, b = (p.leaves[name] for name in NAMES[:3])
        given, options = (h, w, p.labels, p.token_weight, b), {**asked, **p.options, **p.low_rank}
        if dtype:
            return linear_weighted_nll_ref(*given, dtype=dtype, **options)
        return linear_weighted_nll(*given, engine=engine, num_active=p.num_active, **options, **p.workspace)

    return call


def call_token_loss(choose):
    engine = choose.choice(["auto", "two_pass"])

    def token_loss(logp, entropy):
        return logp.exp() * logp - 0.1 * entropy

    def call(p: Problem, dtype=None):
        h, w, b = (p.leaves[name] for name in NAMES[:3])
        options = {**p.options, **p.low_rank}
        if dtype:
            outputs = linear_logprob_ref(h, w, p.labels, b, return_entropy=True, dtype=dtype, **options)
            return token_loss(*outputs).where(p.labels != -100, 0.0).sum()
        options |= {"engine": engine, "num_active": p.num_active}
        return linear_token_loss(h, w, p.labels, token_loss, (), b, entropy=True, **options, **p.workspace)

    return call


def call_token_kl(choose):
    asked = {"direction": choose.choice(["reverse", "forward"]), "reduction": choose.choice(["none", "sum"])}

    def call(p: Problem, dtype=None):
        h, w, b = (p.leaves[name] for name in NAMES[:3])
        # one set of forbidden tokens: KL(p||q) is infinite where q alone forbids
        of_ref = {f"ref_{name}": value for name, value in p.options.items()}
        given = (h, w, *p.reference, p.labels, b, None if b is None else b.detach())
        options = {**asked, **p.options, **of_ref, **p.low_rank, "token_weight": p.token_weight}
        if dtype:
            return linear_token_kl_ref(*given, dtype=dtype, **options)
        return linear_token_kl(*given, **options, **p.workspace)

    return call


CALLS = {"logprob": call_logprob, "weighted_nll": call_weighted_nll, "token_loss": call_token_loss, "kl": call_token_kl}


def results(call, p: Problem, dtype=None):
    """The floating outputs, and the gradients of their sum under random upstream gradients."""
    outputs = call(p, dtype)
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    total = sum((t.double() * torch.randn(t.shape, generator=generator).double()).sum() for t in outputs)
    learned = {name: t for name, t in p.learned().items() if t.numel()}
    if not learned or not total.requires_grad:
        return [t.detach() for t in outputs], {}
    gradients = torch.autograd.grad(total, list(learned.values()), allow_unused=True)
    return [t.detach() for t in outputs], dict(zip(learned, gradients, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_twin(seed, small_tiles):
    choose = random.Random(seed)
    name = choose.choice(list(CALLS))
    p = problem(choose, several=name in ("logprob", "weighted_nll"))
    dtype, call = p.leaves["hidden"].dtype, CALLS[name](choose)
    backend = "torch" if dtype == torch.float64 else choose.choice(BACKENDS)
    with use_backend(backend):
        outputs, gradients = results(call, p)
    truths, exact = results(call, p.copy(torch.float64), torch.float64)
    _, own = results(call, p.copy(dtype), dtype)
    # sizes of 1 and cancelling sums are among these cases: a constant of the logits' size bounds what is 0 in truth
    largest = max(1.0, p.leaves["weight"].detach().abs().max().item() * 8)
    noise = {torch.float64: 2.0**-44, torch.float32: 2.0**-18, torch.bfloat16: 2.0**-9}[dtype] * largest
    for got, truth in zip(outputs, truths, strict=True):
        assert got.shape == truth.shape
        fine = noise if dtype != torch.bfloat16 else 2.0**-18 * largest
        size = truth.abs().max().item() if truth.numel() else 0.0
        terms = max(1, p.labels.numel()) if truth.dim() == 0 else 1
        assert ((got.double() - truth).abs() <= terms * fine + 2.0**-17 * size).all(), (name, dtype)
    for leaf, truth in exact.items():
        got = gradients.get(leaf)
        assert got is not None or truth is None or not truth.any(), leaf
        if got is None or truth is None:
            continue
        assert got.isfinite().all(), leaf
        bound = {torch.float64: 2.0**-38, torch.float32: 2.0**-16, torch.bfloat16: 2.0**-7}[got.dtype] * rms(truth)
        bound = max(bound, 4 * rms(own[leaf].double() - truth)) + noise
        assert rms(got.double() - truth) <= bound, (name, leaf, dtype)
