"""The pair kernels alone, in every backend, against both models' log-softmax in fp64."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from tests.mutation import mutant_of
from tests.tolerance import assert_gradient, assert_result
from var_kernels.kernels import pairs, pairs_torch, rows_native
from var_kernels.kernels.pairs import KINDS, PairOptions, divergence_of, empty_state
from var_kernels.kernels.rows import LogitTransform
from var_kernels.ops.backend import choose_backend, pair_kernels

FP64, BF16 = torch.float64, torch.bfloat16
INF = float("inf")


@dataclass(frozen=True)
class Tiles:
    """Two tiles and their options. near: the reference's logits are the policy's and noise of that size; offset: added
    to all of the policy's logits; slices: of the vocabulary.
    """

    id: str
    shape: tuple[int, int] = (9, 507)
    dtype: torch.dtype = torch.float32
    ref_dtype: torch.dtype | None = None
    out: torch.dtype | None = None
    scale: float = 3.0
    near: float | None = None
    offset: float = 0.0
    slices: int = 1
    bias: bool = False
    transforms: tuple[LogitTransform, LogitTransform] = (LogitTransform(), LogitTransform())

    def tensors(self, device):
        """Raw logits in rows further apart than they are long, NaN between them; biases."""
        n, columns = self.shape
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator) * self.scale

        z, w = normal(n, columns), normal(n, columns)
        if self.near is not None:
            w = z + self.near * w
        biases = (normal(columns).to(device), normal(columns).to(device)) if self.bias else (None, None)
        tiles = []
        for values, dtype in ((z + self.offset, self.dtype), (w, self.ref_dtype or self.dtype)):
            storage = torch.full((n, -(-columns // 32) * 32 + 32), torch.nan, dtype=dtype, device=device)
            storage[:, :columns] = values.to(device)
            tiles.append(storage[:, :columns])
        return *tiles, *biases


CASES = [
    Tiles("plain"),
    Tiles("whole vectors", shape=(5, 512)),
    Tiles("several blocks", shape=(3, 2600), slices=2),
    Tiles("slices", slices=4),
    Tiles("flat", scale=0.1, slices=3),
    Tiles("confident", scale=30.0, slices=3),
    Tiles("nearly equal", near=1e-3, slices=3),
    Tiles("offset of one side", offset=1e3, slices=3),
    Tiles("one column", shape=(4, 1)),
    Tiles("bias", bias=True, slices=3),
    Tiles("temperatures", transforms=(LogitTransform(temperature=0.7), LogitTransform(temperature=2.0))),
    Tiles(
        "softcaps",
        bias=True,
        slices=2,
        transforms=(LogitTransform(0.5, 5.0, 0.7), LogitTransform(softcap=3.0, temperature=1.5)),
    ),
    Tiles("bf16 gradient", out=BF16, slices=2),
    Tiles("bf16 tiles", dtype=BF16),
    Tiles("bf16 reference", ref_dtype=BF16, slices=2),
    Tiles("fp16 gradient", out=torch.float16),
    Tiles("fp64", dtype=FP64, slices=3, bias=True),
]

_BY_ID = {case.id: case for case in CASES}


def reference(z, w, biases, pair: PairOptions, dtype=FP64):
    """Divergence and its gradient in the raw logits, with all of both models' log-probs."""
    raw = z.detach().to(dtype).requires_grad_()
    biases = [0.0 if b is None else b.to(dtype) for b in biases]
    logp = pair.transform.apply(raw + biases[0]).log_softmax(1)
    logq = pair.ref_transform.apply(w.to(dtype) + biases[1]).log_softmax(1)

    def kl(a, b):
        return (a.exp() * (a - b)).masked_fill(a.exp() == 0, 0.0).sum(1)

    if pair.kind == "jsd":
        logm = torch.logaddexp(logq + math.log(pair.beta), logp + math.log(1 - pair.beta))
        value = pair.beta * kl(logq, logm) + (1 - pair.beta) * kl(logp, logm)
    else:
        value = kl(logp, logq) if pair.kind == "reverse" else kl(logq, logp)
    return value, raw


