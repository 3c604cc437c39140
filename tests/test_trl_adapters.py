"""PEFT on the lm_head inside TRL's trainers, which refuse it themselves: the curves that the model's logits give."""

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets")

import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.trl_runs import (
    JUDGED,
    PAIRS,
    PROMPTS,
    SFT,
    assert_same_curves,
    fused,
    length_reward,
    logs,
    make,
    needs_fused_trl,
    on_full_logits,
)

pytestmark = needs_fused_trl

GEMMA2 = (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0})
TIED = (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True})


def lora(*modules, **options):
    return LoraConfig(**{"r": 2, "target_modules": list(modules), "init_lora_weights": False, **options})


def adapter(*modules, **options):
    return {"trainer_options": {"peft_config": lora(*(modules or ("q_proj", "lm_head")), **options)}}


def trained_before(model):
    """A model whose adapter was trained: TRL copies it as the reference's."""
    return get_peft_model(model, lora("q_proj", "lm_head"))


ROWS_OF = {"SFT": SFT, "DPO": PAIRS, "KTO": JUDGED, "GRPO": PROMPTS, "RLOO": PROMPTS}
ONLINE = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
WHOLE_CURVES = ("sft", "dpo", "kto", "grpo")  # over 20 steps, the others over 8
CASES = {
    "sft": ("SFT", adapter()),
    "sft-dft-dropout": ("SFT", {**adapter(lora_dropout=0.3), "loss_type": "dft"}),
    "sft-head-alone": ("SFT", adapter("lm_head", use_rslora=True, lora_alpha=3)),
    "sft-lora-bias": ("SFT", adapter(lora_bias=True)),
    "dpo": ("DPO", adapter()),
    "dpo-rslora-softcap": ("DPO", {**adapter(use_rslora=True, lora_alpha=3), "architecture": GEMMA2}),
    "dpo-weighted-dropout": ("DPO", {**adapter(lora_dropout=0.3), "use_weighting": True, "disable_dropout": False}),
    "dpo-precomputed": ("DPO", {**adapter(), "precompute_ref_log_probs": True}),
    "dpo-trained-before": ("DPO", {"adapt": trained_before}),
    "dpo-modules-to-save": ("DPO", adapter("q_proj", modules_to_save=["lm_head"])),
    "dpo-tied-trainable-tokens": (
        "DPO",
        {**adapter("q_proj", trainable_token_indices=[5, 40, 41]), "architecture": TIED},
    ),
    "kto": ("KTO", adapter()),
    "kto-trained-before": ("KTO", {"adapt": trained_before}),
    "grpo": ("GRPO", {**adapter(), "num_iterations": 2, "temperature": 0.7, "entropy_coef": 0.01}),
    "grpo-trained-before": ("GRPO", {"adapt": trained_before}),
    "grpo-modules-to-save": ("GRPO", adapter("q_proj", modules_to_save=["lm_head"])),
    "rloo": ("RLOO", adapter()),
}


def build(wrap, name, options, folder):
    options = {**(ONLINE if name in ("GRPO", "RLOO") else {}), **options}
    trainer_options = dict(options.pop("trainer_options", {}))
    if name in ("GRPO", "RLOO"):
        trainer_options["reward_funcs"] = length_reward
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    return make(wrap(trainer_class), config_class, ROWS_OF[name], folder, trainer_options=trainer_options, **options)


@pytest.mark.parametrize("case", CASES)
def test_same_curves_as_on_full_logits(case, tmp_path):
    name, options = CASES[case]
    steps = 20 if case in WHOLE_CURVES else 8
    options = {**options, "max_steps": steps}
    own = build(on_full_logits, name, options, tmp_path / "own")
    expected = logs(own)
    ours = build(fused, name, options, tmp_path / "fused")
    assert_same_curves(logs(ours), expected, steps)
    trained = {n: p for n, p in own.model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n or "token" in n for n in trained)
    for n, p in ours.model.named_parameters():
        if n in trained:
            torch.testing.assert_close(p, trained[n], rtol=1e-3, atol=1e-5)


def test_full_logits_give_trls_own_curve(tmp_path):
    """The yardstick itself, where TRL has a curve of its own."""
    options = {**adapter("q_proj"), "max_steps": 8, "use_weighting": True}
    expected = logs(build(lambda cls: cls, "DPO", options, tmp_path / "trl"))
    assert_same_curves(logs(build(on_full_logits, "DPO", options, tmp_path / "own")), expected, 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SFT", adapter("lm_head", use_dora=True), "is a DoraLinearVariant"),
        ("DPO", adapter("lm_head", use_dora=True), "is a DoraLinearVariant"),
        ("GRPO", {**adapter(), "cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32: expected False with an adapter"),
    ],
)
def test_what_cannot_work_is_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(fused, name, options, tmp_path / "run")
