"""What the fused head leaves alone, and what it computes."""

import copy
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hf_compare import assert_no_logits
from tests.hf_zoo import VOCAB, batch, build, llama
from tests.tolerance import assert_result, rms
from var_kernels.integrations.hf import capture, fused_lm_head, token_logprobs
from var_kernels.integrations.hf.calibration import calibrate, calibrate_loss
from var_kernels.ops import linear_logprob

pytest.importorskip("transformers")

LLAMA = llama("LlamaForCausalLM")
GEMMA2 = llama("Gemma2ForCausalLM", final_logit_softcapping=7.5)
MIXTRAL = llama("MixtralForCausalLM", _moe=True)


# ---- the model is left as it was -------------------------------------------------------------------------------------


def test_calibration_disturbs_nothing():
    model = build(LLAMA).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    calibrate(model)
    calibrate_loss(model)
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in model.modules()] == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_calibration_runs_once_and_again_when_the_config_changes():
    model = build(GEMMA2)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert calibrate(model).softcap == 7.5
    passes = len(calls)
    assert calibrate(model).softcap == 7.5
    assert len(calls) == passes == 3
    model.config.final_logit_softcapping = 3.25
    assert calibrate(model).softcap == 3.25
    model.config.final_logit_softcapping = None
    assert calibrate(model).softcap is None


def test_model_is_restored_after_an_exception():
    model = build(LLAMA)
    head_before, model_before = dict(vars(model.lm_head)), set(vars(model))
    inputs = batch()
    with pytest.raises(IndexError), fused_lm_head(model):
        model(**{**inputs, "input_ids": inputs["input_ids"] + VOCAB})

    def fail(hidden, head):
        raise RuntimeError("in the head")

    with pytest.raises(RuntimeError, match="in the head"):
        capture(model, fail, {"input_ids": inputs["input_ids"]})
    assert dict(vars(model.lm_head)) == head_before
    assert set(vars(model)) == model_before
    assert model(**inputs).logits.shape[-1] == VOCAB


def test_nested_use_is_refused():
    model = build(LLAMA)
    with fused_lm_head(model), pytest.raises(RuntimeError, match="applied already"):
        fused_lm_head(model).apply()
    with fused_lm_head(model):
        pass
    inputs = {"input_ids": batch()["input_ids"]}
    with pytest.raises(RuntimeError, match="captured already"):
        capture(model, lambda hidden, head: token_logprobs(model, inputs), inputs)
    assert model(**inputs).logits.shape[-1] == VOCAB


def test_generate_and_plain_calls_run_as_ever_inside_the_block():
    model = build(LLAMA)
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected, logits = model.generate(**prompt, max_new_tokens=5, do_sample=False), model(**prompt).logits
    with fused_lm_head(model):
        assert model.generate(**prompt, max_new_tokens=5, do_sample=False).equal(expected)
        assert model(**prompt).logits.equal(logits)
        assert token_logprobs(model, prompt).isfinite().all()
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).equal(expected)


def test_a_copy_of_a_fused_model_is_a_plain_model_of_its_own():
    model, inputs = build(LLAMA), batch()
    with fused_lm_head(model):
        own = model(**inputs).loss.item()
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.lm_head.weight.zero_()
        assert copied(**inputs).loss.item() == pytest.approx(math.log(VOCAB), rel=1e-6)
        assert copied(**inputs).logits.shape[-1] == VOCAB
        assert model(**inputs).loss.item() == own
        with fused_lm_head(copied):
            assert_no_logits(copied(**inputs).logits)
    assert copied(**inputs).logits.shape[-1] == VOCAB


def test_apply_and_restore_without_a_block_and_under_a_later_wrapper():
    model = build(LLAMA)
    inputs = batch()
    own = model(**inputs).loss.item()
    fused = fused_lm_head(model).apply()
    assert_no_logits(model(**inputs).logits)
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)  # as accelerate does for mixed precision
    fused.restore()
    fused.restore()
    out = model(**inputs)
    assert out.logits.shape[-1] == VOCAB
    assert out.loss.item() == own


