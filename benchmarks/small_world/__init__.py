"""A world small enough to know its best policy: questions, a checker, a reference trained on them, and its optimum.

The tests and the study run on it, and the demo where no pretrained model can be had.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.demo.experiment import METHODS, Advance, Plan, Run, Subject, train
from benchmarks.demo.replies import Drawn, Sampling, mean_and_error, rewards_of
from benchmarks.small_world import world
from var_kernels.integrations.from_scratch import ScratchSpec, make_model, train_tokenizer

MAX_LENGTH = 96  # tokens; the longest row of the corpus has about 45
MAX_NEW_TOKENS = 48
SAMPLING = Sampling(batch=512, max_new_tokens=MAX_NEW_TOKENS)


@dataclass(frozen=True, kw_only=True)
class WorldPlan(Plan):
    """A plan with the sizes of the reference, which is trained here."""

    model: ScratchSpec = field(default_factory=lambda: ScratchSpec(hidden=128, layers=2, heads=4, vocab=1024))
    pretrain_steps: int
    pretrain_batch: int = 32
    pretrain_rate: float


FULL = WorldPlan(
    pretrain_steps=1200,
    pretrain_rate=4e-3,
    sampling=SAMPLING,
    completions=16,
    align_steps=80,
    align_prompts=8,
    align_rate=1e-3,
    lam=0.5,
    eval_samples=16,
    memory_rows=(1024, 4096),
    methods=tuple(METHODS),
)
QUICK = replace(
    FULL,
    model=ScratchSpec(hidden=96, layers=2, heads=3, vocab=1024),
    pretrain_steps=300,
    pretrain_rate=6e-3,
    completions=8,
    align_steps=40,
    eval_samples=4,
    memory_rows=(512,),
)


def make_reference(run: Run, advance: Advance):
    """(model, tokenizer, corpus rows): a Llama-shaped model trained on one pass over the mixed-quality corpus."""
    plan = run.plan
    rows = list(itertools.islice(world.corpus(run.seed), plan.pretrain_steps * plan.pretrain_batch))
    tokenizer = train_tokenizer((row["prompt"] + row["completion"] for row in rows[:10_000]), plan.model.vocab)
    model = make_model(plan.model, len(tokenizer), MAX_LENGTH, run.seed)
    config = run.config("sft", plan.pretrain_steps, plan.pretrain_batch, plan.pretrain_rate, sft_on="all")
    train(model, tokenizer, rows, config, advance)
    return model, tokenizer, rows


def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The checker's points, as a reward function of texts."""
    return [score.reward for score in scores(prompts, completions)]


def scores(prompts: Sequence[str], completions: Sequence[str]) -> Iterator[world.Score]:
    tasks = {task.prompt: task for fact in world.all_facts() for task in fact}
    for prompt, reply in zip(prompts, completions, strict=True):
        yield world.score(tasks[prompt], reply)


def found(drawn: Drawn) -> dict[str, float]:
    """The checker's findings, each as a share of the replies."""
    all_scores = list(scores([prompt for prompt in drawn.prompts for _ in range(drawn.k)], drawn.texts))
    shares = {
        name: sum(getattr(score, name) for score in all_scores) / len(all_scores)
        for name in ("right", "friendly", "rude", "too_long")
    }
    return shares | {"perfect": sum(score.reward == 2 for score in all_scores) / len(all_scores)}


def subject(run: Run, advance: Advance) -> Subject:
    """The world as what the demo aligns; trains its reference."""
    model, tokenizer, _ = make_reference(run, advance)
    prompts, held_out = ([task.prompt for task in tasks] for tasks in world.split_tasks(run.seed))
    says = (
        "A small Llama-shaped model, trained here on question-and-answer lines by careful, curt, chatty and grumpy "
        "authors.",
        f"A program's points: +1 right, +1 friendly, \N{MINUS SIGN}1 rude, \N{MINUS SIGN}1 longer than "
        f"{world.MAX_WORDS} words.",
    )
    return Subject("a small world", model, tokenizer, prompts, held_out, reward, says)


def frontier(drawn: Drawn, lams: list[float]) -> list[dict]:
    """Estimated best: reward and KL of pi* = pi_ref exp(r/lam)/Z for each lam, from samples of the reference.

    Per prompt over k samples, w = softmax(r/lam): E*[r] = sum w r and KL(pi* || pi_ref) = sum w log(k w), then the mean
    over prompts; of the objective E*[r] - lam KL, which no policy exceeds, also the standard error.
    """
    rewards_PK = rewards_of(drawn).double()
    points = []
    for lam in lams:
        w_PK = torch.softmax(rewards_PK / lam, dim=1)
        reward_P1 = (w_PK * rewards_PK).sum(1, keepdim=True)
        kl_P1 = (w_PK * (w_PK.log() + math.log(w_PK.shape[1]))).sum(1, keepdim=True)
        objective, error = mean_and_error(reward_P1 - lam * kl_P1)
        point = {"lam": lam, "reward": reward_P1.mean().item(), "kl": kl_P1.mean().item()}
        points.append({**point, "objective": objective, "objective_error": error})
    return points
