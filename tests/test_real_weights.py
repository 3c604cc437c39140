"""SmolLM2-135M-Instruct: trained logits are peaked, correlated and offset as random ones never are."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="pretrained models need the extra 'hf'")

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pretrained import fetch
from tests.tolerance import rms
from var_kernels.integrations.hf import fused_lm_head, token_logprobs
from var_kernels.integrations.trainer import VARTrainer, method_config
from var_kernels.ops import linear_logprob

TEXTS = ["The bus came late, so I walked home through the rain.", "Water boils at 100 degrees Celsius at sea level."]
ROWS = [
    {
        "prompt": [{"role": "user", "content": "How was your day?"}],
        "completions": [[{"role": "assistant", "content": text}] for text in ("It was lovely.", "Dull and cold.")],
        "rewards": [0.6, -0.4],
    }
] * 4


@pytest.fixture(scope="module")
def folder():
    try:
        return fetch()
    except (OSError, ModuleNotFoundError) as error:
        pytest.skip(f"no pretrained model: {error}")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def model(loaded):
    """Without the gradients of an earlier test; a test that trains takes a copy."""
    loaded.zero_grad(set_to_none=True)
    return loaded.eval()


def batch(tokenizer):
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = inputs.input_ids.where(inputs.attention_mask.bool(), -100)
    labels[0, :4] = -100
    return {**inputs, "labels": labels}


def gradients(model):
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.timeout(900)
def test_log_probs_loss_and_every_gradient_in_fp32(model, tokenizer):
    """Beside the model's own in fp32, against fp64: transformers' loss reads the logits in fp32, whatever the model's
    dtype, so the truth is made of them here."""
    inputs, true = batch(tokenizer), copy.deepcopy(model).double()
    scored = inputs["labels"][:, 1:] != -100
    logp = true(**{**inputs, "labels": None}).logits[:, :-1].log_softmax(-1)
    wanted = logp.gather(-1, inputs["labels"][:, 1:, None].clamp(min=0))[..., 0][scored]
    truth = -wanted.mean()
    truth.backward()
    expected = gradients(true)
    own = model(**inputs).loss
    own.backward()
    errors = {name: rms(g - expected[name]) / rms(expected[name]) for name, g in gradients(model).items()}
    model.zero_grad(set_to_none=True)
    with fused_lm_head(model):
        fused = model(**inputs).loss
        fused.backward()
    assert abs(fused - truth) <= 2**-17 * truth
    assert abs(own - truth) <= 2**-16 * truth
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, error in errors.items():
        assert rms(found[name] - expected[name]) / rms(expected[name]) <= max(2 * error, 2**-17), name
    with torch.no_grad():
        got = token_logprobs(model, inputs)[:, 1:]
    torch.testing.assert_close(got[scored].double(), wanted.detach(), rtol=0, atol=2e-4)
    assert wanted.max().exp() > 0.8 > 100 * wanted.min().exp()  # peaked, and surprised


def test_the_tied_head_in_bf16_is_nearer_to_fp64_than_plain(model, tokenizer):
    """From the same bf16 hidden states and weights: plain rounds every logit, ours none."""
    inputs = batch(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    hidden, labels = hidden[:, :-1].bfloat16().flatten(0, 1), inputs["labels"][:, 1:].flatten()
    weight = model.get_output_embeddings().weight.detach().bfloat16()

    def run(call, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        logp = call(*leaves)[labels != -100]
        grads = torch.autograd.grad(logp.double().sum(), leaves)
        return [part.detach().double() for part in (logp, *grads)]

    def plain(h, w):
        logits = F.linear(h, w)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]

    truth = run(plain, torch.float64)
    ours = run(lambda h, w: linear_logprob(h, w, labels), torch.bfloat16)
    theirs = run(plain, torch.bfloat16)
    errors = [[rms(a - b) / rms(b) for a, b in zip(found, truth, strict=True)] for found in (ours, theirs)]
    assert errors[0][0] < errors[1][0] / 8  # log-probs
    assert all(mine < other * 1.02 for mine, other in zip(errors[0][1:], errors[1][1:], strict=True))
    assert max(errors[0]) < 2**-7


def settings(folder, **changes):
    from peft import LoraConfig

    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "max_length": 64,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 3,
        **changes,
    }
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return method_config("var")(str(folder), lam=0.5, **options), adapter


@pytest.mark.timeout(900)
def test_a_resumed_run_ends_as_one_without_a_stop_and_generates(loaded, tokenizer, tmp_path):
    ended = []
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        config, adapter = settings(tmp_path, save_strategy="steps", save_steps=1)
        model = copy.deepcopy(loaded)
        trainer = VARTrainer(model, config, ROWS, processing_class=tokenizer, peft_config=adapter)
        trainer.train(resume_from_checkpoint=checkpoint)
        ended.append({key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad})
    assert any(p.any() for key, p in ended[0].items() if "lora_B" in key)
    for key in ended[0]:
        torch.testing.assert_close(ended[1][key], ended[0][key], rtol=0, atol=0, msg=key)
    ids = tokenizer(TEXTS[:1], return_tensors="pt")
    made = trainer.model.generate(**ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = trainer.model(made[:, :-1]).logits[0, ids.input_ids.shape[1] - 1 :]
    assert logits.argmax(-1).tolist() == made[0, ids.input_ids.shape[1] :].tolist()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_a_step_of_trl(name, loaded, tokenizer, tmp_path):
    """Own head and fused: the same loss and the same step of the adapter."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        pytest.skip("trl before 1.16")
    from peft import LoraConfig

    from var_kernels.integrations.trl import FusedHeadMixin

    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    pair = {"prompt": ROWS[0]["prompt"], "chosen": ROWS[0]["completions"][0], "rejected": ROWS[0]["completions"][1]}
    rows, special = datasets.Dataset.from_list([pair] * 2), {}
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "seed": 3}
    if name == "GRPO":
        rows = rows.remove_columns(["chosen", "rejected"])
        options |= {"num_generations": 2, "max_completion_length": 8}
        special = {"reward_funcs": lambda completions, **_: [float(len(c[0]["content"])) for c in completions]}
    found = []
    for kind in (trainer_class, type("Fused", (FusedHeadMixin, trainer_class), {})):
        config = config_class(
            str(tmp_path / kind.__name__), max_steps=1, use_cpu=True, bf16=False, disable_tqdm=True, report_to=[],
            save_strategy="no", logging_steps=1, gradient_checkpointing=False, **options,
        )  # fmt: skip
        adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = copy.deepcopy(loaded)
        trainer = kind(
            model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=adapter, **special
        )
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        weights = [p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n]
        found.append((log["loss"], log["grad_norm"], weights))
    (own, own_norm, own_weights), (fused, fused_norm, fused_weights) = found
    assert fused == pytest.approx(own, rel=1e-4, abs=1e-6)
    assert fused_norm == pytest.approx(own_norm, rel=1e-3)
    assert any(weight.any() for weight in own_weights)
    moved = [torch.stack([(w - v).norm() for w, v in zip(own_weights, fused_weights, strict=True)]).norm()]
    assert moved[0] <= 0.02 * torch.stack([w.norm() for w in own_weights]).norm()
