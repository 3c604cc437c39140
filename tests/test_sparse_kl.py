"""KL to a teacher's top-k log-probs against the full distributions."""

import pytest
import torch

from var_kernels import linear_logprob
from var_kernels.losses import sparse_token_kl

FP64 = torch.float64
N, D, V = 6, 5, 11


def both():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, q = (torch.randn(s, generator=generator, dtype=FP64) for s in ((N, D), (V, D), (N, V)))
    return hidden.requires_grad_(), weight.requires_grad_(), (2 * q).log_softmax(-1)


def full(hidden, weight, q, direction):
    p = (hidden @ weight.t()).log_softmax(-1)
    a, b = (q, p) if direction == "forward" else (p, q)
    return (a.exp() * (a - b)).sum(-1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_all_ids_but_one_are_the_whole_divergence(direction):
    """A bucket of one token is that token."""
    hidden, weight, q = both()
    values, ids = q.topk(V - 1)
    got = sparse_token_kl(linear_logprob(hidden, weight, ids), values, direction=direction)
    want = full(hidden, weight, q, direction)
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(t.sum(), (hidden, weight)) for t in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_bucket_is_that_of_the_sums(direction):
    hidden, weight, q = both()
    values, ids = q.topk(3)
    p = (hidden @ weight.t()).log_softmax(-1)
    coarse = []
    for logp in (p, q):
        top = logp.gather(1, ids).exp()
        coarse.append(torch.cat((top, 1 - top.sum(1, keepdim=True)), 1).log())
    a, b = coarse[::-1] if direction == "forward" else coarse
    got = sparse_token_kl(linear_logprob(hidden, weight, ids), values, direction=direction)
    torch.testing.assert_close(got, (a.exp() * (a - b)).sum(1))
    assert (got <= full(hidden, weight, q, direction) + 1e-12).all()  # coarser events tell less apart


def test_the_tail_left_out_and_places_without_a_token():
    hidden, weight, q = both()
    values, ids = q.topk(3)
    logp = linear_logprob(hidden, weight, ids)
    p, t = logp.log_softmax(-1), values.log_softmax(-1)
    torch.testing.assert_close(sparse_token_kl(logp, values, tail="drop"), (t.exp() * (t - p)).sum(1))
    padded = torch.cat((values, torch.full((N, 1), -torch.inf, dtype=FP64)), 1)
    more = linear_logprob(hidden, weight, torch.cat((ids, ids[:, :1]), 1))
    for tail in ("bucket", "drop"):
        got = sparse_token_kl(more, padded, tail=tail)
        torch.testing.assert_close(got, sparse_token_kl(logp, values, tail=tail))
        assert torch.autograd.grad(got.sum(), hidden, retain_graph=True)[0].isfinite().all()


def test_one_certain_token():
    """Nothing is left for a tail: finite, with a finite gradient."""
    logp = torch.tensor([[0.0], [-3.0]], requires_grad=True)
    got = sparse_token_kl(logp, torch.zeros(2, 1))
    assert got.isfinite().all()
    assert torch.autograd.grad(got.sum(), logp)[0].isfinite().all()
    assert got[0] < 1e-5 < got[1]


def test_refusals():
    with pytest.raises(ValueError, match=r"teacher_logp must have the shape of logp, \(2, 3\), got \(2, 2\)"):
        sparse_token_kl(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="tail"):
        sparse_token_kl(torch.zeros(2, 3), torch.zeros(2, 3), tail="sum")