def run(kernels, case: Tiles, pair: PairOptions, tensors, upstream, *, together: bool = False):
    """State and gradient through the kernels, slice by slice, or all stages at once."""
    z, w, bias, ref_bias = tensors
    n, columns = z.shape
    state = empty_state(n, FP64 if case.dtype == FP64 else torch.float32, z.device)
    out = case.out or case.dtype
    jsd = pair.needs_whole_rows
    if together:  # into other memory
        grad, before = torch.empty(n, columns + 7, dtype=out, device=z.device)[:, :columns], z.clone()
        got = kernels.pair_rows(
            z, w, state, pair, bias, ref_bias, stats=True, mixture=jsd, upstream_n=upstream, out_nv=grad
        )
        assert got is grad
        assert torch.equal(z, before)
        return state, grad
    edges = [columns * i // case.slices for i in range(case.slices + 1)]
    parts = [slice(a, b) for a, b in pairwise(edges)]

    def sliced(part):
        return z[:, part], w[:, part], state, pair, *(None if b is None else b[part] for b in (bias, ref_bias))

    for part in parts:
        kernels.pair_rows(*sliced(part), stats=True)
    for part in parts if jsd else ():
        kernels.pair_rows(*sliced(part), mixture=True)
    return state, torch.cat(
        [kernels.pair_rows(*sliced(part), upstream_n=upstream, out_dtype=out).clone() for part in parts], 1
    )


def kernels_for(device, dtype):
    return pair_kernels(choose_backend(torch.device(device), dtype)[0])


def check(kernels, case: Tiles, kind: str, device="cpu", together=False, beta=0.3):
    pair = PairOptions(kind, beta, *case.transforms)
    tensors = case.tensors(device)
    z, w = tensors[0].clone(), tensors[1].clone()
    upstream = torch.linspace(-1, 2, case.shape[0], device=device)
    state, grad = run(kernels, case, pair, tensors, upstream, together=together)
    truth, raw = reference(z, w, tensors[2:], pair)
    (truth * upstream).sum().backward()
    own, own_raw = reference(z, w, tensors[2:], pair, FP64 if case.dtype == FP64 else torch.float32)
    (own * upstream).sum().backward()
    assert torch.equal(tensors[1].nan_to_num(), w.nan_to_num()), "the reference's tile changed"
    value = divergence_of(state, pair)
    assert_result(value if case.dtype == FP64 else value.float(), truth.detach(), kind)
    assert grad.dtype == (case.out or case.dtype)
    assert_gradient(grad, raw.grad, own_raw.grad.to(grad.dtype), f"gradient of {kind}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_whole_log_softmax(case, kind, target, small_tiles):
    for dtype in (case.dtype, case.out or case.dtype):
        target.require(dtype)
    check(kernels_for(target.device, case.dtype), case, kind, target.device)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_at_once_are_stages_in_turn(kind, target, small_tiles):
    kernels = kernels_for(target.device, torch.float32)
    case, pair = Tiles("", bias=True, out=BF16), PairOptions(kind, 0.3)
    upstream = torch.linspace(-1, 2, 9, device=target.device)
    found = [
        run(kernels, case, pair, case.tensors(target.device), upstream, together=together) for together in (False, True)
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", range(3))
def test_every_instruction_set(level, kind, monkeypatch):
    if rows_native.obstacle() or level > rows_native.best_level():
        pytest.skip("not on this machine")
    monkeypatch.setattr(rows_native, "LEVEL", level)
    for case in ("bias", "several blocks", "softcaps", "bf16 gradient"):
        check(pair_kernels("native"), _BY_ID[case], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind, target, small_tiles):
    """|z| of 1e4, ties, a distribution that is one token."""
    kernels = kernels_for(target.device, torch.float32)
    z = torch.tensor([[1e4, -1e4, 9.99e3, 0.0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, -1e4, 1e4 - 1], [-1e4, 0, 1, 2]])
    w = torch.tensor(
        [[9.998e3, -1e4, 9.99e3, 1e3], [1e4, 1e4, 1e4, 1e4], [1e4, 1e4 - 2, -1e4, 1e4 - 1], [0, 9, 1, 2.0]]
    )
    pair = PairOptions(kind, 0.3)
    truth, raw = reference(z, w, (None, None), pair)
    truth.sum().backward()
    z, w = z.to(target.device), w.to(target.device)
    state = empty_state(4, torch.float32, z.device)
    jsd = kind == "jsd"
    grad = kernels.pair_rows(z, w, state, pair, stats=True, mixture=jsd, upstream_n=torch.ones(4, device=z.device))
    # log-probs of thousands are differences of fp32 logits
    torch.testing.assert_close(divergence_of(state, pair).float().cpu(), truth.detach().float(), rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(grad.cpu(), raw.grad.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("slices", [1, 3])
def test_forbidden_tokens(target, slices, small_tiles):
    """-inf on one side: the KL that weighs it is inf, the others are finite; on both sides it is not there at all."""
    kernels = kernels_for(target.device, torch.float32)
    ones = torch.ones(9, device=target.device)
    case = Tiles("", slices=slices)

    def found(kind, hide_z, hide_w, columns=507):
        z, w, *_ = case.tensors(target.device)
        z, w = z[:, :columns].contiguous(), w[:, :columns].contiguous()
        for tile, hide in ((z, hide_z), (w, hide_w)):
            if hide:
                tile[:, 100:103] = tile[:, 400:] = -INF
        truth, raw = reference(z, w, (None, None), PairOptions(kind, 0.3))
        truth.nan_to_num(posinf=0.0).sum().backward()
        state, grad = run(kernels, replace(case, shape=(9, columns)), PairOptions(kind, 0.3), (z, w, None, None), ones)
        return divergence_of(state, PairOptions(kind, 0.3)).float(), grad, truth.detach(), raw.grad

    for kind in KINDS:
        value, grad, truth, _ = found(kind, True, True)
        if kind != "jsd":  # plain log-probs give -inf - -inf in the mixture
            assert_result(value, truth)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert not grad[:, 400:].any()
    assert found("reverse", False, True)[0].isposinf().all()
    assert found("forward", True, False)[0].isposinf().all()
    for kind, z, w in (("reverse", True, False), ("forward", False, True)):
        value, grad, truth, _ = found(kind, z, w)
        assert_result(value, truth)
        assert grad.isfinite().all()
    # p forbids what q allows: the gradient of KL(q||p) keeps its limit, p - q
    _, grad, _, _ = found("forward", True, False)
    z, w, *_ = case.tensors("cpu")
    torch.testing.assert_close(grad[:, 400:].cpu(), -w.softmax(1)[:, 400:], rtol=1e-5, atol=1e-8)
    for z, w in ((True, False), (False, True)):
        value, grad, *_ = found("jsd", z, w)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert (value > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind, target):
    kernels = kernels_for(target.device, torch.float32)
    for side in (0, 1):
        tensors = Tiles("").tensors(target.device)
        tensors[side][4, 77] = torch.nan
        pair = PairOptions(kind)
        state, _ = run(kernels, Tiles(""), pair, tensors, torch.ones(9, device=target.device))
        assert state[4 if kind != "jsd" else 5, 4].isnan()
        assert state[4, :4].isfinite().all()


def test_the_jsd_goes_over_into_both_divergences():
    """JSD / beta -> KL(q||p) for beta -> 0, JSD / (1 - beta) -> KL(p||q) for beta -> 1, values and gradients."""
    tensors = Tiles("", dtype=FP64, scale=1.0).tensors("cpu")
    ones = torch.ones(9, dtype=FP64)

    def of(kind, beta):
        z, w = tensors[0].clone(), tensors[1].clone()
        state, grad = run(pairs_torch, Tiles("", dtype=FP64), PairOptions(kind, beta), (z, w, None, None), ones)
        return divergence_of(state, PairOptions(kind, beta)), grad

    for kind, beta, share in (("forward", 1e-7, 1e-7), ("reverse", 1 - 1e-7, 1e-7)):
        for got, expected in zip(of("jsd", beta), of(kind, 0.0), strict=True):
            torch.testing.assert_close(got / share, expected, rtol=1e-4, atol=1e-6)


# Text of the kernels in plain torch, what replaces it, the divergence and the case that must notice.
_MIX = "pair.beta * q_nv + (1 - pair.beta) * p_nv"
_EXP = "z_nv.exp(), w_nv.exp()"
MUTANTS = {
    "roles changed": ("(exp_w_nv, w_nv, z_nv)", "(exp_w_nv, z_nv, w_nv)", "forward", "plain"),
    "no mean": (".sub_(mean_n.unsqueeze(1))", "", "reverse", "plain"),
    "mixture's weights changed": (_MIX, "pair.beta * p_nv + (1 - pair.beta) * q_nv", "jsd", "plain"),
    "mixture without its mean": (".sub_(state_6[4].to(math).unsqueeze(1))", "", "jsd", "plain"),
    "half the mixture": ("above_nv.mul_(p_nv).mul_(1 - pair.beta)", "above_nv.mul_(p_nv)", "jsd", "plain"),
    "no slope of the softcap": (".neg_().add_(1.0))", ".mul_(0).add_(1.0))", "forward", "softcaps"),
    "no temperature": ("* transform.slope)", ")", "forward", "temperatures"),
    "last column dropped": (_EXP, f"{_EXP}.index_fill_(1, torch.tensor([w_nv.shape[1] - 1]), 0.0)", "forward", "flat"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_refused(name, tmp_path, small_tiles):
    before, after, kind, case = MUTANTS[name]
    check(pairs_torch, _BY_ID[case], kind)
    with pytest.raises(AssertionError):
        check(mutant_of(pairs_torch, before, after, tmp_path), _BY_ID[case], kind)


MOVES = {
    "terms above the wrong maximum": (" + (drop_a_N - drop_b_N) * sum_a_N", ""),
    "a slice without decay": ("state_6N[1] *= drop_z_N.exp()", "pass"),
}


@pytest.mark.parametrize("name", MOVES)
def test_wrong_move_is_refused(name, tmp_path, monkeypatch, small_tiles):
    monkeypatch.setattr(pairs_torch, "raise_maxima_", mutant_of(pairs, *MOVES[name], tmp_path).raise_maxima_)
    with pytest.raises(AssertionError):
        check(pairs_torch, _BY_ID["slices"], "reverse")


_MOVED = "moved = shifted + ((max_a - new_a) - (max_b - new_b)) * sum_a"
_UP = "upstream_ptr + row).to(tl.float32)"
TRITON_MUTANTS = {
    "tail counted": ('tl.where(mask, w, float("-inf"))', "w", "forward", "flat"),
    "lane without decay": ("sum_a * decay_a + 1.0", "sum_a + 1.0", "reverse", "several blocks"),
    "lane's terms not moved": (_MOVED, "moved = shifted", "reverse", "several blocks"),
    "slices not moved": ("decay * (shifted + (drop_a - drop_b) * sum_a)", "decay * shifted", "forward", "slices"),
    "no mean": ("- (w - pivot_w)) - mean)", "- (w - pivot_w)))", "reverse", "plain"),
    "no slope of the softcap": ("grad *= 1.0 - tanh * tanh", "grad *= 1.0", "reverse", "softcaps"),
    "no scale": (f"{_UP} * scale", _UP, "forward", "temperatures"),
    "no bias of the reference": ("_transformed(w, ref_bias_ptr", "_transformed(w, bias_ptr", "forward", "bias"),
    "mixture's sum lost": ("tl.load(second_ptr).to(tl.float32) + tl.sum(of_q, 0)", "tl.sum(of_q, 0)", "jsd", "slices"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted on machines without a GPU")
@pytest.mark.parametrize("name", TRITON_MUTANTS)
def test_triton_mutant_is_refused(name, tmp_path, small_tiles):
    pytest.importorskip("triton", reason="triton is not installed")
    from tests import triton_interpreter

    triton_interpreter.mend()
    from var_kernels.kernels import pairs_triton

    before, after, kind, case = TRITON_MUTANTS[name]
    check(pairs_triton, _BY_ID[case], kind)
    mutant = mutant_of(pairs_triton, before, after, tmp_path)
    mutant.BLOCK_COLUMNS = pairs_triton.BLOCK_COLUMNS
    with pytest.raises(AssertionError):
        check(mutant, _BY_ID[case], kind)
