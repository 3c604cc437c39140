"""LoRA and other PEFT adapters on and beside the lm_head: the model's own loss and every gradient."""

import copy
import re

import pytest
import torch

from tests.hf_compare import assert_close, check, gradients, own_and_fused, own_logprobs, products
from tests.hf_zoo import VOCAB, batch, build, llama
from tests.tolerance import assert_result
from var_kernels.integrations.hf import capture, cross_reference_logprobs, fused_lm_head, token_logprobs
from var_kernels.integrations.hf.model import inner_model

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = llama("LlamaForCausalLM")
GEMMA2 = llama("Gemma2ForCausalLM", final_logit_softcapping=7.5)
PHI = llama("PhiForCausalLM", partial_rotary_factor=0.5)  # a head with a bias


def adapted(model, *, modules=("q_proj", "lm_head"), **options):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(modules), **options)).eval()


CASES = {
    "llama": (LLAMA, {}),
    "softcap": (GEMMA2, {}),
    "head bias": (PHI, {}),
    "tied embeddings": (llama("LlamaForCausalLM", tie_word_embeddings=True), {}),
    "rslora": (LLAMA, {"use_rslora": True}),
    "lora_bias": (LLAMA, {"lora_bias": True}),
    "lora_bias and head bias": (PHI, {"lora_bias": True}),
    "the head alone": (LLAMA, {"modules": ("lm_head",)}),
}


@pytest.mark.parametrize(("case", "options"), CASES.values(), ids=CASES.keys())
def test_lora_on_the_head(case, options):
    model = adapted(build(case), **options)
    if options.get("lora_bias"):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias") and "lora_B" in name:
                    p.copy_(torch.randn(p.shape))
        check(model, names=("lora_A", "lora_B.default.bias"))
    logp, truth = check(model)
    assert_result(logp, truth)
    with model.disable_adapter():
        assert (own_logprobs(model, batch()) - truth).abs().max() > 1e-2, "the adapter changes nothing"


def test_without_the_adapter_merged_and_unmerged():
    model, inputs = adapted(build(LLAMA)), batch()
    with torch.no_grad():
        adapter = token_logprobs(model, inputs)
        plain = own_logprobs(build(LLAMA), inputs)
        with model.disable_adapter():
            assert_result(token_logprobs(model, inputs), plain)
        model.merge_adapter()
        merged = token_logprobs(model, inputs)
        assert_result(merged, own_logprobs(model, inputs))
        assert (merged - adapter).abs().max() < 1e-4
        model.unmerge_adapter()
        torch.testing.assert_close(token_logprobs(model, inputs), adapter, rtol=0, atol=1e-4)
        model.merge_adapter()
        with model.disable_adapter():  # PEFT unmerges here
            torch.testing.assert_close(token_logprobs(model, inputs).double(), plain, rtol=0, atol=1e-4)
        whole = model.merge_and_unload()
        assert (token_logprobs(whole, inputs) - adapter).abs().max() < 1e-4


def test_several_active_adapters():
    model = adapted(build(LLAMA))
    torch.manual_seed(1)
    second = peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=2, init_lora_weights=False, lora_bias=True)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    _, truth = check(model, names=("lora_A.default", "lora_B.default", "lora_A.second", "lora_B.second"))
    model.set_adapter("second")
    logp, other = check(model, names=("lora_A.second", "lora_B.second"))
    assert_result(logp, other)
    assert (truth - other).abs().max() > 1e-2


def test_an_adapter_of_the_body_beside_one_of_the_head():
    """Of two active adapters only one knows the head."""
    model = adapted(build(LLAMA), modules=("q_proj",))
    torch.manual_seed(1)
    model.add_adapter("head", peft.LoraConfig(target_modules=["lm_head"], r=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "head"])
    check(model)
    model.set_adapter("default")
    check(model, names=())


def test_dropout_draws_the_models_own_masks():
    model, inputs = adapted(build(LLAMA), modules=("lm_head",), lora_dropout=0.5).train(), batch()
    with fused_lm_head(model):
        torch.manual_seed(4)
        other = model(**inputs).loss.item()
        torch.manual_seed(3)
        out = model(**inputs)
        out.loss.backward()
        got = gradients(model)
    torch.manual_seed(3)
    own = model(**inputs).loss
    own.backward()
    assert out.loss.item() == pytest.approx(own.item(), rel=2**-17)
    assert other != pytest.approx(own.item(), rel=2**-17)
    assert_close(got, gradients(model))


def test_bf16_with_adapters_of_fp32():
    """PEFT's default: the adapter's weights are fp32 beside 16-bit ones."""
    model = adapted(build(LLAMA).bfloat16())
    assert model.base_model.model.lm_head.lora_B["default"].weight.dtype == torch.float32
    logp, truth = check(model, bound=2**-5)
    exact = copy.deepcopy(model)
    assert logp.dtype == torch.float32
    head = exact.base_model.model.lm_head
    (hidden,), _ = capture(model, lambda h, _: h, {"input_ids": batch()["input_ids"]}, low_rank=True)
    logits = head.double()(hidden.double())
    labels = batch()["labels"][:, 1:]
    wanted = logits.log_softmax(-1)[:, :-1].gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    got = token_logprobs(model, {"input_ids": batch()["input_ids"], "labels": batch()["labels"]})
    assert_result(got[:, 1:], wanted.where(labels != -100, 0.0))
    assert truth.isfinite().all()


def test_autocast():
    model = adapted(build(LLAMA).float())
    with torch.autocast("cpu", torch.bfloat16):
        own, expected, loss, got = own_and_fused(model, model, batch())
    assert loss == pytest.approx(own, rel=2**-7)
    assert_close(got, expected, bound=2**-5)