# ---- what is computed ------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The element count of the largest floating point tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_no_logits_are_materialised(fused):
    model = build(llama("LlamaForCausalLM", vocab_size=16001, num_hidden_layers=1))
    input_ids = torch.randint(3, 16001, (2, 300), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": input_ids, "labels": input_ids}
    head = fused_lm_head(model, workspace_mb=8)
    if fused:
        head.apply()
    with LargestTensor() as seen:
        model(**inputs).loss.backward()
        if fused:
            token_logprobs(model, inputs, workspace_mb=8).sum().backward()
    logits = 600 * 16001
    assert seen.elements < logits / 4 if fused else seen.elements >= logits


def test_all_ignored_labels_give_a_differentiable_zero():
    model = build(LLAMA)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with fused_lm_head(model):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_shift_labels_and_return_tuples_are_honoured():
    model = build(LLAMA)
    inputs = batch()
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    own = model(**inputs, labels=labels, shift_labels=shifted.roll(1, 0)).loss.item()
    with fused_lm_head(model):
        assert model(**inputs, labels=labels, shift_labels=shifted.roll(1, 0)).loss.item() == pytest.approx(
            own, rel=1e-5
        )
        loss, logits, *_ = model(**inputs, labels=labels, return_dict=False)
    assert_no_logits(logits)
    assert loss.item() == pytest.approx(model(**inputs, labels=labels).loss.item(), rel=1e-5)
    assert own != pytest.approx(loss.item(), rel=1e-3)


def test_num_items_in_batch_may_be_a_tensor():
    model = build(MIXTRAL)
    own = model(**batch(), num_items_in_batch=torch.tensor(40)).loss.item()
    with fused_lm_head(model):
        assert model(**batch(), num_items_in_batch=torch.tensor(40)).loss.item() == pytest.approx(own, rel=2**-17)


def test_labels_default_to_what_attention_mask_shows():
    model = build(LLAMA)
    inputs = batch()
    del inputs["labels"]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert token_logprobs(model, inputs).equal(token_logprobs(model, {**inputs, "labels": labels}))
    without_mask = token_logprobs(model, {"input_ids": inputs["input_ids"]})
    assert (without_mask[:, 1:] != 0).all()


def test_a_first_token_behind_padding_is_not_scored():
    model, ids = build(LLAMA), torch.randint(VOCAB, (1, 6))
    padding = torch.zeros(1, 3, dtype=torch.long)
    left = {"input_ids": torch.cat([padding, ids], 1), "attention_mask": torch.cat([padding, torch.ones_like(ids)], 1)}
    logp = token_logprobs(model, left)
    assert_result(logp[:, 3:], token_logprobs(model, {"input_ids": ids}))
    assert (logp[:, :4] == 0).all()
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        token_logprobs(model, {"input_ids": ids, "attention_mask": torch.ones(1, 1, 6, 6)})


def test_temperature_and_entropy():
    model = build(GEMMA2)
    inputs = batch()
    labels = inputs["labels"]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double() / 0.7
    logp_all = logits.log_softmax(-1)[:, :-1]
    scored = labels[:, 1:] != -100
    logp, entropy = token_logprobs(model, inputs, temperature=0.7, return_entropy=True)
    truth = logp_all.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert_result(logp[:, 1:][scored], truth[scored])
    assert_result(entropy[:, 1:][scored], -(logp_all.exp() * logp_all).sum(-1)[scored])
    assert not entropy[:, 0].any()
    assert not entropy[:, 1:][~scored].any()


def test_capture_gives_back_every_result_and_the_output():
    model = build(MIXTRAL)
    inputs = batch()
    labels = inputs.pop("labels")

    def fn(hidden, head):
        rows = labels.roll(-1, 1)
        logp, hit = linear_logprob(
            hidden, head.lm_head_weight, rows, head.bias, return_argmax=True, **head.logit_options
        )
        return logp, hit, hidden.square().mean()

    (logp, argmax, penalty), output = capture(model, fn, inputs)
    assert output.logits.shape == (*labels.shape, 1)
    assert not output.logits.any()
    assert output.aux_loss > 0
    assert not argmax.requires_grad
    (logp.sum() + penalty).backward()
    assert rms(model.lm_head.weight.grad) > 0
    with torch.no_grad():
        (logp, *_), _ = capture(model, fn, inputs)
    assert not logp.requires_grad


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, MIXTRAL], ids=lambda case: case.id)
@pytest.mark.parametrize("hidden_states", [False, True])
def test_a_tuple_has_the_places_of_the_models_own(case, hidden_states):
    """Of the same length and kinds; the named output's to_tuple() and indices agree with it."""
    model = build(case)
    options = {"output_hidden_states": hidden_states, "use_cache": False}
    own = model(**batch(), **options, return_dict=False)
    with fused_lm_head(model):
        got = model(**batch(), **options, return_dict=False)
        named = model(**batch(), **options)
    assert len(got) == len(own) == len(named.to_tuple())
    for ours, theirs, by_name in zip(got, own, named.to_tuple(), strict=True):
        assert isinstance(ours, type(theirs))
        if isinstance(theirs, tuple):
            assert [t.shape for t in ours] == [t.shape for t in theirs]
            continue
        assert ours.shape == theirs.shape == by_name.shape
        assert ours.dtype == theirs.dtype
        assert ours.device == theirs.device
        if ours is got[0] or theirs.dim() == 0:
            assert ours.item() == pytest.approx(theirs.item(), rel=2**-17)
    assert named[0].item() == got[0].item()
    at = next(i for i, item in enumerate(own) if isinstance(item, torch.Tensor) and item.dim() == 3)
    assert_no_logits(got[at])
    assert named[at] is named.logits


def test_logits_that_are_not_there():
    model = build(LLAMA)
    with fused_lm_head(model), torch.no_grad():
        logits = model(**batch()).logits
    assert logits.shape == (3, 11, VOCAB)
    assert (logits.dtype, logits.dim(), logits.requires_grad) == (torch.float32, 3, False)
    assert logits.detach().float().to(torch.bfloat16).dtype == torch.bfloat16  # wrappers cast and move what they get
    assert "never computed" in repr(logits)
    uses = {
        "indexing": lambda: logits[:, -1],
        "cpu": lambda: logits.cpu(),
        "numpy": lambda: logits.numpy(),
        "argmax": lambda: logits.argmax(-1),
        "softmax": lambda: torch.softmax(logits, -1),
        "cross_entropy": lambda: torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch()["labels"]),
        "sum": lambda: logits.sum(),
        "mean": lambda: torch.mean(logits),
        "add": lambda: logits + 1,
        "compare": lambda: logits == logits,
        "bool": lambda: bool(logits),
        "iterate": lambda: list(logits),
        "cat": lambda: torch.cat([logits, logits]),
        "write": lambda: logits.mul_(2),
        "allclose": lambda: torch.allclose(logits, logits),
        "pickle": lambda: pickle.dumps(logits),
        "deepcopy": lambda: copy.deepcopy(logits),
        "backward": lambda: logits.backward(),
        "tolist": lambda: logits.tolist(),
        "array": lambda: __import__("numpy").asarray(logits),
    }
    for name, use in uses.items():
        with pytest.raises(ValueError, match=r"logits: .*leave the labels out of the call"):
            pytest.fail(f"{name}: {use()}")
