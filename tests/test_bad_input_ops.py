# ruff: noqa: E501 (a table: one mistake a line)
"""Mistakes at the two primitives: refused with the argument's name, what was expected, what came, and the remedy."""

import pytest
import torch

from var_kernels import linear_logprob, linear_weighted_nll

HIDDEN, WEIGHT = torch.randn(6, 4), torch.randn(9, 4)
LABELS, ONES = torch.arange(6), torch.ones(6)


def call(op=linear_logprob, hidden=HIDDEN, weight=WEIGHT, labels=LABELS, *rest, **options):
    return op(hidden, weight, labels, *rest, **options)


def weighted(token_weight=ONES, **options):
    return linear_weighted_nll(HIDDEN, WEIGHT, LABELS, token_weight, **options)


BAD = {
    "hidden no tensor": (lambda: call(hidden=[[1.0]]), TypeError, r"hidden must be a torch.Tensor, got list"),
    "hidden of integers": (lambda: call(hidden=HIDDEN.long()), TypeError, r"hidden must be floating point, .*got torch.int64; pass"),
    "hidden of 8 bit": (lambda: call(hidden=HIDDEN.to(torch.float8_e4m3fn)), TypeError, r"hidden must be floating point, of torch.float32, .*got torch.float8_e4m3fn; dequantise"),
    "an empty vocabulary": (lambda: call(weight=WEIGHT[:0], labels=LABELS - 200), ValueError, r"V of at least 1, got \(0, 4\)"),
    "scale of text": (lambda: call(logit_scale="2"), TypeError, r"logit_scale must be a number, got str"),
    "scale missing": (lambda: call(logit_scale=None), TypeError, r"logit_scale must be a number, got NoneType"),
    "temperature that learns": (lambda: call(temperature=torch.tensor(2.0, requires_grad=True)), TypeError, r"temperature must be a number, got Tensor; it is a constant here.*factor of hidden"),
    "softcap of text": (lambda: call(softcap="30"), TypeError, r"softcap must be a number, got str"),
    "workspace of text": (lambda: call(workspace_mb="64"), TypeError, r"workspace_mb must be a number, got str"),
    "no ignore_index": (lambda: call(ignore_index=None), TypeError, r"ignore_index must be a number, got NoneType"),
    "weight of 3 dimensions": (lambda: call(weight=WEIGHT[None]), ValueError, r"lm_head_weight must have shape \(V, D\)"),
    "other hidden size": (lambda: call(hidden=torch.randn(6, 5)), ValueError, r"hidden must have shape \(..., 4\).*got \(6, 5\)"),
    "transposed weight": (lambda: call(weight=WEIGHT.T), ValueError, r"hidden must have shape \(..., 9\)"),
    "transposed hidden": (lambda: call(hidden=torch.randn(6, 9)), ValueError, r"pass its transpose"),
    "labels shifted short": (lambda: call(labels=LABELS[1:]), ValueError, r"labels must have shape \(6,\).*nothing is shifted"),
    "labels one-hot floats": (lambda: call(labels=torch.rand(6)), TypeError, r"labels must be int64 or int32.*got torch.float32"),
    "no target ids": (lambda: call(labels=torch.empty(6, 0, dtype=torch.int64)), ValueError, r"at least one target id"),
    "label too large": (lambda: call(labels=LABELS + 5), ValueError, r"labels must be in \[0, 9\).*got 9 \(2 such"),
    "label negative": (lambda: call(labels=LABELS - 1), ValueError, r"labels must be in .*ignore_index=-100, got -1"),
    "bias too short": (lambda: call(linear_logprob, HIDDEN, WEIGHT, LABELS, torch.zeros(8)), ValueError, r"bias must have shape \(9,\)"),
    "bias no tensor": (lambda: call(linear_logprob, HIDDEN, WEIGHT, LABELS, 0.5), TypeError, r"bias must be a torch.Tensor, got float"),
    "mixed dtypes": (lambda: call(weight=WEIGHT.bfloat16()), TypeError, r"lm_head_weight is torch.bfloat16 but hidden is torch.float32.*autocast"),
    "bias of another dtype": (lambda: call(linear_logprob, HIDDEN, WEIGHT, LABELS, torch.zeros(9).double()), TypeError, r"bias is torch.float64"),
    "another device": (lambda: call(weight=WEIGHT.to("meta")), ValueError, r"lm_head_weight must be on cpu like hidden, got meta"),
    "scale 0": (lambda: call(logit_scale=0.0), ValueError, r"logit_scale must be finite and not 0"),
    "softcap 0": (lambda: call(softcap=0.0), ValueError, r"softcap must be positive.*pass None"),
    "temperature a row": (lambda: call(temperature=torch.ones(5)), TypeError, r"temperature must be a number, got Tensor of shape \(5,\); .*rows of each value.*labels of the others ignored"),
    "temperature 0": (lambda: call(temperature=0.0), ValueError, r"temperature must be positive.*got 0.0"),
    "temperature NaN": (lambda: call(temperature=float("nan")), ValueError, r"temperature must be positive"),
    "smoothing above 1": (lambda: call(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "unknown precision": (lambda: call(precision="bf16"), ValueError, r"precision must be one of 'fp32', 'fast', got 'bf16'"),
    "workspace negative": (lambda: call(workspace_mb=-1), ValueError, r"workspace_mb must be 0 or positive.*pass None"),
    "workspace 0": (lambda: call(workspace_mb=0), ValueError, r"workspace_mb must be positive on backend '(torch|native)', got 0.*pass None"),
    "workspace 0, gradients": (lambda: call(workspace_mb=0, hidden=HIDDEN.clone().requires_grad_()), ValueError, r"workspace_mb must be positive for a call that needs gradients, got 0.*no_grad"),
    "workspace too small": (lambda: call(workspace_mb=1e-5), ValueError, r"workspace_mb=9.54e-06 is too small for the forward pass.*give workspace_mb="),
    "unknown option": (lambda: call(soft_cap=3.0), TypeError, r"soft_cap"),
    "unknown reduction": (lambda: weighted(reduction="avg"), ValueError, r"reduction must be one of 'sum', 'mean', 'none', got 'avg'"),
    "unknown engine": (lambda: weighted(engine="fast"), ValueError, r"engine must be one of 'auto'"),
    "one pass, no reduction": (lambda: weighted(engine="one_pass", reduction="none"), ValueError, r"needs one scalar loss"),
    "num_items with sum": (lambda: weighted(num_items=3), ValueError, r"num_items divides reduction='mean' only"),
    "num_items NaN": (lambda: weighted(reduction="mean", num_items=float("nan")), ValueError, r"num_items must be positive.*\(0 only where no row counts\), got nan"),
    "num_items 0": (lambda: weighted(reduction="mean", num_items=0), ValueError, r"num_items must be positive"),
    "num_items a tensor of 0": (lambda: weighted(reduction="mean", num_items=torch.tensor(0.0)), ValueError, r"num_items must be positive"),
    "num_items a row": (lambda: weighted(reduction="mean", num_items=torch.ones(2)), ValueError, r"num_items must be one number, got shape \(2,\)"),
    "num_items a list": (lambda: weighted(reduction="mean", num_items=[3]), TypeError, r"num_items must be a number, got list"),
    "z_loss of text": (lambda: weighted(z_loss="0.1"), TypeError, r"z_loss must be a number, got str"),
    "weights per sequence": (lambda: weighted(torch.ones(2)), ValueError, r"token_weight must have the shape of labels, \(6,\), got \(2,\).*expand"),
    "weights of integers": (lambda: weighted(torch.ones(6, dtype=torch.int64)), TypeError, r"token_weight must be floating point"),
    "weights a number": (lambda: weighted(0.5), TypeError, r"token_weight must be a torch.Tensor or None.*argument order"),
    "weight NaN": (lambda: weighted(torch.tensor([1.0, torch.nan, 1, 1, 1, 1])), ValueError, r"token_weight must be finite"),
}  # fmt: skip


@pytest.mark.parametrize(("mistake", "error", "message"), BAD.values(), ids=BAD.keys())
def test_refused_by_name(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()


def test_a_refused_call_changes_nothing():
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    with pytest.raises(ValueError, match="labels"):
        linear_weighted_nll(hidden, weight, LABELS + 5, None)
    assert hidden.grad is None
    assert weight.grad is None
    assert torch.equal(hidden, HIDDEN)
