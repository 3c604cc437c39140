# ruff: noqa: E402  (imports that need trl stand below the skip)
"""What the tests of TRL's trainers share: rows, a tiny model, a trainer with or without the fused head, its log."""

import copy
import functools
import math
import sys
from pathlib import Path
from types import MethodType

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
ROWS_OF = {"SFT": SFT, "DPO": PAIRS, "KTO": JUDGED, "GRPO": PROMPTS, "RLOO": PROMPTS}


def lora(*modules, **options):
    return LoraConfig(**{"r": 2, "target_modules": list(modules), "init_lora_weights": False, **options})


LORA = lora("q_proj", "up_proj")


def length_reward(completions, **_kwargs):
    return [float(len(text) % 7) for text in completions]


def tiny(cls=LlamaForCausalLM, config=LlamaConfig, seed=0, **options):
    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer().pad_token_id, "eos_token_id": tokenizer().eos_token_id}
    model = cls(config(**SIZES, **ids, bos_token_id=tokenizer().bos_token_id, initializer_range=0.3, **options))
    return model.float()


def fused(trainer_class):
    return type(f"Fused{trainer_class.__name__}", (FusedHeadMixin, trainer_class), {})


def own(trainer_class):
    return trainer_class


def build(wrap, name, folder, *, rows=None, architecture=(), adapt=None, adapter=None, trainer_options=None, **options):
    """``wrap`` of TRL's trainer of that name, on a tiny model read from beside ``folder``.

    adapt: makes of that model what the trainer gets; adapter: PEFT's configuration; options: of TRL's configuration.
    """
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
    trainer_options = {"processing_class": tokenizer(), **(trainer_options or {})}
    rows = ROWS_OF[name] if rows is None else rows
    if name in ("GRPO", "RLOO"):
        settings |= {"num_generations": 4, "max_completion_length": 6}
        trainer_options["reward_funcs"] = length_reward
    if adapter is not None:
        trainer_options["peft_config"] = copy.deepcopy(adapter)  # PEFT writes into it
    if options.get("eval_strategy"):
        trainer_options["eval_dataset"] = datasets.Dataset.from_list(rows[:6])
    saved = Path(folder).parent / "model"  # TRL loads its reference by name
    if not saved.exists():
        model_class, config, model_options = architecture or (LlamaForCausalLM, LlamaConfig, {})
        tiny(model_class, config, **model_options).save_pretrained(saved)
    torch.manual_seed(5)  # of LoRA's first matrices
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    return wrap(getattr(trl, f"{name}Trainer"))(
        model=model if adapt is None else adapt(model),
        args=getattr(trl, f"{name}Config")(str(folder), **{**settings, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        **trainer_options,
    )


# ---- TRL's trainers on full logits: what our head, and TRL's own, must agree with -----------------------------------


def fields_of_logits(logits, labels, temperature=1.0):
    """Everything that a trainer may ask of (B, T, V) logits, as TRL's FusedCausalLMOutput names it."""
    logits, labels = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)) / temperature, labels[:, 1:]
    mask, logp = labels != -100, logits.log_softmax(-1)
    p = logp.exp()
    fields = {
        "log_probs": logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(p * logp).sum(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
    }
    fields = {name: torch.where(mask, field, torch.zeros_like(field)) for name, field in fields.items()}
    return {**fields, "label_mask": mask, "loss": -fields["log_probs"].sum() / mask.sum().clamp(min=1)}


def _add_full_logits(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
    """TRL's add_fused_lm_head, by the model's own logits."""
    plain = model.forward

    @functools.wraps(type(model).forward)
    def forward(_self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return plain(*args, **kwargs)
        return trl.trainer.utils.FusedCausalLMOutput(
            **fields_of_logits(plain(*args, **kwargs).logits, labels, temperature)
        )

    model.forward = MethodType(forward, model)


def on_full_logits(trainer_class):
    """The trainer with everything from the model's own logits, an adapter on the lm_head included."""
    module = sys.modules[trainer_class.__module__]

    class OnFullLogits(trainer_class):
        def __init__(self, *args, **kwargs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "add_fused_lm_head", _add_full_logits)
                patch.setattr(module, "BaseTunerLayer", ())  # nothing is an instance of it
                super().__init__(*args, **kwargs)

    return OnFullLogits


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
