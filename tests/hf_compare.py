"""The model's own loss and gradients beside those of the fused head."""

import torch

from tests.tolerance import rms
from var_kernels.integrations.hf import fused_lm_head


def gradients(model):
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(got, expected, bound=2**-17):
    assert got.keys() == expected.keys()
    for name in expected:
        assert rms(got[name] - expected[name]) <= bound * rms(expected[name]), name


def own_and_fused(model, call, inputs):
    """(own loss, its gradients, fused loss, its gradients), from ``call(**inputs).loss``."""
    own = call(**inputs).loss
    own.backward()
    expected = gradients(model)
    with fused_lm_head(call if isinstance(call, torch.nn.Module) else model):
        out = call(**inputs)
        out.loss.backward()
    assert out.logits is None
    return own.item(), expected, out.loss.item(), gradients(model)
