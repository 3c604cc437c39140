"""The cases that the tests of ``linear_token_kl`` run over, and the comparison: ours, the fp64 twin, plain torch."""

from dataclasses import dataclass, field

import torch

from tests.op_cases import Case
from tests.tolerance import assert_gradient, assert_result
from var_kernels.ops import linear_token_kl
from var_kernels.reference import linear_token_kl_ref

FP64, BF16 = torch.float64, torch.bfloat16
N, D, V, D_REF = 63, 72, 507, 40
SMALL = Case("")


@dataclass(frozen=True)
class KLCase:
    """One regime: the policy's ``Case``, and what the reference is. near: how far its logits lie from the policy's.
    factors, ref_factors: the dtype of a low-rank term, or None.
    """

    id: str
    policy: Case = SMALL
    ref_dtype: torch.dtype | None = None
    ref_bias: bool = False
    ref_options: dict = field(default_factory=dict)
    near: float | None = None
    workspace_mb: float | None = None
    factors: torch.dtype | None = None
    ref_factors: torch.dtype | None = None
    frozen_factors: tuple[str, ...] = ()

    def inputs(self, device):
        hidden, weight, labels, bias = self.policy.inputs(device)
        dtype = self.ref_dtype or self.policy.dtype
        ref = Case(
            "",
            dtype=dtype,
            shape=(*self.policy.shape[:1], D_REF, self.policy.shape[2]),
            bias=self.ref_bias,
            logits=self.policy.logits,
            offset=self.policy.offset,
        )
        ref_hidden, ref_weight, _, ref_bias = ref.inputs(device, seed=1)
        if self.near is not None:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight)
            ref_hidden, ref_weight = hidden, weight + self.near * noise
        return (
            hidden,
            weight,
            labels,
            bias,
            *(None if t is None else t.detach() for t in (ref_hidden, ref_weight, ref_bias)),
        )

    def low_rank(self, device):
        """The policy's factors, leaves, and the reference's, of another rank; Nones where there are none."""
        left, right = (None, None)
        if self.factors is not None:
            left, right = self.policy.low_rank(self.factors, device=device)
            left.requires_grad_("left" not in self.frozen_factors)
            right.requires_grad_("right" not in self.frozen_factors)
        of_ref = (None, None)
        if self.ref_factors is not None:
            of_ref = self.policy.low_rank(self.ref_factors, rank=2, device=device)
        return left, right, *of_ref

    def workspace(self, engine: str) -> dict:
        if self.workspace_mb is not None:
            return {"workspace_mb": self.workspace_mb}
        if not self.policy.tight:
            return {}
        if engine == "one_pass" and self.policy.dtype == BF16:
            return {"workspace_mb": 0.3}  # and an fp32 dW
        return {"workspace_mb": 0.15 if self.policy.dtype == FP64 else 0.08}


def run_case(case: KLCase, direction: str, engine: str, device: str, ref_grad: bool = False) -> None:
    """Values and every gradient under a non-uniform upstream gradient; with ref_grad those of the reference too."""
    policy = case.policy
    hidden, weight, labels, bias, *constants = case.inputs(device)
    left, right, *ref_factors = case.low_rank(device)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(labels.shape, generator=generator, dtype=FP64).to(device)
    options = {**policy.options, **{f"ref_{name}": value for name, value in case.ref_options.items()}}

    def call(op, leaves, others, **rest):
        hidden, weight, bias, left, right = leaves
        ref_hidden, ref_weight, ref_bias, ref_left, ref_right = others
        low_rank = {} if left is None else {"low_rank": (left, right)}
        low_rank |= {} if ref_left is None else {"ref_low_rank": (ref_left, ref_right)}
        given = (hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias)
        return op(*given, direction=direction, **low_rank, **options, **rest)

    leaves, constants = (hidden, weight, bias, left, right), (*constants, *ref_factors)
    wide = upstream.to(torch.float64 if policy.dtype == FP64 else torch.float32)
    if ref_grad:
        constants = [None if t is None else t.detach().clone().requires_grad_() for t in constants]
    weighted = {} if engine == "two_pass" else {"token_weight": wide, "reduction": "sum", "engine": "one_pass"}
    kl = call(linear_token_kl, leaves, constants, ref_grad=ref_grad, **weighted, **case.workspace(engine))
    (kl * wide if engine == "two_pass" else kl).sum().backward()

    def reference(dtype):
        own = [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in leaves]
        others = [None if t is None else t.detach().to(dtype).requires_grad_(ref_grad) for t in constants]
        values = call(linear_token_kl_ref, own, others, dtype=dtype)
        total = (values * upstream.to(dtype)).sum()
        total.backward()
        return (values if engine == "two_pass" else total), [*own, *others]

    truth, truth_leaves = reference(FP64)
    _, own_leaves = reference(policy.dtype)
    scale = 1.0 if engine == "two_pass" else upstream.abs().sum().item()
    assert_result(kl / scale, truth / scale, "KL", policy.largest_logit)
    names = ("dhidden", "dweight", "dbias", "dleft", "dright")
    names += ("dref_hidden", "dref_weight", "dref_bias", "dref_left", "dref_right")
    for name, leaf, expected, own in zip(names, (*leaves, *constants), truth_leaves, own_leaves, strict=True):
        if leaf is not None and leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype
            dtype = leaf.dtype if name.startswith("dref") else policy.dtype
            assert_gradient(leaf.grad.to(dtype), expected.grad, own.grad.to(dtype), name)


def inputs(dtype=torch.float32):
    """hidden, weight, ref_hidden, ref_weight, labels of the plain case."""
    hidden, weight, labels, _, ref_hidden, ref_weight, _ = KLCase("", Case("", dtype=dtype)).inputs("cpu")
    return hidden, weight, ref_hidden, ref_weight, labels
