# ruff: noqa: E501 (a table: one mistake a line)
"""What ``linear_token_kl`` refuses, and in which words."""

import pytest
import torch

from var_kernels.ops import linear_token_kl

H, W, RH, RW, LABELS = torch.randn(6, 4), torch.randn(9, 4), torch.randn(6, 3), torch.randn(9, 3), torch.arange(6)
LEFT, RIGHT = torch.randn(6, 2), torch.randn(9, 2)


def call(h=H, w=W, rh=RH, rw=RW, labels=LABELS, *rest, **options):
    return linear_token_kl(h, w, rh, rw, labels, *rest, **options)


BAD = {
    "direction": (lambda: call(direction="jensen"), ValueError, "direction must be one of 'reverse', 'forward', 'jsd', got 'jensen'"),
    "beta 0": (lambda: call(direction="jsd", beta=0.0), ValueError, r"beta must lie between 0 and 1, got 0.0; its limits are direction='forward'"),
    "beta of text": (lambda: call(direction="jsd", beta="half"), TypeError, "beta must be a number, got str"),
    "reduction": (lambda: call(reduction="mean"), ValueError, "reduction must be one of 'none', 'sum'"),
    "one pass, no scalar": (lambda: call(engine="one_pass"), ValueError, "engine='one_pass' needs one scalar"),
    "another vocabulary": (lambda: call(rw=torch.randn(8, 3)), ValueError, r"ref_lm_head_weight must have shape \(9, D_ref\).*one tokenizer"),
    "another number of rows": (lambda: call(rh=torch.randn(5, 3)), ValueError, r"ref_hidden must have shape \(6, 3\).*got \(5, 3\)"),
    "another width": (lambda: call(rh=torch.randn(6, 4)), ValueError, r"ref_hidden must have shape \(\.\.\., 3\) to match ref_lm_head_weight \(9, 3\)"),
    "ref_bias": (lambda: call(H, W, RH, RW, LABELS, None, torch.zeros(8)), ValueError, r"ref_bias must have shape \(9,\)"),
    "mixed reference": (lambda: call(rw=RW.bfloat16()), TypeError, "ref_lm_head_weight is torch.bfloat16 but ref_hidden is torch.float32.*autocast"),
    "mixed policy": (lambda: call(w=W.bfloat16()), TypeError, "lm_head_weight is torch.bfloat16 but hidden"),
    "reference of integers": (lambda: call(rh=RH.long()), TypeError, "ref_hidden must be floating point.*got torch.int64; pass the hidden states"),
    "no reference": (lambda: call(rw=None), TypeError, "ref_lm_head_weight must be a torch.Tensor, got NoneType"),
    "no head": (lambda: call(w=None), TypeError, "lm_head_weight must be a torch.Tensor, got NoneType"),
    "ref_softcap of text": (lambda: call(ref_softcap="30"), TypeError, "softcap must be a number, got str"),
    "another device": (lambda: call(rw=RW.to("meta")), ValueError, "ref_lm_head_weight must be on cpu like ref_hidden, got meta"),
    "labels of tokens": (lambda: call(labels=LABELS[1:]), ValueError, r"labels must have shape \(6,\).*nothing is shifted"),
    "several targets": (lambda: call(labels=LABELS.unsqueeze(1)), ValueError, r"labels must have shape \(6,\)"),
    "a float mask": (lambda: call(labels=torch.ones(6)), TypeError, "labels must be int64 or int32"),
    "ref_low_rank of one tensor": (lambda: call(ref_low_rank=LEFT), TypeError, "ref_low_rank must be a pair of tensors.*got Tensor"),
    "ref_low_rank of the policy's rows": (lambda: call(ref_low_rank=(LEFT[:5], RIGHT)), ValueError, r"ref_low_rank must have the shapes left \(6, 'R'\).*row of ref_hidden"),
    "ref_low_rank of two dtypes": (lambda: call(ref_low_rank=(LEFT, RIGHT.bfloat16())), TypeError, "ref_low_rank must be of one dtype, torch.float32 beside ref_hidden"),
    "ref_low_rank elsewhere": (lambda: call(ref_low_rank=(LEFT, RIGHT.to("meta"))), ValueError, "ref_low_rank's right must be on cpu like ref_hidden, got meta"),
    "low_rank of another vocabulary": (lambda: call(low_rank=(LEFT, RIGHT[:8])), ValueError, r"^low_rank must have the shapes.*right \(9, R\)"),
    "ref_temperature": (lambda: call(ref_temperature=0.0), ValueError, "temperature must be positive"),
    "weight a sequence": (lambda: call(token_weight=torch.ones(2)), ValueError, r"token_weight must have the shape of labels, \(6,\)"),
    "too small": (lambda: linear_token_kl(*(torch.randn(s) for s in ((6, 4), (30_000, 4), (6, 4), (30_000, 4))), workspace_mb=1e-4), ValueError, "workspace_mb=.* is too small for the forward pass"),
}  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "message"), BAD.values(), ids=BAD.keys())
def test_refused_by_name(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()
