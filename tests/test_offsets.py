"""A common offset of all logits costs no digits beyond those that it takes from the logits themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerance import rms
from var_kernels.ops import linear_logprob, linear_token_loss, linear_weighted_nll

N, D, V = 48, 24, 301
OFFSETS = [0.0, 30.0, 1e3, -1e3, 1e4]


def problem(offset: float, dtype=torch.float32):
    """hidden[:, 0] = 1 and lm_head_weight[:, 0] = offset: every logit is raised by it, and no probability changes.

    The first column of dhidden is offset times a row's sum of dlogits, which is 0: it shows their common error.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).mul(2 / D**0.5).to(dtype)
    hidden[:, 0], weight[:, 0] = 1, offset
    return hidden, weight, torch.randint(0, V, (N,), generator=generator), torch.randn(N, generator=generator)


def recomputed(hidden, weight, labels, upstream):
    return (linear_logprob(hidden, weight, labels, workspace_mb=0.3) * upstream).sum()


def cached(hidden, weight, labels, upstream):
    return (linear_logprob(hidden, weight, labels) * upstream).sum()


def one_pass(hidden, weight, labels, upstream):
    return linear_weighted_nll(hidden, weight, labels, -upstream, engine="one_pass")


def with_entropy(hidden, weight, labels, upstream):
    def loss(logp, entropy, u):
        return logp * u + 0.0 * entropy

    return linear_token_loss(hidden, weight, labels, loss, (upstream,), entropy=True, engine="one_pass")


MODES = [recomputed, cached, one_pass, with_entropy]


def gradients(mode, hidden: Tensor, weight: Tensor, labels, upstream, frozen: bool):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    return torch.autograd.grad(mode(hidden, weight, labels, upstream), [hidden] if frozen else [hidden, weight])


def plain(hidden, weight, labels, upstream):
    return -(F.cross_entropy(hidden @ weight.T, labels, reduction="none") * upstream).sum()


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen head"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_are_as_close_as_plain_torch_s(offset, mode, frozen, target, small_tiles):
    tensors = [t.to(target.device) for t in problem(offset)]
    exact = gradients(plain, *(t.double() if t.is_floating_point() else t for t in tensors), frozen)
    own = gradients(plain, *tensors, frozen)
    got = gradients(mode, *tensors, frozen)
    for name, g, o, e in zip(("dhidden", "dweight"), got, own, exact, strict=False):
        bound = max(3 * rms(o - e), 2.0**-20 * rms(e))
        assert rms(g - e) <= bound, f"{name}: rms error {rms(g - e):.2e} above {bound:.2e}"
        peak, limit = (g - e).abs().max().item(), max(3 * (o - e).abs().max().item(), 2.0**-20 * e.abs().max().item())
        assert peak <= limit, f"{name}: largest error {peak:.2e} above {limit:.2e}"
