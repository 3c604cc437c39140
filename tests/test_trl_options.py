"""Every option of TRL's trainers that reaches the head or the loss: TRL's own numbers, as docs/migration.md says."""

import copy
import re
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from transformers import MixtralConfig, MixtralForCausalLM

from tests.tiny_training import tokenizer
from tests.trl_runs import LORA, SFT, assert_same_curves, build, fused, logs, needs_fused_trl, own

pytestmark = [needs_fused_trl, pytest.mark.filterwarnings("ignore::FutureWarning")]
PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
STEPS = 4

CHAT = copy.deepcopy(tokenizer())
CHAT.chat_template = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "x" + row["completion"]},
        ]
    }
    for row in SFT
]
TEXTS = [{"text": row["prompt"] + row["completion"]} for row in SFT]
MIXTRAL = (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 3, "experts_implementation": "eager"})


def chat(**options):
    return {"rows": MESSAGES, "trainer_options": {"processing_class": CHAT}, **options}


def mean_logit(prediction):
    logits = prediction.predictions
    return {"mean_logit": float((logits[0] if isinstance(logits, tuple) else logits).mean())}


def evaluated(**trainer_options):
    return {"eval_strategy": "steps", "eval_steps": 2, "trainer_options": trainer_options}


def losses(*names, **options):
    return {name: {"loss_type": name, **options} for name in names}


def pairs_losses(*names, **options):
    return {name: {"loss_type": [name], **options} for name in names}


