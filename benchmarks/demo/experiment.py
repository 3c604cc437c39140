"""The experiment: completions that the reference draws, and the policies that are aligned on them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.demo.replies import Drawn, Prompt, Reward, Sampling, draw, prompt_ids
from var_kernels.integrations.trainer import AlignConfig, VARTrainer, method_config, row_weights

# What can be trained on the completions that the reference drew: name -> the method and its settings; the strength of
# the pull to the reference, ``lam``, is "beta" for DPO.
METHODS = {
    "SFT": ("sft", {"sft_on": "all"}),
    "Best-of-n SFT": ("sft", {"sft_on": "best"}),
    "DPO": ("dpo", {"beta": "lam"}),
    "VAR": ("var", {"lam": "lam"}),
}

DPO_RATE = 0.3  # of the others' learning rate: at the full one it drifts off, to more KL for less reward

Advance = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """Sizes and settings of a run. ``lam`` is VAR's lambda in reward points; DPO's beta plays the same part."""

    sampling: Sampling
    completions: int  # drawn from the reference for each training prompt
    align_steps: int
    align_prompts: int  # per step
    align_rate: float
    lam: float
    eval_samples: int  # per held-out prompt
    memory_rows: tuple[int, ...]
    kept: int | None = None  # completions of a prompt, the heaviest by VAR's weights, that it trains on; None: all
    kl_samples: int | None = None  # per held-out prompt; None: eval_samples
    methods: tuple[str, ...] = ("VAR",)
    lora: int | None = None  # rank of an adapter; None: every weight learns
    max_prompts: int | None = None  # of either kind; None: all


FULL = Plan(
    sampling=Sampling(batch=64, max_new_tokens=40, temperature=0.7),
    completions=8,
    align_steps=32,
    align_prompts=2,
    align_rate=1e-3,
    lam=0.05,
    eval_samples=6,
    memory_rows=(1024, 4096),
    kept=3,
    kl_samples=2,
    lora=16,
)
QUICK = replace(
    FULL,
    kept=None,
    sampling=Sampling(batch=32, max_new_tokens=24, temperature=0.7),
    completions=4,
    align_steps=4,
    eval_samples=4,
    memory_rows=(256,),
    max_prompts=8,
)
GPU = replace(
    FULL,
    sampling=Sampling(batch=512, max_new_tokens=64, temperature=0.7),
    completions=32,
    align_steps=64,
    align_prompts=4,
    eval_samples=32,
    memory_rows=(1024, 4096, 16_384),
    methods=tuple(METHODS),
)


@dataclass(frozen=True)
class Subject:
    """The model to align, its prompts and its reward; ``model`` is the reference.

    says: of the model and of the reward, a sentence each, for the report.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    prompts: list[Prompt]
    held_out: list[Prompt]
    reward: Reward
    says: tuple[str, str]


@dataclass(frozen=True)
class Run:
    """The settings that all parts of one run share. ``folder`` takes the Trainer's own files."""

    plan: Plan
    seed: int
    folder: Path
    device: torch.device
    max_length: int = 96  # tokens of a row; the longest of the small world has about 45

    def config(self, method: str, steps: int, batch: int, rate: float, **settings) -> AlignConfig:
        common = {
            "output_dir": str(self.folder / "trainer"),
            "cache_dir": str(self.folder / "cache"),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 256,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, min(40, steps // 10)),
            "adam_beta2": 0.95,
            "logging_steps": max(1, steps // 40),
            "max_length": self.max_length,
            "seed": self.seed,
            "use_cpu": self.device.type == "cpu",
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_pin_memory": False,
        }
        return method_config(method)(**common | settings)


def draw_completions(subject: Subject, run: Run, advance: Advance) -> Drawn:
    """The reference's replies to the training prompts."""
    settings = (run.plan.completions, run.plan.sampling, subject.reward, run.seed + 1, advance)
    return draw(subject.model, subject.tokenizer, subject.prompts, *settings)


def rows_of(drawn: Drawn) -> list[dict]:
    """A row {"prompt", "completions", "rewards"} of each prompt, to train on.

    A reply that was cut is left out, its cut would be learned as an end; a prompt with fewer than two whole ones keeps
    all.
    """
    rows = []
    for i, prompt in enumerate(drawn.prompts):
        places = range(i * drawn.k, (i + 1) * drawn.k)
        whole = [place for place in places if drawn.ended[place]]
        kept = whole if len(whole) > 1 else places
        texts, rewards = ([values[place] for place in kept] for values in (drawn.texts, drawn.rewards))
        if not isinstance(prompt, str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        rows.append({"prompt": prompt, "completions": texts, "rewards": rewards})
    return rows


def heaviest(rows: list[dict], kept: int, lam: float) -> list[dict]:
    """The same rows with the ``kept`` completions that VAR weighs most, in their order."""
    found = []
    for row in rows:
        rewards = torch.tensor(row["rewards"])
        weight = row_weights.var_weights(rewards, lam=lam, group_ids=torch.zeros(len(rewards), dtype=torch.long)).weight
        places = sorted(weight.argsort(descending=True, stable=True)[:kept].tolist())
        found.append({**row, **{key: [row[key][i] for i in places] for key in ("completions", "rewards")}})
    return found


def longest_row(subject: Subject, plan: Plan) -> int:
    """Tokens of the longest prompt and the longest reply, and room for what a chat template puts behind it."""
    prompts = [*subject.prompts, *subject.held_out]
    return max(len(prompt_ids(subject.tokenizer, prompt)) for prompt in prompts) + plan.sampling.max_new_tokens + 8


def align(
    name: str, subject: Subject, rows: list[dict], run: Run, advance: Advance, merge: bool = True
) -> tuple[torch.nn.Module, list[dict]]:
    """(policy, the Trainer's log): a copy of the reference, trained by one of ``METHODS`` on the rows; merge: an
    adapter into its weights."""
    plan, policy = run.plan, copy.deepcopy(subject.model)
    batch = plan.align_prompts * (plan.completions if name == "SFT" else 1)
    rate = plan.align_rate * (DPO_RATE if name == "DPO" else 1.0)
    method, settings = METHODS[name]
    rows = heaviest(rows, plan.kept, plan.lam) if name == "VAR" and plan.kept else rows
    settings = {key: plan.lam if value == "lam" else value for key, value in settings.items()}
    settings["logp_temperature"] = plan.sampling.temperature  # of the distribution that drew them
    config, options = run.config(method, plan.align_steps, batch, rate, **settings), {}
    if plan.lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=plan.lora, lora_alpha=2 * plan.lora, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    trained, log = train(policy, subject.tokenizer, rows, config, advance, **options)
    return trained.merge_and_unload() if plan.lora and merge else trained, log


def train(
    model, tokenizer, rows, config: AlignConfig, advance: Advance, callbacks=(), trainer_class=VARTrainer, **options
) -> tuple[torch.nn.Module, list[dict]]:
    """The trained model (with its adapter in it) and the Trainer's log; ``options`` are those of ``VARTrainer``."""
    callbacks = [_Advance(advance), *callbacks]
    trainer = trainer_class(model, config, rows, processing_class=tokenizer, callbacks=callbacks, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model, [entry for entry in trainer.state.log_history if "loss" in entry]


class _Advance(TrainerCallback):
    def __init__(self, advance: Advance):
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()
