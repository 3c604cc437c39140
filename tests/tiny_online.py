"""What the tests of online training share: prompts, a reward, a trainer of a few short iterations."""

import json

from tests.tiny_training import ROWS, tiny_model, tiny_trainer

PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
LETTERS = "etaoin"


def reward(prompts, completions) -> list[float]:
    """Short answers, and those with common letters. Two texts rarely have the same."""
    return [sum(0.3 * c.count(x) for x in LETTERS) - 0.01 * len(c) - 0.001 * sum(c.encode()) % 0.1 for c in completions]


def online_trainer(folder, prompts=PROMPTS, *, method="dpo", reward_func=reward, trainer_options=None, **options):
    settings = {
        "online": True,
        "iterations": 3,
        "max_steps": -1,
        "prompts_per_iteration": 4,
        "max_new_tokens": 5,
        "sampling_batch_size": 8,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
    }
    if method == "var":
        settings["normalizer"] = "self_normalised"
    if "generations_per_prompt" not in options and method not in ("sail_pp", "sail_pr"):
        settings["generations_per_prompt"] = 3
    return tiny_trainer(
        folder,
        prompts,
        model=options.pop("model", None) or tiny_model(),
        method=method,
        trainer_options={"reward_func": reward_func, **(trainer_options or {})},
        **{**settings, **options},
    )


def trained(folder, **options):
    trainer = online_trainer(folder, **options)
    trainer.train()
    return trainer


def buffered(folder, iteration: int) -> list[dict]:
    path = folder / "run" / "buffer" / f"iteration-{iteration:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


class Recording:
    """A sampler that keeps what it was asked for, and may do something at each call."""

    def __init__(self, sampler, visit=lambda model: None):
        self.sampler, self.visit, self.calls = sampler, visit, []

    def __call__(self, model, prompts, **options):
        self.calls.append({"prompts": prompts, **options})
        self.visit(model)
        return self.sampler(model, prompts, **options)
