"""PEFT on the lm_head inside TRL's trainers, which refuse it themselves: the curves that the model's logits give."""

import functools

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets")

import torch
from peft import get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.trl_runs import assert_same_curves, build, fused, logs, lora, needs_fused_trl, on_full_logits, own

pytestmark = needs_fused_trl

GEMMA2 = (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0})
TIED = (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True})
head = functools.partial(lora, "q_proj", "lm_head")


def trained_before(model):
    """A model whose adapter was trained: TRL copies it as the reference's."""
    return get_peft_model(model, head())


WHOLE_CURVES = ("sft", "dpo", "kto", "grpo")  # over 20 steps, the others over 5
CASES = {
    "sft": ("SFT", {"adapter": head()}),
    "sft-dft-dropout": ("SFT", {"adapter": head(lora_dropout=0.3), "loss_type": "dft"}),
    "sft-head-alone": ("SFT", {"adapter": lora("lm_head", use_rslora=True, lora_alpha=3)}),
    "sft-lora-bias": ("SFT", {"adapter": head(lora_bias=True)}),
    "dpo": ("DPO", {"adapter": head()}),
    "dpo-rslora-softcap": ("DPO", {"adapter": head(use_rslora=True, lora_alpha=3), "architecture": GEMMA2}),
    "dpo-weighted-dropout": (
        "DPO",
        {"adapter": head(lora_dropout=0.3), "use_weighting": True, "disable_dropout": False},
    ),
    "dpo-precomputed": ("DPO", {"adapter": head(), "precompute_ref_log_probs": True}),
    "dpo-trained-before": ("DPO", {"adapt": trained_before}),
    "dpo-modules-to-save": ("DPO", {"adapter": lora("q_proj", modules_to_save=["lm_head"])}),
    "dpo-tied-trainable-tokens": (
        "DPO",
        {"adapter": lora("q_proj", trainable_token_indices=[5, 40, 41]), "architecture": TIED},
    ),
    "kto": ("KTO", {"adapter": head()}),
    "kto-trained-before": ("KTO", {"adapt": trained_before}),
    "grpo": (
        "GRPO",
        {"adapter": head(), "beta": 0.1, "num_iterations": 2, "temperature": 0.7, "entropy_coef": 0.01},
    ),
    "grpo-trained-before": ("GRPO", {"adapt": trained_before, "beta": 0.1}),
    "rloo": ("RLOO", {"adapter": head()}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_curves_as_on_full_logits(case, tmp_path):
    name, options = CASES[case]
    steps = 20 if case in WHOLE_CURVES else 5
    options = {**options, "max_steps": steps}
    truth = build(on_full_logits, name, tmp_path / "own", **options)
    expected = logs(truth)
    ours = build(fused, name, tmp_path / "fused", **options)
    assert_same_curves(logs(ours), expected, steps)
    trained = {n: p for n, p in truth.model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n or "token" in n for n in trained)
    for n, p in ours.model.named_parameters():
        if n in trained:
            torch.testing.assert_close(p, trained[n], rtol=1e-3, atol=1e-5)


def test_full_logits_give_trls_own_curve(tmp_path):
    """The yardstick itself, where TRL has a curve of its own."""
    options = {"adapter": lora("q_proj"), "max_steps": 5, "use_weighting": True}
    expected = logs(build(own, "DPO", tmp_path / "trl", **options))
    assert_same_curves(logs(build(on_full_logits, "DPO", tmp_path / "own", **options)), expected, 5)


DORA = {"adapter": head(use_dora=True)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SFT", DORA, "must be plain LoRA, .* got a DoraLinearVariant"),
        ("DPO", DORA, "must be plain LoRA, .* got a DoraLinearVariant"),
        ("GRPO", {"adapter": head(), "cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 must be False with an"),
    ],
)
def test_what_cannot_work_is_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(fused, name, tmp_path / "run", **options)
