"""TRL's trainers with this library's head: TRL's own curves over 20 steps, the fields by hand, what is refused."""

import copy
import types

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets")

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import SFTTrainer

from tests.products import Products
from tests.trl_runs import (
    LORA,
    assert_same_curves,
    build,
    fields_of_logits,
    fused,
    logs,
    needs_fused_trl,
    own,
    tiny,
)
from var_kernels.integrations.hf.model import inner_model
from var_kernels.integrations.trl import FusedHeadMixin, _FusedForward
from var_kernels.measure import peak_extra_bytes

pytestmark = needs_fused_trl

CASES = {
    "sft": ("SFT", {}),
    "sft-dft-accumulated": ("SFT", {"loss_type": "dft", "gradient_accumulation_steps": 2}),
    "dpo": ("DPO", {}),
    "dpo-ipo-weighted-precomputed": (
        "DPO",
        {"loss_type": ["ipo"], "use_weighting": True, "precompute_ref_log_probs": True},
    ),
    "dpo-lora": ("DPO", {"adapter": LORA}),
    "kto": ("KTO", {}),
    "grpo": ("GRPO", {"temperature": 0.7, "beta": 0.1, "entropy_coef": 0.01, "num_iterations": 2}),
}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES.keys())
def test_same_curves(name, options, tmp_path):
    expected = logs(build(own, name, tmp_path / "own", **options))
    trainer = build(fused, name, tmp_path / "fused", **options)
    assert isinstance(inner_model(trainer.model).forward, _FusedForward)
    assert_same_curves(logs(trainer), expected)


# ---- the fields that TRL asks for ------------------------------------------------------------------------------------

MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "gemma2-softcap": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "mixtral-aux": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 3, "output_router_logits": True, "experts_implementation": "eager"},
    ),
}
ALL_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEMPERATURE = 0.7


def batch():
    torch.manual_seed(1)
    ids = torch.randint(300, (2, 9))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def by_hand(model, inputs):
    output = model(input_ids=inputs["input_ids"])
    fields, aux = fields_of_logits(output.logits, inputs["labels"], TEMPERATURE), getattr(output, "aux_loss", None)
    if aux is not None:
        fields["loss"] = fields["loss"] + model.config.router_aux_loss_coef * aux
    return fields, aux


@pytest.mark.parametrize("case", MODELS)
def test_fields_by_hand(case):
    cls, config, options = MODELS[case]
    model = tiny(cls, config, **options).double().eval()
    inputs, weights = batch(), torch.rand(2, 8, dtype=torch.float64)
    expected, aux = by_hand(model, inputs)

    def gradients(fields):
        model.zero_grad()
        (fields["loss"] + (weights * fields["log_probs"]).sum() + (weights * fields["entropy"]).sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected_gradients = gradients(expected)
    _FusedForward(model, TEMPERATURE, False, frozenset(ALL_FIELDS))
    got = model(**inputs, fused_lm_head=True)
    for name, field in expected.items():
        torch.testing.assert_close(got[name], field, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    assert (aux is None and got.aux_loss is None) or torch.equal(got.aux_loss, aux)
    for ours, theirs in zip(gradients(got), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_config_may_ask_for_router_logits_that_no_loss_is_made_of():
    model = tiny().eval()
    expected = model(**batch()).loss
    model.config.output_router_logits = True
    _FusedForward(model, 1.0, False, frozenset(("log_probs",)))
    torch.testing.assert_close(model(**batch(), fused_lm_head=True).loss, expected)
    with pytest.raises(ValueError, match=r"returns no aux_loss of its own, got True; set router_aux_loss_coef=0\.0"):
        model(**batch(), output_router_logits=True, fused_lm_head=True)


def test_labels_shifted_by_the_caller_and_counts():
    model, inputs = tiny().double().eval(), batch()
    _FusedForward(model, 1.0, False, frozenset(("log_probs",)))
    plain = model(**inputs, fused_lm_head=True)
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    got = model(**inputs, shift_labels=shifted, num_items_in_batch=4, fused_lm_head=True)
    assert got.log_probs.shape == (2, 9)
    torch.testing.assert_close(got.log_probs[:, :-1], plain.log_probs)
    torch.testing.assert_close(got.loss, plain.loss * plain.label_mask.sum() / 4)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 12], ids=str)
def test_a_batch_without_a_label(num_items):
    """0 with gradients of 0, whatever the step's other batches hold."""
    model = tiny().double().eval()
    _FusedForward(model, 1.0, False, frozenset({"log_probs"}))
    inputs = batch()
    inputs["labels"].fill_(-100)
    loss = model(**inputs, num_items_in_batch=num_items, fused_lm_head=True).loss
    assert loss == 0
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_fp32_over_a_body_in_bf16(autocast):
    model, inputs = tiny().eval().bfloat16(), batch()
    head = model.lm_head.float()
    head.weight.data.mul_(1 / 3)  # no longer what bf16 can hold
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), head.weight)  # GRPO's way
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        expected = model(input_ids=inputs["input_ids"]).logits
        _FusedForward(model, 1.0, True, frozenset(("log_probs",)))
        got = model(**inputs, fused_lm_head=True).log_probs
        again = model(input_ids=inputs["input_ids"]).logits
    assert hidden.dtype == torch.bfloat16
    logp = (hidden.float() @ head.weight.T)[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    logp = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0.0)
    torch.testing.assert_close(got, logp, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)  # the plain forward runs as ever


