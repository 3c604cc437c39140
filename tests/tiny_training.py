"""What the training tests share: a few rows of arithmetic, a tokenizer trained on them, a model of 20,000
parameters."""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate.utils import imports
from transformers import LlamaConfig, LlamaForCausalLM

from var_kernels.integrations.data import encode_examples, parse_row
from var_kernels.integrations.from_scratch import train_tokenizer
from var_kernels.integrations.trainer import AlignConfig, VARTrainer, method_config
from var_kernels.integrations.trainer.methods import find_method

# The Trainer asks several times a step whether PEFT and DeepSpeed are there, and reads their metadata each time.
imports._is_package_available = functools.cache(imports._is_package_available)

torch.set_num_threads(1)  # two threads a process that fight for the same cores are many times slower than one

# Eight prompts of three completions, of different lengths and rewards.
ROWS = [
    {
        "prompt": f"{a} + {b} = ",
        "completions": [str(a + b), f"about {a + b + 1}", "x" * (a + 1)],
        "rewards": [1.0, 0.25 * b, 0.1 * a],
        "generators": ["right", "near", "noise"],
    }
    for a in range(4)
    for b in (1, 2)
]


@functools.cache
def tokenizer():
    return train_tokenizer([row["prompt"] + " ".join(row["completions"]) for row in ROWS], 270)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **options):
    """fp64 unless told otherwise: an identity between two ways of training then holds to 1e-12, not 1e-6."""
    torch.manual_seed(seed)
    settings = {"num_hidden_layers": 2, **options}
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=24,
        intermediate_size=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_config(folder, **options) -> AlignConfig:
    """Plain SGD without clipping or decay: a step is -learning_rate times the gradient."""
    settings = {
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "max_length": 32,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    method = options.pop("method", "var")
    if method == "var":
        settings |= {"lam": 0.5, "normalizer": "batch"}
        settings["reference"] = "none" if options.get("normalizer") == "self_normalised" else "mean"
    else:
        options.pop("normalizer", None)
    return method_config(method)(**{**settings, **options})


def tiny_trainer(folder, rows=ROWS, *, model=None, trainer_options=None, **options) -> VARTrainer:
    model, args = tiny_model() if model is None else model, tiny_config(folder, **options)
    teacher = {"ref_model": tiny_model(1)} if find_method(args.method).teacher == "given" else {}
    return VARTrainer(model, args, rows, processing_class=tokenizer(), **teacher | (trainer_options or {}))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the oracle: every row by itself, full logits, fp64 --------------------------------------------------------------


def oracle_rows(model, rows):
    """[(reward, log-prob of the completion, its tokens, prompt number, row number within the prompt)]"""
    encoded = encode_examples([parse_row(row, "") for row in rows], tokenizer(), 32)
    result = []
    for prompt, members in enumerate(encoded.groups):
        for number, index in enumerate(members):
            row = encoded.row(index)
            logp = model(row["input_ids"][None]).logits[0].log_softmax(-1)
            kept = row["labels"] != -100
            positions = kept.nonzero().flatten() - 1
            s = logp[positions, row["labels"][kept]].sum()
            reward = float(row["reward"]) if "reward" in row else None
            result.append((reward, s, int(kept.sum()), prompt, number))
    return result


def oracle_var(model, rows, lam, normalizer, reference_term):
    table = oracle_rows(model, rows)
    score, s, prompts = [], torch.stack([row[1] for row in table]), torch.tensor([row[3] for row in table])
    for reward, logp, length, _, _ in table:
        term = {"sum": logp.item(), "mean": logp.item() / length, "none": 0.0}[reference_term]
        score.append(term + reward / lam)
    score = torch.tensor(score, dtype=torch.float64)
    if normalizer in ("batch", "batch_mean"):
        weight = score.softmax(0)
    else:
        weight = torch.cat([score[prompts == p].softmax(0) for p in range(len(rows))])
    return -(weight * s).sum() / weight.sum()
