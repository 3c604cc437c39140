"""VAR, SFT, best-of-n and DPO on SmolLM2 with a file of rated completions, judged on prompts that none saw.

The weights are bf16 and frozen, the adapter of rank 16 that learns is fp32 and stays beside them.
"""

import copy
import random
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.demo.experiment import METHODS, Plan, Run, Subject, align
from benchmarks.demo.replies import Sampling, draw, kl_to_reference, mean_and_error
from benchmarks.real.models import load, read_rows
from benchmarks.study.measure import Texts
from benchmarks.study.plan import RealPlan
from benchmarks.study.real import _figures as held_out_figures
from var_kernels.losses import var_weights

COLUMNS = (
    *("method", "seed", "sizes", "nll", "weighted_nll", "lift", "pair_accuracy", "likelihood_accuracy"),
    *("clear_pairs", "kl", "kl_error", "ess_share", "seconds"),
)
KEYS = 3  # columns that tell a run from the others
SHARP = "VAR, lambda 0.05"  # the same judge; a run of its own beside VAR at the sizes' lam
_NAMES = {name: (name, None) for name in METHODS} | {SHARP: ("VAR", 0.05)}  # (method, its lam; None: the sizes')


@dataclass(frozen=True)
class Sizes:
    """What a run takes; lam in the file's reward units."""

    steps: int = 24  # of one prompt
    completions: int = 8  # of a prompt
    max_length: int = 128
    held_out: int = 32
    sampled: int = 16  # held-out prompts that KL is estimated on, two draws each
    rate: float = 1e-3
    lam: float = 0.2

    def __str__(self) -> str:
        return (
            f"{self.steps} steps; {self.completions} completions; {self.max_length} tokens; {self.held_out} held out; "
            f"rate {self.rate:g}; lam {self.lam:g}"
        )


REDUCED = Sizes(steps=4, completions=4, max_length=96, held_out=6, sampled=4)


def runs(file: Path, seeds: list[int], sizes: Sizes, done: Collection[tuple[str, str, str]] = ()) -> Iterator[dict]:
    """A row of the reference and of every method and seed, each as soon as it is there; those of ``done`` (method,
    seed, sizes) are left out."""
    model, tokenizer = load("smollm2", torch.bfloat16)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [
                [{"role": "assistant", "content": text}] for text in row["completions"][: sizes.completions]
            ],
            "rewards": row["rewards"][: sizes.completions],
        }
        for row in read_rows(file)
        if len(row["completions"]) >= sizes.completions and len(row["prompt"]) < 4 * sizes.max_length // 3
    ]
    random.Random(0).shuffle(rows)
    held_out, train = rows[: sizes.held_out], rows[sizes.held_out :]
    texts = Texts(held_out, tokenizer, sizes.max_length)
    reference_logp = texts.logps(model, chunk=16)
    sampling = Sampling(batch=32, max_new_tokens=32)
    plan = Plan(
        sampling=sampling, completions=sizes.completions, align_steps=sizes.steps, align_prompts=1,
        align_rate=sizes.rate, lam=sizes.lam, eval_samples=2, memory_rows=(), lora=16,
    )  # fmt: skip
    prompts = [row["prompt"] for row in held_out[: sizes.sampled]]
    subject = Subject("smollm2", model, tokenizer, prompts, prompts, _no_reward, ("", ""))
    judged = RealPlan(lam=sizes.lam)
    if ("reference", "0", str(sizes)) not in done:
        figures = held_out_figures(model, texts, reference_logp, judged)
        yield {"method": "reference", "seed": 0, "sizes": sizes, **figures}
    for seed, name in ((seed, name) for seed in seeds for name in _NAMES):
        if (name, str(seed), str(sizes)) in done:
            continue
        method, own = _NAMES[name]
        lam = own or sizes.lam
        torch.manual_seed(seed)
        seen = random.Random(seed).sample(train, sizes.steps)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            run = Run(replace(plan, lam=lam), seed, Path(folder), torch.device("cpu"), sizes.max_length)
            policy, _ = align(method, subject, copy.deepcopy(seen), run, lambda: None, merge=False)
        seconds = time.process_time() - began
        drawn = draw(policy, tokenizer, prompts, plan.eval_samples, sampling, _no_reward, seed)
        kl, error = mean_and_error(kl_to_reference(policy, model, tokenizer, drawn, sampling))
        yield {
            **{"method": name, "seed": seed, "sizes": sizes, "kl": kl, "kl_error": error, "seconds": seconds},
            **held_out_figures(policy, texts, reference_logp, judged),
            **({"ess_share": _ess_share(seen, lam)} if method == "VAR" else {}),
        }


def _no_reward(prompts: list, completions: list) -> list[float]:
    return [0.0] * len(completions)


def _ess_share(rows: list[dict], lam: float) -> float:
    """Effective share of a prompt's completions under VAR's weights, the mean over prompts."""
    shares = []
    for row in rows:
        rewards = torch.tensor(row["rewards"])
        weight = var_weights(rewards, lam=lam, group_ids=torch.zeros(len(rewards), dtype=torch.long)).weight
        shares.append((weight.sum().square() / weight.square().sum() / len(rewards)).item())
    return sum(shares) / len(shares)
