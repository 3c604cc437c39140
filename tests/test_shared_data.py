"""What ranks read and score is the same on all of them: each reward is made once, other rows and failures of one rank
are refused on every rank."""

import os
import re

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.ranks import run_ranks
from tests.tiny_training import ROWS, tiny_config, tiny_model, tiny_trainer, tokenizer
from var_kernels.integrations.trainer import VARTrainer, rewards

UNSCORED = [{"prompt": row["prompt"], "completions": row["completions"]} for row in ROWS]
OTHER = [*ROWS[1:], ROWS[0]]
SETTINGS = {"online": {"online": True, "iterations": 1, "max_new_tokens": 4, "max_steps": -1, "reference": "none"}}
REFUSED = {
    "rows": "train_dataset must hold the same rows in the same order on every rank, .* other ones on rank 1",
    "rewards": "train_dataset must hold the same rows in the same order",
    "one malformed": "train_dataset row 3: .*prompt",
    "reward raises": r"train_dataset row 3: the reward function raised KeyError.*: 'not here'",
    "evaluation": "eval_dataset must hold the same rows",
    "online": "train_dataset must hold the same rows",
}


def run_rank(rank, world, folder):
    rewards._CHUNK = 6  # two prompts a call
    called = []

    def noisy(prompts, completions):
        called.extend(completions)
        return [float(int.from_bytes(os.urandom(2), "big")) for _ in completions]

    def raises_here(prompts, completions):
        return [float(len(text)) if rank == 0 else {}["not here"] for text in completions]

    made = tiny_trainer(folder, UNSCORED, trainer_options={"reward_func": [noisy, noisy]})
    found = {"reward": made.train_dataset.rows.reward, "called": called}

    def refused(name, rows, **options):
        config = tiny_config(folder, **SETTINGS.get(name, {}))
        with pytest.raises((ValueError, RuntimeError)) as caught:
            VARTrainer(tiny_model(), config, rows, processing_class=tokenizer(), **options)
        found[name] = str(caught.value)

    refused("rows", OTHER if rank else ROWS)
    refused("rewards", [{**ROWS[0], "rewards": [0.0, 0.0, 1.0 + rank]}, *ROWS[1:]])
    refused("one malformed", [*ROWS[:2], {"prompt": None, "completions": ["x"]}] if rank else ROWS)
    refused("reward raises", UNSCORED, reward_func=raises_here)
    refused("evaluation", ROWS, eval_dataset=OTHER if rank else ROWS)
    refused("online", OTHER if rank else ROWS, reward_func=noisy)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    run_ranks(run_rank, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_reward_is_made_once_for_all_ranks(ranks):
    assert ranks[0]["reward"].equal(ranks[1]["reward"])
    assert ranks[0]["reward"].unique().numel() > 12
    texts = [text for row in ROWS for text in row["completions"]]
    assert sorted(ranks[0]["called"] + ranks[1]["called"]) == sorted(2 * texts)
    assert len(ranks[0]["called"]) == len(ranks[1]["called"])


@pytest.mark.parametrize("case", REFUSED)
def test_every_rank_refuses(ranks, case):
    for found in ranks:
        assert re.search(REFUSED[case], found[case]), found[case]
