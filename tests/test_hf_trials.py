"""What a trial of a model leaves behind: nothing. Each kind of state is looked at around apply() and within a step."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hf_zoo import VOCAB, batch, build, llama
from var_kernels.integrations.hf import fused_lm_head, token_logprobs

transformers = pytest.importorskip("transformers")

LLAMA = llama("LlamaForCausalLM")


def steps(model, *, fused, inputs=None):
    """Two steps, with a setting changed between them, which makes the head be looked at anew within the second."""
    inputs = inputs or batch()
    head = fused_lm_head(model)
    if fused:
        head.apply()
    losses = [model(**inputs).loss.item()]
    model.config.some_setting = random.random()
    losses.append(model(**inputs).loss.item())
    head.restore()
    return losses


class Counts(nn.Module):
    """Beside an MLP: buffers, numbers, lists and a norm with running statistics, as routers and loggers have them."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.calls, self.seen, self.last = mlp, 0, [], {}
        self.norm = nn.BatchNorm1d(32, affine=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("load", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape[1])
        self.last["shape"] = tuple(x.shape)
        self.steps += 1
        self.load = self.load + 1
        self.norm(x.detach().flatten(0, 1))
        return self.mlp(x)


def counting(case=LLAMA):
    model = build(case).train()
    layer = model.model.layers[0]
    layer.mlp = Counts(layer.mlp)
    return model, layer.mlp


def test_buffers_counters_and_running_statistics():
    (plain, expected), (model, got) = counting(), counting()
    steps(plain, fused=False)
    with_trial = steps(model, fused=True)
    token_logprobs(model, batch())
    token_logprobs(plain, batch())
    assert all(loss > 0 for loss in with_trial)
    assert (got.calls, got.seen, got.last) == (expected.calls, expected.seen, expected.last) == (3, [11] * 3, got.last)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(dict(got.named_buffers())[name], buffer)
    assert got.training
    assert got.norm.training


def test_hooks_in_the_model_do_not_count_trials():
    model, calls = build(LLAMA), []
    hooked = [model.model, model.model.layers[0].mlp, model.model.layers[1].self_attn.q_proj]
    handles = [module.register_forward_hook(lambda *_: calls.append("after")) for module in hooked]
    handles += [module.register_forward_pre_hook(lambda *_: calls.append("before")) for module in hooked]
    steps(model, fused=True)
    assert len(calls) == 12
    [handle.remove() for handle in handles]
    steps(model, fused=True)
    assert len(calls) == 12


def test_a_model_that_does_not_run_without_its_hooks():
    model = build(LLAMA)
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: plain(x["x"])
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _module, args: ({"x": args[0]},))
    own = model(**batch()).loss.item()
    with fused_lm_head(model):
        assert model(**batch()).loss.item() == pytest.approx(own, rel=2**-17)


def test_autocast_that_others_put_around_the_model():
    """accelerate's way: one object for all calls, which stays on for good if it is entered twice."""
    model = build(LLAMA)
    fused = fused_lm_head(model).apply()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model(**batch())
    model.config.some_setting = 1
    model(**batch()).loss.backward()
    a = torch.randn(4, 4)
    assert (a @ a).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    fused.restore()


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_around_a_trial(enabled):
    model = build(LLAMA)
    with torch.autocast("cpu", torch.float16, enabled=enabled):
        steps(model, fused=True)
        assert torch.is_autocast_enabled("cpu") == enabled
        assert torch.get_autocast_dtype("cpu") == torch.float16
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16


class SetsGlobals(transformers.LlamaForCausalLM):
    """A forward that leaves marks: a seed, a filter, autocast."""

    def forward(self, input_ids=None, **kwargs):
        if input_ids.shape[1] == 8:
            torch.manual_seed(5)
            warnings.simplefilter("ignore")
            torch.set_autocast_enabled("cpu", True)
        return super().forward(input_ids=input_ids, **kwargs)


def test_marks_that_a_forward_leaves_in_a_trial():
    model = SetsGlobals(transformers.LlamaConfig(**LLAMA.config)).eval()
    torch.manual_seed(1)
    expected, filters = torch.get_rng_state(), list(warnings.filters)
    token_logprobs(model, batch())
    assert torch.get_rng_state().equal(expected)
    assert warnings.filters == filters
    assert not torch.is_autocast_enabled("cpu")


def test_grad_mode_gradients_and_flags():
    model = build(LLAMA).train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    model(**batch()).loss.backward()
    before = {
        name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    }
    flags = [module.training for module in model.modules()]
    head = fused_lm_head(model).apply()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        model.config.some_setting = 2
        model(**batch())
        assert not torch.is_grad_enabled()
    head.restore()
    assert [module.training for module in model.modules()] == flags
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert (p.grad is None) == (before[name][1] is None)
        assert p.grad is None or p.grad.equal(before[name][1])


def test_inference_mode_first_and_training_after():
    model = build(LLAMA)
    own = model(**batch()).loss.item()
    with torch.inference_mode():
        token_logprobs(model, batch())
        with fused_lm_head(model):
            assert model(**batch()).loss.item() == pytest.approx(own, rel=2**-17)
    with fused_lm_head(model):
        model(**batch()).loss.backward()
    assert model.lm_head.weight.grad.any()


class CountsCalls(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func not in (torch.Tensor.is_floating_point, torch.Tensor.shape.__get__)  # looks at the weight
        return func(*args, **(kwargs or {}))


class CountsOps(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [CountsCalls, CountsOps])
def test_modes_see_no_trial(mode):
    model = build(LLAMA)
    with fused_lm_head(model), torch.no_grad():
        counts = []
        for setting in (0, 0, 1):  # the first call of all may look things up
            model.config.some_setting = setting
            with mode() as seen:
                model(**batch())
            counts.append(seen.calls)
    assert counts[1] == counts[2] > 0


def test_default_dtype_and_deterministic_algorithms():
    model = build(LLAMA)
    expected = token_logprobs(build(LLAMA), batch())
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    try:
        assert token_logprobs(model, batch()).equal(expected)
        assert torch.get_default_dtype() == torch.float64
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_for_a_trial():
    seen = []

    def backend(graph, example_inputs):
        seen.append(1)
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(build(llama("LlamaForCausalLM", num_hidden_layers=1)), backend=backend)
    head = fused_lm_head(model).apply()
    assert not seen
    model(**batch())
    assert seen
    head.restore()


def test_settings_that_do_not_concern_the_head_are_no_reason_to_look_again():
    model, calls = build(llama("MixtralForCausalLM", _moe=True)), []
    with fused_lm_head(model):
        model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
        model.config.output_hidden_states = True
        model.config.output_router_logits = False
        loss = model(**batch()).loss.item()
    assert len(calls) == 1
    assert loss == pytest.approx(model(**batch()).loss.item(), rel=2**-17)
    assert model.config.vocab_size == VOCAB


def test_a_trial_of_the_loss_runs_the_layers_once():
    """Three passes for what follows the head (two of them show whether it is causal), one for the loss."""
    model, calls = build(LLAMA), []
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: calls.append(x.shape) or plain(x)
    fused_lm_head(model).apply().restore()
    assert len(calls) == 4
    fused_lm_head(model).apply().restore()
    assert len(calls) == 4
