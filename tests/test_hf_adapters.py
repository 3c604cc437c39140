"""PEFT adapters beside an lm_head that they leave alone, save whole, or share with the embeddings."""

import copy
import functools
import math

import pytest
import torch

from tests.hf_compare import assert_close, assert_no_logits, check, gradients, own_and_fused, own_logprobs, products
from tests.hf_zoo import VOCAB, batch, build, llama
from tests.tolerance import assert_result
from var_kernels import VARLoss
from var_kernels.integrations.hf import capture, fused_lm_head, sequence_logprobs, token_logprobs
from var_kernels.integrations.hf.model import find_head, inner_model, next_labels
from var_kernels.kernels import rows_torch
from var_kernels.losses import dpo_loss

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = llama("LlamaForCausalLM")
TIED = llama("LlamaForCausalLM", tie_word_embeddings=True)
GEMMA2 = llama("Gemma2ForCausalLM", final_logit_softcapping=7.5)


def lora(case=LLAMA, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": False, **options}
    )
    return peft.get_peft_model(build(case), config).eval()


def without_a_wrapper():
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    return peft.inject_adapter_in_model(config, build(LLAMA)).eval()


def by_transformers():
    model = build(LLAMA)
    torch.manual_seed(0)
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    except ValueError as error:  # transformers 5.24 wants a PEFT that is not out yet
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    return model.eval()


def checkpointed(reentrant):
    model = lora().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def other(config):
    torch.manual_seed(0)
    return peft.get_peft_model(build(LLAMA), config).eval()


