"""Every class of the zoo: fused log-probs, loss and each parameter's gradient, against the model's own."""

import inspect

import pytest
import torch

from tests.hf_compare import assert_no_logits
from tests.hf_zoo import ZOO, batch, build
from var_kernels.integrations.hf import fused_lm_head, sequence_logprobs, token_logprobs
from var_kernels.integrations.hf.calibration import calibrate, calibrate_loss

transformers = pytest.importorskip("transformers")

CASES = [pytest.param(case, id=case.id) for case in ZOO if hasattr(transformers, case.name)]


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def model(case, models):
    """One build per case for the whole file; every test leaves it without gradients."""
    if case.id not in models:
        models.clear()
        models[case.id] = build(case)
    yield models[case.id]
    models[case.id].zero_grad(set_to_none=True)


def gradients(model):
    found = {name: None if p.grad is None else p.grad.double().clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(got, expected):
    """rms(err) <= 2^-17 rms(ref) per parameter, or a quarter of that share of the typical parameter's: for what is
    rounding noise around 0 (a key's bias: softmax does not see it), and for a scalar that all tokens add to (Apertus'
    alpha_p of 0.07 is off by 8e-7 from fp64 in plain torch, by 1.5e-6 here).
    """
    assert got.keys() == expected.keys()
    rms = {name: g.square().mean().sqrt().item() for name, g in expected.items() if g is not None}
    typical = sorted(rms.values())[len(rms) // 2]
    for name, reference in expected.items():
        assert (got[name] is None) == (reference is None), name
        if reference is not None:
            error = (got[name] - reference).square().mean().sqrt().item()
            assert error <= 2**-17 * max(rms[name], 0.25 * typical), (name, error, rms[name])


def own_token_logprobs(model, inputs, labels):
    logp = model(**inputs).logits.double().log_softmax(-1)[:, :-1]
    target = labels[:, 1:]
    taken = logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(target != -100, 0.0)
    return torch.nn.functional.pad(taken, (1, 0))


def split(inputs):
    return {k: v for k, v in inputs.items() if k != "labels"}, inputs["labels"]


@pytest.mark.parametrize("case", CASES)
def test_calibration_finds_the_configured_numbers(case, model):
    transform, rule = calibrate(model), calibrate_loss(model)
    assert transform.logit_scale == pytest.approx(case.scale, rel=1e-12)
    assert transform.softcap == case.softcap
    assert transform.causal
    assert rule.shift == case.shift
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_token_logprobs_and_their_gradients(case, model):
    inputs, labels = split(batch())
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    expected = own_token_logprobs(model, inputs, labels)
    (expected * upstream).sum().backward()
    reference = gradients(model)

    logp = token_logprobs(model, {**inputs, "labels": labels})
    assert logp.shape == labels.shape
    assert logp.dtype == torch.float32
    assert (logp == 0).equal((labels == -100) | (torch.arange(labels.shape[1]) == 0))
    assert (logp - expected).abs().max() <= 2**-17 * max(1, expected.abs().max())
    (logp * upstream).sum().backward()
    assert_same_gradients(gradients(model), reference)


@pytest.mark.parametrize("case", CASES)
def test_fused_loss_is_the_models_own(case, model):
    inputs, labels = split(batch(seed=2))
    with torch.no_grad():
        own_with_items = (
            model(**inputs, labels=labels, num_items_in_batch=29).loss if accepts_num_items(model) else None
        )
    own = model(**inputs, labels=labels)
    own.loss.backward()
    reference = gradients(model)

    with fused_lm_head(model):
        fused = model(**inputs, labels=labels)
        if own_with_items is not None:
            with torch.no_grad():
                fused_with_items = model(**inputs, labels=labels, num_items_in_batch=29).loss
    assert_no_logits(fused.logits)
    assert fused.loss.item() == pytest.approx(own.loss.item(), rel=2**-17)
    if own_with_items is not None:
        assert own_with_items.item() != pytest.approx(own.loss.item(), rel=1e-2)
        assert fused_with_items.item() == pytest.approx(own_with_items.item(), rel=2**-17)
    if case.moe:
        assert fused.aux_loss.item() == own.aux_loss.item() > 0
    fused.loss.backward()
    assert_same_gradients(gradients(model), reference)

    assert "forward" not in model.__dict__
    again = model(**inputs, labels=labels)
    assert again.loss.item() == own.loss.item()
    assert again.logits.equal(own.logits)


def accepts_num_items(model):
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds and calibrate_loss(model).replaceable


def test_the_zoo_has_forty_classes():
    assert len({case.values[0].name for case in CASES}) >= 40


def test_sequence_logprobs_are_the_sums():
    model = build(ZOO[0])
    inputs = batch()
    assert sequence_logprobs(model, inputs).equal(token_logprobs(model, inputs).sum(-1))