def test_copies_and_bound_forwards_run_their_own_weights():
    model, inputs = tiny().eval(), batch()
    _FusedForward(model, 1.0, False, frozenset(("log_probs",)))
    before = model(**inputs, fused_lm_head=True).log_probs
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(copied(**inputs, fused_lm_head=True).log_probs, before)
    model.forward = types.MethodType(model.forward, model)  # as accelerate leaves it
    after = model(**inputs, fused_lm_head=True).log_probs
    assert not torch.allclose(after, before)


def test_a_reference_of_equal_weights_gives_a_log_ratio_of_zero(tmp_path):
    """To the bit, though only the policy is asked for entropies: Adam makes a step of any gradient that is not 0."""
    trainer = build(fused, "DPO", tmp_path / "run")
    ids = torch.randint(1000, (4, 51))
    logps = []
    for model in (trainer.model, trainer.ref_model):
        model.resize_token_embeddings(1000)
        model.load_state_dict(trainer.model.state_dict())
        with torch.no_grad():
            logps.append(model.eval()(input_ids=ids, labels=ids, fused_lm_head=True).log_probs)
    assert torch.equal(*logps)


def test_no_logits_in_memory(tmp_path):
    trainer = build(fused, "SFT", tmp_path / "run")
    trainer.model.resize_token_embeddings(20_000)
    ids = torch.randint(300, (4, 512))
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trainer.compute_loss(trainer.model, inputs).backward()  # gradients exist from here on
    extra = peak_extra_bytes(lambda: trainer.compute_loss(trainer.model, inputs).backward())
    assert extra < 0.6 * 4 * ids.numel() * 20_000, f"{extra / 2**20:.0f} MiB"


def sft_inputs():
    ids = torch.randint(3, 300, (4, 9))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"adapter": LORA}])
def test_sft_has_its_gradients_after_the_forward(options, tmp_path):
    trainer = build(fused, "SFT", tmp_path / "run", **options)
    loss = trainer.compute_loss(trainer.model.train(), sft_inputs(), num_items_in_batch=torch.tensor(20))
    with Products() as products:
        loss.backward()
    vocabulary = trainer.model.get_output_embeddings().weight.shape[0]
    assert products.sizes
    assert not any(vocabulary in size for size in products.sizes), "a second pass over the head"
    assert any(p.grad is not None for p in trainer.model.parameters())


class Weighted(SFTTrainer):
    """A loss of its own on TRL's log-probs: the second half of each row counts twice."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        log_probs = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        return -(log_probs * torch.linspace(1, 2, log_probs.shape[1])).sum()


def test_a_loss_of_ones_own_takes_two_passes_and_is_right(tmp_path):
    torch.manual_seed(0)
    inputs, grads = sft_inputs(), []
    for trainer_class in (Weighted, fused(Weighted)):
        trainer = build(lambda _, cls=trainer_class: cls, "SFT", tmp_path / trainer_class.__name__)
        trainer.compute_loss(trainer.model.train(), dict(inputs)).backward()
        grads.append(trainer.model.lm_head.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_a_gradient_made_for_another_loss_is_refused(tmp_path):
    trainer = build(fused, "SFT", tmp_path / "run")
    trainer.model.train()
    log_probs = trainer.model(**sft_inputs(), use_cache=False, fused_lm_head=True).log_probs
    with pytest.raises(RuntimeError, match="not the one that its gradient was made for"):
        (log_probs * torch.linspace(1, 2, log_probs.shape[1])).sum().backward()


def test_nan_passes_through_as_in_trl(tmp_path):
    trainer = build(fused, "SFT", tmp_path / "run", loss_type="dft")
    with torch.no_grad():
        trainer.model.train().lm_head.weight.fill_(torch.nan)
    loss = trainer.compute_loss(trainer.model, sft_inputs())
    loss.backward()
    assert loss.isnan()
    assert trainer.model.lm_head.weight.grad.isnan().any()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"trainer_options": {"compute_loss_func": lambda *_, **__: 0}}, "compute_loss_func"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_options_that_need_logits_are_refused(options, named, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    built = []

    class Trainer(SFTTrainer):
        def __init__(self, *args, **kwargs):
            built.append(kwargs["model"])
            super().__init__(*args, **kwargs)

    with pytest.raises(ValueError, match=rf"{named} must be unset.*without FusedHeadMixin"):
        build(lambda _: fused(Trainer), "SFT", tmp_path / "run", **options)
    assert "forward" not in vars(built[0])


def test_other_classes_are_refused(tmp_path):
    class Nothing(FusedHeadMixin):
        pass

    with pytest.raises(TypeError, match=r"must be a trainer of trl>=1\.16"):
        Nothing()


def test_a_head_that_is_not_understood_is_refused():
    model = tiny()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.GELU())
    with pytest.raises(ValueError, match=r"its output embedding must be one nn\.Linear"):
        _FusedForward(model, 1.0, False, frozenset(("log_probs",)))
    assert "forward" not in vars(model)