def test_adapters_injected_without_a_wrapper():
    model = build(LLAMA)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    check(peft.inject_adapter_in_model(config, model).eval())


def test_trainable_tokens_of_a_tied_head():
    model = build(llama("LlamaForCausalLM", tie_word_embeddings=True))
    config = peft.LoraConfig(
        target_modules=["q_proj"], r=4, init_lora_weights=False, trainable_token_indices=[3, 7, VOCAB - 1]
    )
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens_delta" in name:
                p.add_(torch.randn(p.shape))
    inputs = batch()
    own, expected, loss, got = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)
    assert any("trainable_tokens" in name for name in got)
    with model.disable_adapter():
        assert_result(token_logprobs(model, inputs), own_logprobs(model, inputs))


def test_cross_scores_with_a_head_adapter():
    model = adapted(build(LLAMA))
    prompts, completions = [[5, 6], [7, 8, 9]], [[10, 11, 12], [13]]
    scores = cross_reference_logprobs(model, prompts, completions)
    for i, prompt in enumerate(prompts):
        for j, completion in enumerate(completions):
            ids = torch.tensor([prompt + completion])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            truth = own_logprobs(model, {"input_ids": ids, "labels": labels}).sum()
            assert scores[i, j].item() == pytest.approx(truth.item(), abs=1e-4)


def test_gradient_checkpointing_and_generate():
    model = adapted(build(LLAMA)).train()
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = model.eval().generate(**prompt, max_new_tokens=5, do_sample=False)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    check(model)
    with fused_lm_head(model):
        assert model.eval().generate(**prompt, max_new_tokens=5, do_sample=False).equal(expected)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_a_frozen_head_costs_two_products_and_an_adapter_none_of_the_weight(monkeypatch):
    width = LLAMA.config["hidden_size"]
    inputs = batch()

    def step(model):
        with fused_lm_head(model):
            model(**inputs).loss.backward()

    plain, elsewhere, head = build(LLAMA), adapted(build(LLAMA), modules=("q_proj",)), adapted(build(LLAMA))
    for model in (plain, elsewhere, head):
        token_logprobs(model, inputs)  # calibrated
    with monkeypatch.context() as patch:
        assert (VOCAB, width) in [size[:2] for size in products(patch, lambda: step(plain))]
    with monkeypatch.context() as patch:
        shapes = [size[:2] for size in products(patch, lambda: step(elsewhere))]
        assert len(shapes) == 2
        assert (VOCAB, width) not in shapes
    with monkeypatch.context() as patch:
        shapes = [size[:2] for size in products(patch, lambda: step(head))]
        assert (VOCAB, width) not in shapes
        assert (VOCAB, 4) in shapes  # dB


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_dora_is_refused_by_name():
    model = adapted(build(LLAMA), use_dora=True)
    with pytest.raises(ValueError, match=r"'default'.*plain LoRA.*Dora.*modules_to_save"):
        token_logprobs(model, batch())
    with model.disable_adapter():
        assert_result(token_logprobs(model, batch()), own_logprobs(model, batch()))
    elsewhere = adapted(build(LLAMA), use_dora=True, modules=("q_proj",))
    assert_result(token_logprobs(elsewhere, batch()), own_logprobs(elsewhere, batch()))


def test_other_adapters_are_refused_by_name():
    config = peft.LoHaConfig(target_modules=["lm_head"], r=2)
    model = peft.get_peft_model(build(LLAMA), config)
    with pytest.raises(ValueError, match=r"must be plain LoRA, got .*loha.*exclude_modules.*merge_and_unload"):
        fused_lm_head(model).apply()


def test_a_loss_that_does_not_know_the_adapter_is_refused():
    model, inputs = adapted(build(LLAMA)), {"input_ids": batch()["input_ids"]}
    with pytest.raises(ValueError, match=r"must have no active LoRA adapter.*low_rank=True"):
        capture(model, lambda hidden, head: hidden @ head.lm_head_weight.T, inputs)
    with model.disable_adapter():
        capture(model, lambda hidden, head: (hidden @ head.lm_head_weight.T).sum(), inputs)


def test_an_adapter_for_each_row_is_refused():
    model = adapted(build(LLAMA))
    with fused_lm_head(model), pytest.raises(ValueError, match=re.escape("adapter_names")):
        model(**batch(), adapter_names=["default"] * len(batch()["input_ids"]))
    assert model(**batch()).logits.shape[-1] == VOCAB


def test_the_layers_are_left_as_they_were():
    model = adapted(build(LLAMA))
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with fused_lm_head(model):
        model(**batch()).loss.backward()
    with pytest.raises(RuntimeError, match="in the head"):
        capture(model, _fail, {"input_ids": batch()["input_ids"]}, low_rank=True)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def _fail(hidden, head):
    raise RuntimeError("in the head")


# ---- VARTrainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["var", "dpo", "dft"])
def test_the_trainer_trains_an_adapter_of_the_head(method, tmp_path):
    """Classes A, B and C: gradients reach both factors, and the weight stays."""
    from tests.tiny_training import tiny_model, tiny_trainer

    model = tiny_model(dtype=torch.float32)
    before = model.lm_head.weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    options = {"max_steps": 2, "learning_rate": 0.1, "method": method}
    trainer = tiny_trainer(tmp_path, model=model, trainer_options={"peft_config": config}, **options)
    head = inner_model(trainer.model).lm_head
    factors = {name: p.detach().clone() for name, p in head.named_parameters() if "lora" in name}
    trainer.train()
    assert torch.equal(head.base_layer.weight, before)
    assert all(not torch.equal(p, factors[name]) for name, p in head.named_parameters() if name in factors)