# The head's weight is frozen in all of them.
FROZEN = {
    "LoRA elsewhere": lora,
    "softcap": lambda: lora(GEMMA2),
    "tied": lambda: lora(TIED),
    "DoRA elsewhere": lambda: lora(use_dora=True),
    "embed_tokens": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "embed_tokens, tied": lambda: lora(TIED, target_modules=["q_proj", "embed_tokens"]),
    "tokens of embed_tokens": lambda: lora(trainable_token_indices={"embed_tokens": [5, 9, 20]}),
    "embed_tokens saved whole, tied": lambda: lora(TIED, modules_to_save=["embed_tokens"]),
    "inject_adapter_in_model": without_a_wrapper,
    "add_adapter": by_transformers,
    "checkpointing": lambda: checkpointed(False),
    "reentrant checkpointing": lambda: checkpointed(True),
    "IA3": lambda: other(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "prefix tuning": lambda: other(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@pytest.mark.parametrize("made", FROZEN.values(), ids=FROZEN.keys())
def test_a_frozen_head(made):
    model = made()
    assert not find_head(inner_model(model)).weight.requires_grad
    logp, truth = check(model, names=())
    assert_result(logp, truth)


# The head learns with its adapter.
LEARNED = {
    "LoRA on both, tied": lambda: lora(TIED, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "saved whole": lambda: lora(modules_to_save=["lm_head"]),
    "saved whole, tied": lambda: lora(TIED, modules_to_save=["lm_head"]),
    "saved whole with embed_tokens": lambda: lora(TIED, modules_to_save=["lm_head", "embed_tokens"]),
    "tokens of lm_head": lambda: lora(trainable_token_indices={"lm_head": [5, 9, VOCAB - 1]}),
    "tokens of both": lambda: lora(trainable_token_indices={"lm_head": [5, 9], "embed_tokens": [5, 9]}),
}


@pytest.mark.parametrize("made", LEARNED.values(), ids=LEARNED.keys())
def test_a_head_that_learns(made):
    model = made()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora" not in name:
                p.add_(0.1 * torch.randn(p.shape))
    logp, truth = check(model, names=("",))
    assert_result(logp, truth)
    with torch.no_grad(), model.disable_adapter():
        assert_result(token_logprobs(model, batch()), own_logprobs(model, batch()))
        assert (token_logprobs(model, batch()) - truth).abs().max() > 1e-2


def test_a_saved_head_that_stays_tied():
    """PEFT gives the lm_head a copy that shares the weight of embed_tokens, and says its sizes the wrong way round."""
    model = lora(TIED, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    head = find_head(inner_model(model))
    embeddings = inner_model(model).get_input_embeddings()
    assert head.weight is embeddings.modules_to_save["default"].weight
    with torch.no_grad():
        head.weight.mul_(0.7)
    logp, truth = check(model, names=())
    assert_result(logp, truth)


def test_the_saved_head_of_the_active_adapter():
    model = lora(modules_to_save=["lm_head"])
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False, modules_to_save=["lm_head"])
    model.add_adapter("second", config)
    heads = inner_model(model).lm_head.modules_to_save
    with torch.no_grad():
        heads["second"].weight.mul_(0.5)
    seen = []
    for name in ("default", "second"):
        model.set_adapter(name)
        assert find_head(inner_model(model)) is heads[name]
        seen.append(check(model, names=(f"modules_to_save.{name}",))[0])
    assert (seen[0] - seen[1]).abs().max() > 1e-2


# ---- the reference is the model without its adapter ------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, TIED], ids=["", "tied"])
def test_without_the_adapter_and_merged(case):
    model, inputs = lora(case), batch()
    with torch.no_grad():
        bare = own_logprobs(build(case), inputs)
        adapter = token_logprobs(model, inputs)
        assert (adapter - bare).abs().max() > 1e-2
        with fused_lm_head(model), model.disable_adapter():
            assert_result(token_logprobs(model, inputs), bare)
            assert model(**inputs).loss.item() == pytest.approx(build(case)(**inputs).loss.item(), rel=2**-17)
        assert_result(token_logprobs(model, inputs), adapter.double())
        model.merge_adapter()
        assert_result(token_logprobs(model, inputs), own_logprobs(model, inputs))
        model.unmerge_adapter()
        whole = model.merge_and_unload()
        assert_result(token_logprobs(whole, inputs), own_logprobs(whole, inputs))
        torch.testing.assert_close(token_logprobs(whole, inputs), adapter, rtol=0, atol=1e-4)


def test_dpo_against_the_model_without_its_adapter():
    model, inputs = lora(), batch(rows=4)

    def step(logps):
        with torch.no_grad(), model.disable_adapter():
            reference = logps(model, inputs)
        policy = logps(model, inputs)
        loss = dpo_loss(policy[:2], policy[2:], reference[:2], reference[2:], beta=0.5).mean()
        loss.backward()
        return loss.item(), gradients(model)

    own, expected = step(lambda *args: own_logprobs(*args).sum(-1))
    loss, got = step(sequence_logprobs)
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)


# ---- cost ------------------------------------------------------------------------------------------------------------


WORKSPACE_MB = 0.004  # less than the logits of a batch: two passes would compute them twice


def loss_of_the_model(model, inputs, workspace_mb=WORKSPACE_MB):
    with fused_lm_head(model, workspace_mb=workspace_mb):
        return model(**inputs).loss


def of_log_probs(model, inputs):
    return -torch.nn.functional.logsigmoid(sequence_logprobs(model, inputs, workspace_mb=WORKSPACE_MB)).sum()


def var(model, inputs):
    loss_fn = VARLoss(lam=1.0, normalizer="batch_mean", reference="none", workspace_mb=WORKSPACE_MB)
    labels, rewards = inputs["labels"], torch.tensor([1.0, 0.0, -1.0])

    def in_head(hidden, head):
        return loss_fn(hidden, head.lm_head_weight, next_labels(labels, hidden), rewards)

    (loss,), _ = capture(model, in_head, {n: t for n, t in inputs.items() if n != "labels"})
    return loss


def work(monkeypatch, model, loss_of):
    """Multiplications of the head's products in a step, in units of N D V; of N rows whose label is not ignored."""
    inputs = batch()
    with monkeypatch.context() as patch:
        patch.setattr(rows_torch, "BLOCK_ELEMENTS", 64)  # without the C++ kernels a block's temporaries need a budget
        loss_of(model, inputs)  # calibrated
        sizes = products(patch, lambda: loss_of(model, inputs).backward())
    rows = (inputs["labels"][:, 1:] != -100).sum().item()
    return sum(math.prod(size) for size in sizes) / (rows * VOCAB * LLAMA.config["hidden_size"])


@pytest.mark.parametrize("loss_of", [loss_of_the_model, of_log_probs, var])
@pytest.mark.parametrize("made", [lora, *list(FROZEN.values())[2:12:3]], ids=["lora", *list(FROZEN)[2:12:3]])
def test_a_frozen_head_costs_two_products(loss_of, made, monkeypatch):
    """Logits and dlogp/dhidden: neither the logits again nor a dW."""
    assert work(monkeypatch, made(), loss_of) == 2
    assert work(monkeypatch, build(LLAMA), loss_of) == 4


def test_two_products_under_autocast(monkeypatch):
    loss_of = functools.partial(loss_of_the_model, workspace_mb=1)  # holds fp32 copies of the operands
    with torch.autocast("cpu", torch.bfloat16):
        assert work(monkeypatch, lora(), loss_of) == 2


# ---- files, copies, refusals -----------------------------------------------------------------------------------------


def test_saved_loaded_and_copied_while_the_head_is_fused(tmp_path):
    model, inputs = lora(modules_to_save=["lm_head"]), batch()
    own = model(**inputs).loss.item()
    with fused_lm_head(model):
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)
        assert_no_logits(model(**inputs).logits)
    assert twin(**inputs).loss.item() == own
    assert twin(**inputs).logits.shape[-1] == VOCAB
    loaded = peft.PeftModel.from_pretrained(build(LLAMA), tmp_path).eval()
    assert loaded(**inputs).loss.item() == own


def test_virtual_tokens_in_front():
    """The fused loss knows what PEFT puts in front; log-probs of the batch's tokens do not."""
    model = other(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    own, expected, loss, got = own_and_fused(model, model, batch())
    assert loss == pytest.approx(own, rel=2**-17)
    assert got.keys() == expected.keys() == {"prompt_encoder.default.embedding.weight"}
    with pytest.raises(ValueError, match="virtual tokens"):
        token_logprobs(model, batch())


def test_an_adapter_for_each_row():
    """Right where the adapters share the head, refused where modules_to_save gives each its own."""
    names, inputs = ["default", "second", "__base__"], batch()
    for saved in (None, ["lm_head"]):
        model = lora(modules_to_save=saved)
        options = {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False, "modules_to_save": saved}
        model.add_adapter("second", peft.LoraConfig(**options))
        model.eval()
        if saved is None:
            own = model(**inputs, adapter_names=names).loss.item()
            with fused_lm_head(model):
                assert model(**inputs, adapter_names=names).loss.item() == pytest.approx(own, rel=2**-17)
        else:
            with pytest.raises(ValueError, match="no adapter_names"):
                token_logprobs(model, {**inputs, "adapter_names": names})
