"""The sides of the comparison of divergences: each takes hidden, weight, ref_hidden, ref_weight and gives the sum of
all rows' divergences.

Other libraries are called as their published versions want it: liger-kernel 0.8.5, trl 1.16.0, flash-linear-attention
0.6.0.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from var_kernels import linear_token_kl
from var_kernels.reference import linear_token_kl_ref

MIB = 1 << 20
GEMMS = 4  # of the forward and backward, which no side can do without
BETAS = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}  # TRL's and Liger's names of the three


@dataclass(frozen=True)
class Divergence:
    """module: must import; None: ours, or torch's own. triton: its kernels need a GPU, or the interpreter
    (TRITON_INTERPRET=1).
    """

    direction: str
    loss: Callable
    module: str | None = None
    triton: bool = False


def _ours(direction: str, reduction: str = "sum", *, stored: bool = False):
    def loss(hidden, weight, ref_hidden, ref_weight):
        n, v = hidden.shape[0], weight.shape[0]
        # the gradient in all logits and tiles of 64 rows; the default may not hold it, and 6 GEMMs run
        budget = (n * v * hidden.itemsize + 64 * v * 8) / MIB + 64 if stored else None
        options = {"direction": direction, "reduction": reduction, "workspace_mb": budget}
        return linear_token_kl(hidden, weight, ref_hidden, ref_weight, **options).sum()

    return loss


def _plain(hidden, weight, ref_hidden, ref_weight):
    logp, logq = (F.linear(*pair).float().log_softmax(-1) for pair in ((hidden, weight), (ref_hidden, ref_weight)))
    return F.kl_div(logp, logq, log_target=True, reduction="sum")


def _trl(direction: str):
    def loss(hidden, weight, ref_hidden, ref_weight):
        from trl.experimental.gkd import GKDTrainer

        both = F.linear(hidden, weight)[None], F.linear(ref_hidden, ref_weight)[None]
        return GKDTrainer.generalized_jsd_loss(*both, beta=BETAS[direction], reduction="sum")

    return loss


def _liger(direction: str):
    def loss(hidden, weight, ref_hidden, ref_weight):
        from liger_kernel.transformers.functional import liger_fused_linear_jsd

        return liger_fused_linear_jsd(hidden, weight, ref_hidden, ref_weight, None, BETAS[direction]) * len(hidden)

    return loss


def _liger_chunked(direction: str):
    def loss(hidden, weight, ref_hidden, ref_weight):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        op = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[direction], compiled=hidden.is_cuda
        )
        found = op(hidden, weight, ref_hidden, ref_weight, labels)
        return (found if isinstance(found, Tensor) else found[0]) * len(hidden)

    return loss


def _fla(hidden, weight, ref_hidden, ref_weight):
    from fla.modules.fused_kl_div.ops import fused_kl_div_loss

    return fused_kl_div_loss(hidden, ref_hidden, weight, ref_weight) * len(hidden)


SIDES = {
    **{f"ours, {direction}": Divergence(direction, _ours(direction)) for direction in BETAS},
    **{f"ours, {d}, a value each": Divergence(d, _ours(d, "none")) for d in BETAS},
    **{f"ours, {d}, a value each, stored": Divergence(d, _ours(d, "none", stored=True)) for d in BETAS},
    "plain, forward": Divergence("forward", _plain),
}
for _d in BETAS:
    SIDES[f"trl, {_d}"] = Divergence(_d, _trl(_d), module="trl.experimental.gkd")
    SIDES[f"liger, {_d}"] = Divergence(_d, _liger(_d), module="liger_kernel.transformers.functional", triton=True)
    SIDES[f"liger, chunked, {_d}"] = Divergence(_d, _liger_chunked(_d), module="liger_kernel.chunked_loss")
SIDES["fla, forward"] = Divergence("forward", _fla, module="fla.modules.fused_kl_div.ops", triton=True)


def obstacle(name: str, on_cpu: bool) -> str | None:
    """Why a side cannot run here at all, or None."""
    side = SIDES[name]
    if side.module is None:
        return None
    try:
        importlib.import_module(side.module)
    except Exception as error:  # some fail with a TypeError or a missing symbol
        return f"does not import: {type(error).__name__}: {error}".replace("\n", " ")
    if on_cpu and side.triton and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU, imports"
    return None


def two_heads(n: int, d: int, v: int, dtype: torch.dtype, device="cpu", spread: float = 3.0) -> tuple[Tensor, ...]:
    """hidden, weight (leaves), ref_hidden, ref_weight; logits of deviation ``spread``."""
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        found.append(torch.randn(n, d, device=device).to(dtype))
        found.append((torch.randn(v, d, device=device) * (spread * d**-0.5)).to(dtype))
    return found[0].requires_grad_(), found[1].requires_grad_(), *found[2:]


def errors(name: str, tensors: tuple[Tensor, ...]) -> dict[str, float]:
    """Of the sum and of both gradients, relative to fp64 from the same rounded tensors."""
    side = SIDES[name]
    wide = [t.detach().double() for t in tensors]
    leaves = [t.requires_grad_() for t in wide[:2]]
    truth = linear_token_kl_ref(*leaves, *wide[2:], direction=side.direction, beta=0.5).sum()
    own = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    got = side.loss(*own)
    expected, found = torch.autograd.grad(truth, leaves), torch.autograd.grad(got, own[:2])
    pairs = zip(("value", "dhidden", "dweight"), (got, *found), (truth, *expected), strict=True)
    return {f"{what}_error": ((a.double() - b).norm() / b.norm()).item() for what, a, b in pairs}
