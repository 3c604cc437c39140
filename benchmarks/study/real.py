"""The part on a file of rated completions: no generator of that quality is trained here, so nothing is sampled; the
methods are compared by how they rank and weigh completions of prompts that they have not seen."""

import copy
import math
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.demo import experiment
from benchmarks.demo.experiment import Run
from benchmarks.study.measure import Texts
from benchmarks.study.plan import REAL, RealPlan
from benchmarks.study.world_runs import Context, batch_size
from var_kernels.integrations.data import load_examples
from var_kernels.integrations.from_scratch import make_model, train_tokenizer

_HELD_OUT = "held_out_logp.pt"
_CHARACTERS = 12  # a token has about four: what is dropped would have been cut after it was tokenised
_CLEAR = 0.1  # least difference of two rewards that a pair is judged by


def read_file(path: Path, max_length: int) -> list[dict]:
    """{"prompt", "completions", "rewards"} of every prompt with two completions or more, without the far end of texts
    that are many times ``max_length`` tokens.

    Raises:
        DataError: malformed rows. ValueError: no such rows at all.
    """
    rows = [
        {
            "prompt": example.prompt,
            "completions": [text[: _CHARACTERS * max_length] for text in example.completions],
            "rewards": list(example.rewards),
        }
        for example in load_examples(path, need_rewards="required")[0]
        if len(example.completions) > 1 and isinstance(example.prompt, str)
    ]
    if not rows:
        raise ValueError(f"--rewards: {path} holds no prompt with several completions and their rewards")
    return rows


def split(rows: list[dict], held_out: int) -> tuple[list[dict], list[dict]]:
    """(trained on, held out), the same for every seed."""
    rows = rows.copy()
    random.Random(0).shuffle(rows)
    cut = min(held_out, len(rows) // 3)
    return rows[cut:], rows[:cut]


def real_reference(context: Context) -> dict:
    """One reference for all seeds: a model from scratch on every completion of the training prompts."""
    plan: RealPlan = context.plan.real
    folder = context.folder / "reference" / "real"
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = split(read_file(context.rewards_file, plan.max_length), plan.held_out)
    tokenizer = train_tokenizer(
        (text for row in train for text in (row["prompt"], *row["completions"])), plan.model.vocab
    )
    model = make_model(plan.model, len(tokenizer), plan.max_length, 0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run = Run(context.plan, 0, Path(scratch), context.device)
        settings = {"sft_on": "all", "max_length": plan.max_length}
        config = run.config("sft", plan.pretrain_steps, plan.pretrain_batch, plan.pretrain_rate, **settings)
        experiment.train(model, tokenizer, train, config, _nothing)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = Texts(held_out, tokenizer, plan.max_length)
    torch.save(texts.logps(model), folder / _HELD_OUT)
    return {
        "seconds": time.monotonic() - began,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_prompts": len(train),
        "held_out_prompts": len(held_out),
        "cut": texts.encoded.cut_completions / len(texts),
        "final": _figures(model, texts, torch.load(folder / _HELD_OUT), plan),
    }


def real_align(context: Context, seed: int, name: str, rate: float) -> dict:
    plan, entry = context.plan.real, REAL[name]
    base, tokenizer = context.load(context.folder / "reference" / "real")
    train, held_out = split(read_file(context.rewards_file, plan.max_length), plan.held_out)
    if context.plan.tuning_seed == seed:  # rates are chosen on prompts of their own
        train, held_out = split(train, plan.held_out)
    rows = [{**row, **{key: row[key][: plan.completions] for key in ("completions", "rewards")}} for row in train]
    texts = Texts(held_out, tokenizer, plan.max_length)
    tuning = context.plan.tuning_seed == seed
    ref_logp = texts.logps(base) if tuning else torch.load(context.folder / "reference" / "real" / _HELD_OUT)
    policy = copy.deepcopy(base)
    scratch = Path(tempfile.mkdtemp(prefix="run", dir=context.folder))
    try:
        run = Run(context.plan, seed, scratch, context.device)
        settings = entry.resolved(plan.lam) | {
            "max_length": plan.max_length,
            "cache_dir": str(context.folder / "cache"),
        }
        config = run.config(
            entry.method, plan.steps, batch_size(entry, plan.prompts, plan.completions), rate, **settings
        )
        began = time.monotonic()
        experiment.train(policy, tokenizer, rows, config, _nothing)
        seconds = time.monotonic() - began
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"final": _figures(policy, texts, ref_logp, plan), "seconds": seconds}


def _figures(model, texts: Texts, ref_logp: Tensor, plan: RealPlan) -> dict:
    """nll: nats a token over all held-out completions. weighted_nll: the same under weights softmax(r/lam) within each
    prompt. lift: how much better the weighted ones are than the average, less what that is for the reference.
    pair_accuracy: of clear pairs, by the growth of the mean log-prob a token over the reference's; likelihood_accuracy:
    by that mean itself."""
    logp, length = texts.logps(model).double(), texts.lengths.double()
    per_token, growth = logp / length, (logp - ref_logp.double()) / length
    weighted, mean, lift = [], [], []
    right, likely, clear = 0.0, 0.0, 0
    for members in texts.encoded.groups:
        rewards = texts.encoded.reward[members].double()
        w = torch.softmax(rewards / plan.lam, 0)
        weighted.append((w * per_token[members]).sum().item())
        mean.append(per_token[members].mean().item())
        lift.append(((w - 1 / len(members)) * growth[members]).sum().item())
        above = (rewards[:, None] - rewards[None, :]) > _CLEAR
        clear += int(above.sum())
        right += _wins(growth[members], above)
        likely += _wins(per_token[members], above)
    prompts = len(texts.encoded.groups)
    return {
        "nll": -sum(mean) / prompts,
        "weighted_nll": -sum(weighted) / prompts,
        "lift": sum(lift) / prompts,
        "pair_accuracy": right / clear if clear else math.nan,
        "likelihood_accuracy": likely / clear if clear else math.nan,
        "clear_pairs": clear,
    }


def _wins(value: Tensor, above: Tensor) -> float:
    """How many of the pairs of ``above`` (better, worse) have the larger value at the better one; ties by half."""
    gap = value[:, None] - value[None, :]
    return (((gap.sign() + 1) / 2) * above).sum().item()


def _nothing() -> None:
    pass
