# ruff: noqa: E402  (imports that need trl stand below the skip)
"""What the tests of TRL's trainers share: rows, a tiny model, a trainer with or without the fused head, its log."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")

import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.tiny_training import ROWS, tokenizer
from var_kernels.integrations.trl import FusedHeadMixin

needs_fused_trl = pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="trl before 1.16")

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
SFT = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in ROWS]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][2]} for r in ROWS]
JUDGED = [
    {"prompt": row["prompt"], "completion": completion, "label": label}
    for row in ROWS
    for completion, label in zip(row["completions"][:2], (True, False), strict=True)
]
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]


LORA = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)


def length_reward(completions, **_kwargs):
    return [float(len(text) % 7) for text in completions]


def tiny(cls=LlamaForCausalLM, config=LlamaConfig, seed=0, **options):
    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer().pad_token_id, "eos_token_id": tokenizer().eos_token_id}
    model = cls(config(**SIZES, **ids, bos_token_id=tokenizer().bos_token_id, initializer_range=0.3, **options))
    return model.float()


def fused(trainer_class):
    return type(f"Fused{trainer_class.__name__}", (FusedHeadMixin, trainer_class), {})


def make(trainer_class, config_class, rows, folder, *, architecture=(), trainer_options=None, **options):
    torch.manual_seed(5)  # of LoRA's first matrices
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,  # at 1e-2 Adam blows the rounding of small gradients up to 1.4e-5 within 20 steps
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    saved = Path(folder).parent / "model"  # TRL loads its reference by name
    if not saved.exists():
        model_class, config, model_options = architecture or (LlamaForCausalLM, LlamaConfig, {})
        tiny(model_class, config, **model_options).save_pretrained(saved)
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32),
        args=config_class(str(folder), **{**settings, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        **{"processing_class": tokenizer(), **(trainer_options or {})},
    )


def logs(trainer):
    """Every number of every step's log that is not a time."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [
        {k: float(v) for k, v in step.items() if "time" not in k and "speed" not in k and v is not None}
        for step in steps
    ]


def assert_same_curves(got, expected, steps=20, rel_tol=1e-5, abs_tol=1e-6):
    assert len(got) == len(expected) == steps
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            close = math.isclose(ours[name], value, rel_tol=rel_tol, abs_tol=abs_tol)
            assert close or math.isnan(value), f"step {step}, {name}: {ours[name]} instead of {value}"
    assert len({step["grad_norm"] for step in expected}) >= steps // 2  # something was learnt