# trainer -> option -> value as the page names it -> arguments of the trainer
SAME = {
    "SFT": {
        "loss_type": losses("nll", "dft"),
        "completion_only_loss": {"True": {"completion_only_loss": True}, "False": {"completion_only_loss": False}},
        "assistant_only_loss": {"True": chat(assistant_only_loss=True)},
        "dataset": {"text": {"rows": TEXTS}, "messages": chat()},
        "packing_strategy": {
            name: {"packing": True, "packing_strategy": name, "max_length": 12, "num_train_epochs": 9, "rows": TEXTS}
            for name in ("bfd", "bfd_split", "wrapped")
        },
        "padding_free": {"True": {"padding_free": True, "max_length": None}},
        "max_length": {"5": {"max_length": 5, "rows": TEXTS}},
        "pad_to_multiple_of": {"8": {"pad_to_multiple_of": 8}},
        "gradient_accumulation_steps": {"3": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}},
        "average_tokens_across_devices": {"False": {"average_tokens_across_devices": False}},
        "gradient_checkpointing": {"True": {"gradient_checkpointing": True}},
        "bf16": {"True": {"bf16": True}},
        "peft_config": {"LoRA": {"adapter": LORA}, "LoRA, dft": {"adapter": LORA, "loss_type": "dft"}},
        "router_aux_loss_coef": {"0.1": {"router_aux_loss_coef": 0.1, "architecture": MIXTRAL}},
        "eval_strategy": {"steps": {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}},
        "compute_metrics": {"function": evaluated(compute_metrics=mean_logit)},
        "preprocess_logits_for_metrics": {
            "function": evaluated(
                compute_metrics=mean_logit, preprocess_logits_for_metrics=lambda logits, _: 2 * logits
            )
        },
    },
    "DPO": {
        "loss_type": {
            **pairs_losses("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            **pairs_losses("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
            **pairs_losses("exo_pair", "robust", label_smoothing=0.1),
        },
        "loss_weights": {"[1.0, 0.3]": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}},
        "label_smoothing": {"0.1": {"loss_type": ["aot"], "label_smoothing": 0.1}},
        "f_divergence_type": {
            name: {"f_divergence_type": name}
            for name in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
        },
        "ld_alpha": {"0.5": {"ld_alpha": 0.5}},
        "use_weighting": {"True": {"use_weighting": True}},
        "precompute_ref_log_probs": {"True": {"precompute_ref_log_probs": True}},
        "sync_ref_model": {"True": {"sync_ref_model": True, "ref_model_sync_steps": 2}},
        "padding_free": {"False": {"padding_free": False}},
        "peft_config": {
            "LoRA": {"adapter": LORA},
            "LoRA, precomputed": {"adapter": LORA, "precompute_ref_log_probs": True},
        },
        "gradient_checkpointing": {"True": {"gradient_checkpointing": True}},
        "bf16": {"True": {"bf16": True}},
        "router_aux_loss_coef": {"0.1": {"router_aux_loss_coef": 0.1, "architecture": MIXTRAL}},
        "eval_strategy": {"steps": {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}},
        "compute_metrics": {"function": evaluated(compute_metrics=mean_logit)},
    },
    "KTO": {
        "loss_type": losses("kto", "apo_zero_unpaired"),
        "desirable_weight": {"2.0": {"desirable_weight": 2.0, "undesirable_weight": 0.5}},
        "precompute_ref_log_probs": {"True": {"precompute_ref_log_probs": True}},
        "sync_ref_model": {"True": {"sync_ref_model": True, "ref_model_sync_steps": 2}},
        "peft_config": {"LoRA": {"adapter": LORA}},
        "compute_metrics": {"function": evaluated(compute_metrics=mean_logit)},
    },
    "GRPO": {
        "loss_type": {
            **losses("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", num_iterations=2),
            **losses("luspo", num_iterations=2, importance_sampling_level="sequence"),
        },
        "importance_sampling_level": {
            "sequence": {"importance_sampling_level": "sequence", "num_iterations": 2, "loss_type": "grpo"}
        },
        "beta": {"0.1": {"beta": 0.1}},
        "use_bias_correction_kl": {"True": {"beta": 0.1, "use_bias_correction_kl": True, "num_iterations": 2}},
        "temperature": {"0.7": {"temperature": 0.7}},
        "top_entropy_quantile": {"0.5": {"top_entropy_quantile": 0.5}},
        "entropy_coef": {"0.01": {"entropy_coef": 0.01}},
        "use_adaptive_entropy": {"True": {"use_adaptive_entropy": True, "entropy_coef": 0.01}},
        "delta": {"1.5": {"delta": 1.5, "num_iterations": 2}},
        "off_policy_mask_threshold": {"0.01": {"off_policy_mask_threshold": 0.01, "num_iterations": 2}},
        "mask_truncated_completions": {"True": {"mask_truncated_completions": True, "max_completion_length": 12}},
        "scale_rewards": {"none": {"scale_rewards": "none"}, "batch": {"scale_rewards": "batch"}},
        "cast_lm_head_to_fp32": {"True": {"cast_lm_head_to_fp32": True}},
        "sync_ref_model": {"True": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}},
        "peft_config": {"LoRA": {"adapter": LORA, "beta": 0.1}},
    },
    "RLOO": {"beta": {"0.05": {"beta": 0.05, "num_iterations": 2}}},
}
CASES = [
    pytest.param(name, case, id=f"{name}-{option}-{value}")
    for name, options in SAME.items()
    for option, values in options.items()
    for value, case in values.items()
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_same_numbers(name, case, tmp_path):
    options = {"max_steps": STEPS, **case}
    truth = build(own, name, tmp_path / "own", **options)
    expected = logs(truth)  # before ours is built: they draw from the same generator
    ours = build(fused, name, tmp_path / "fused", **options)
    rounding = {"rel_tol": 3e-2, "abs_tol": 5e-3} if case.get("bf16") else {}
    assert_same_curves(logs(ours), expected, STEPS, **rounding)
    for entry, theirs in zip(ours.state.log_history, truth.state.log_history, strict=True):
        found = {k: v for k, v in theirs.items() if k.startswith("eval_") and not k.endswith(("runtime", "second"))}
        assert {k: entry[k] for k in found} == pytest.approx(found, rel=1e-5, abs=1e-6)


def test_the_page_lists_what_is_tested():
    section = PAGE.read_text().split("### Options of TRL")[1].split("\n## ")[0]
    listed = {}
    for trainer, text in re.findall(r"- \*\*(\w+)\*\*: (.*?)\.(?=\n- |\n\n)", section, re.DOTALL):
        options = [re.findall(r"`([^`]+)`", " ".join(option.split())) for option in text.split(";")]
        listed[trainer] = {name: values for name, *values in options}
    assert listed == {
        name: {option: list(values) for option, values in options.items()} for name, options in SAME.items()
    }
