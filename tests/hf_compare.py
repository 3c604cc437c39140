"""The model's own loss and gradients beside those of the fused head."""

import pytest
import torch

from tests.hf_zoo import batch
from tests.tolerance import rms
from var_kernels.integrations.hf import fused_lm_head, token_logprobs
from var_kernels.ops.backend import choose_backend, kernels_of


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
    assert_no_logits(out.logits)
    return own.item(), expected, out.loss.item(), gradients(model)


def own_logprobs(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits.double()
    labels = inputs["labels"][:, 1:]
    logp = logits.log_softmax(-1)[:, :-1].gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.nn.functional.pad(logp.where(labels != -100, 0.0), (1, 0))


def check(model, *, bound=2**-17, names=("lora_A", "lora_B")):
    """Loss, log-probs and every gradient against the model's own; those of these ``names`` in the head are not 0."""
    inputs = batch()
    own, expected, loss, got = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=max(2**-17, bound))
    assert_close(got, expected, bound)
    for word in names:
        assert any("lm_head" in name and word in name and g.any() for name, g in got.items()), word
    upstream = torch.linspace(0.5, 1.5, inputs["labels"].numel()).view(inputs["labels"].shape)
    truth = own_logprobs(model, inputs)
    (truth * upstream).sum().backward()
    expected = gradients(model)
    logp = token_logprobs(model, inputs)
    (logp * upstream).sum().backward()
    assert_close(gradients(model), expected, bound)
    return logp, truth


def products(monkeypatch, step):
    """(m, n, k) of every product over the vocabulary: (m, k) by (k, n)."""
    sizes = []
    _, _, gemm = kernels_of(choose_backend(torch.device("cpu"), torch.float32)[0])
    for name in ("logits_into", "product_into", "add_product"):
        original = getattr(gemm, name)

        def counted(out, left, *rest, original=original):
            sizes.append((*out.shape, left.shape[-1]))
            original(out, left, *rest)

        monkeypatch.setattr(gemm, name, counted)
    if not hasattr(gemm, "product_exp"):
        step()
        return sizes
    ended = gemm.product_exp

    def counted_too(hidden, weight, *rest):
        sizes.append((len(hidden), len(weight), hidden.shape[1]))
        ended(hidden, weight, *rest)

    monkeypatch.setattr(gemm, "product_exp", counted_too)
    step()
    return sizes


def assert_no_logits(logits):
    """What an output with a fused loss has in place of logits: their shape, and an error that says where they are."""
    assert logits.shape[-1] > 1
    with pytest.raises(ValueError, match=r"leave the labels out .* FusedLossMixin"):
        logits.argmax(-1)
