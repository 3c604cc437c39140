"""Rewards that can move nothing: refused before the first step, counted where they are part of the data."""

import logging
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_online import online_trainer
from tests.tiny_training import ROWS, oracle_rows, oracle_var, tiny_config, tiny_model, tiny_trainer
from var_kernels.losses import IgnoredRewardsWarning, group_advantage, standardised_advantage

SINGLE = [{"prompt": r["prompt"], "completion": r["completions"][0], "reward": float(i)} for i, r in enumerate(ROWS)]
TIED = [{**row, "rewards": [float(i)] * 3} for i, row in enumerate(ROWS)]
EQUAL = [{**row, "rewards": [0.5] * 3} for row in ROWS]
ZERO = [{**row, "rewards": [0.0] * 3} for row in ROWS]
SINGLE_EQUAL = [{**row, "reward": 1.0} for row in SINGLE]
FAR = [{**row, "rewards": [20.0, 40.0, 90.0]} for row in ROWS]
PAIRS = [
    {"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1], "rewards": [1.0, 1.0]}
    for r in ROWS
]
GROUP = {"normalizer": "group", "reference": "none"}
SELF = {"normalizer": "self_normalised"}
BATCH = {"normalizer": "batch", "reference": "none"}
ALONE, TIES = "8 of 8 prompts have a single completion", "8 of 8 prompts have completions of equal rewards"

REFUSED = {  # id: (rows, options, what the message says)
    "var group, one completion a prompt": (SINGLE, GROUP, f"{ALONE}, and method 'var' with normalizer='group'"),
    "var group with the reference": (SINGLE, {**GROUP, "reference": "mean"}, f"{ALONE}.*or take normalizer='batch'"),
    "var group, ties": (TIED, GROUP, f"{TIES}.*with normalizer='group'"),
    "var self_normalised, ties": (TIED, SELF, f"{TIES}.*with normalizer='self_normalised'.*normalizer='batch'"),
    "var group, some alone and the others tied": (
        SINGLE[:3] + TIED[3:], GROUP, "3 of 8 prompts have a single completion and 5 of 8 prompts have completions of",
    ),
    "var self_normalised, one completion a prompt, all equal": (SINGLE_EQUAL, SELF, "all 8 are 1"),
    "var batch, all equal": (EQUAL, BATCH, "all 24 are 0.5.*normalizer='batch' compares them"),
    "var batch_mean, pairs of equal rewards": (PAIRS, {**BATCH, "normalizer": "batch_mean"}, "all 16 are 1"),
    "var group, pairs of equal rewards": (PAIRS, GROUP, TIES),
    "var batch, one row": (SINGLE[:1], BATCH, "there is one completion"),
    "var self_normalised, one row": (SINGLE[:1], SELF, "there is one completion"),
    "var batch, one row a step": (
        SINGLE, {**BATCH, "per_device_train_batch_size": 1}, "every step has one completion.*raise per_device_train_",
    ),
    "var self_normalised, one completion a prompt and a step": (
        SINGLE, {**SELF, "per_device_train_batch_size": 1}, "every step has one completion",
    ),
    "awr, all equal": (EQUAL, {"method": "awr"}, "all 24 are 0.5.*method 'awr'"),
    "awr, one row a step": (SINGLE, {"method": "awr", "per_device_train_batch_size": 1}, "every step has one"),
    "grpo, ties": (TIED, {"method": "grpo"}, f"{TIES}.*method 'var' with normalizer='batch'"),
    "ppo, ties": (TIED, {"method": "ppo"}, TIES),
    "reinforce, ties": (TIED, {"method": "reinforce"}, TIES),
    "gspo, ties": (TIED, {"method": "gspo", "advantages": "group_mean"}, TIES),
    "reinforce over the batch, all equal": (EQUAL, {"method": "reinforce", "advantages": "batch"}, "all 24 are 0.5"),
    "reinforce over the batch, one row a step": (
        SINGLE, {"method": "reinforce", "advantages": "batch", "per_device_train_batch_size": 1}, "every step has one",
    ),
    "given weights of 0": (ZERO, {"method": "reinforce", "advantages": "given"}, "all 24 are 0, by which"),
    "gvpo, ties": (TIED, {"method": "gvpo"}, TIES),
    "astar_po, one completion a prompt": (SINGLE, {"method": "astar_po"}, ALONE),
    "raft, ties": (TIED, {"method": "raft"}, TIES),
    "exo, ties": (TIED, {"method": "exo"}, TIES),
    "lire, ties": (TIED, {"method": "lire"}, TIES),
    "grpo, some alone and the others tied": (SINGLE[:3] + TIED[3:], {"method": "grpo"}, "5 of 8 prompts have"),
    "qrpo, one completion a prompt": (SINGLE, {"method": "qrpo"}, ALONE),
    "dro, all equal": (EQUAL, {"method": "dro"}, "all 24 are 0.5"),
    "alol, all equal": (EQUAL, {"method": "alol"}, "all 24 are 0.5"),
    "alol_ref_free, all equal": (EQUAL, {"method": "alol_ref_free"}, "all 24 are 0.5"),
    "weighted_bc, all 0": (ZERO, {"method": "weighted_bc", "squash": False}, "all 24 are 0, by which"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_rewards_that_can_have_no_effect_are_refused_before_anything_is_written(case, tmp_path):
    rows, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"train_dataset: rewards would have no effect: .*{message}"):
        tiny_trainer(tmp_path, rows, **options)
    assert not list(tmp_path.rglob("*"))


def test_a_constant_reward_function_is_refused(tmp_path):
    constant = {"reward_func": lambda prompts, completions: [3.0] * len(prompts)}
    with pytest.raises(ValueError, match="all 24 are 3"):
        tiny_trainer(tmp_path, ROWS, trainer_options=constant)


WARNED = {  # id: (rows, options, what the log says)
    "var, some prompts with one completion": (
        ROWS[:5] + SINGLE[5:], GROUP, "3 of 8 prompts have a single completion, on which rewards have no effect",
    ),
    "var, some ties": (ROWS[:6] + TIED[6:], SELF, "2 of 8 prompts have completions of equal rewards, on which"),
    "grpo, some ties": (ROWS[:6] + TIED[6:], {"method": "grpo"}, "2 of 8 prompts have completions of equal rewards"),
    "qrpo, some with one completion": (ROWS[:7] + SINGLE[7:], {"method": "qrpo"}, "1 of 8 prompts have a single"),
    "a huge lam": (ROWS, {**SELF, "lam": 1e6}, "lam=1e+06 leaves rewards without effect: within a prompt"),
    "a huge lam, batch": (ROWS, {**BATCH, "lam": 1e4}, "lam=10000 leaves rewards without effect: within a step"),
    "a huge temperature, exo": (ROWS, {"method": "exo", "reward_temperature": 1e6}, "reward_temperature=1e+06 leaves"),
    "a huge temperature, awr": (ROWS, {"method": "awr", "beta": 1e5}, "beta=100000 leaves rewards without effect"),
    "weighted_bc, a sigmoid that saturates": (FAR, {"method": "weighted_bc"}, "reads their sigmoid, which differs by"),
    "alol, a sigmoid that saturates": (FAR, {"method": "alol"}, "pass squash=False for rewards in [0, 1]"),
    "rgold, a sigmoid that saturates": (FAR, {"method": "rgold"}, "reads their sigmoid, which differs by"),
    "best-of-n of one": (SINGLE, {"method": "sft"}, "no effect: 8 of 8 prompts have a single completion"),
    "kto, all desirable": ([{**r, "rewards": [1, 2, 3]} for r in ROWS], {"method": "kto"}, "completion is desirable"),
    "given weights, all equal": (EQUAL, {"method": "topr"}, "rewards tell no completion from another: all 24 are"),
    "weighted_bc, all equal": (EQUAL, {"method": "weighted_bc"}, "rewards tell no completion from another: all 24 are"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_rewards_without_effect_in_part_are_counted(case, tmp_path, caplog):
    rows, options, message = WARNED[case]
    tiny_trainer(tmp_path, rows, **options)
    assert message in caplog.text


SILENT = {  # id: (rows, options)
    "var": (ROWS, SELF),
    "var batch, one completion a prompt": (SINGLE, BATCH),
    "weighted_bc, rewards in reach of the sigmoid": (ROWS, {"method": "weighted_bc"}),
    "awr": (ROWS, {"method": "awr"}),
    "given weights, one completion a prompt": (SINGLE, {"method": "reinforce", "advantages": "given"}),
    "reinforce over the batch, one completion a prompt": (SINGLE, {"method": "reinforce", "advantages": "batch"}),
    "sft on all": (SINGLE, {"method": "sft", "sft_on": "all"}),
    "dpo": (ROWS, {"method": "dpo"}),
    "sft on pairs": ([{k: v for k, v in row.items() if k != "rewards"} for row in PAIRS], {"method": "sft"}),
    "weighted_bc, one completion a prompt": (SINGLE, {"method": "weighted_bc"}),
}


@pytest.mark.parametrize("case", SILENT)
def test_rewards_with_an_effect_are_not_spoken_of(case, tmp_path, caplog):
    rows, options = SILENT[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", IgnoredRewardsWarning)
        tiny_trainer(tmp_path, rows, **options).train()
    assert "effect" not in caplog.text
    assert "tell no completion" not in caplog.text


def test_single_completions_are_compared_over_the_step(tmp_path, caplog):
    """self_normalised without two completions anywhere: the batch's Z, by the oracle of full logits in fp64."""
    settings = {**SELF, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lam": 2.0}
    trainer = tiny_trainer(tmp_path, SINGLE, **settings)
    assert "none of 8 prompts has two completions" in caplog.text
    expected = oracle_var(tiny_model(), SINGLE, 2.0, "batch_mean", "none").item()
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected, rel=1e-6)
    assert logged["weighted_reward"] > logged["reward_mean"] + 1
    sft = -sum(row[1].item() for row in oracle_rows(tiny_model(), SINGLE)) / 8
    assert abs(expected - sft) > 0.05


def test_one_row_a_rank_is_enough_where_the_step_has_more(tmp_path):
    config = tiny_config(tmp_path, **BATCH, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer = tiny_trainer(tmp_path, SINGLE, **BATCH, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.train()
    assert config.per_device_train_batch_size == 1
    assert trainer.state.log_history[0]["ess_share"] < 0.99


def test_an_evaluation_set_without_effect_is_a_warning(tmp_path, caplog):
    tiny_trainer(tmp_path, ROWS, trainer_options={"eval_dataset": TIED}, **SELF)
    assert f"eval_dataset: rewards have no effect: {TIES}" in caplog.text


# ---- online ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "var", "awr"])
def test_an_iteration_of_equal_rewards_is_named(method, tmp_path, caplog):
    constant = lambda prompts, completions: [1.0] * len(prompts)  # noqa: E731
    trainer = online_trainer(tmp_path, method=method, reward_func=constant, iterations=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "iteration 0: rewards have no effect" in caplog.text


@pytest.mark.parametrize("options", [{"method": "var", **GROUP}, {"method": "qrpo"}])
def test_one_draw_a_prompt_is_refused_where_they_are_compared(options, tmp_path):
    with pytest.raises(ValueError, match=r"generations_per_prompt must be at least 2 .* compares completions"):
        online_trainer(tmp_path, generations_per_prompt=1, **options)


# ---- advantages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize(("rewards", "ids"), [([1.0, 2.0, 3.0], [0, 1, 2]), ([0.1, 0.1, 0.1, 5, 5], [0, 0, 0, 1, 1])])
def test_advantages_that_are_all_0_are_warned_about(rewards, ids, divide):
    with pytest.warns(IgnoredRewardsWarning, match="its advantage is 0"):
        group_advantage(torch.tensor(rewards), torch.tensor(ids), divide_by_std=divide)


@pytest.mark.parametrize("rewards", [[2.0], [0.1, 0.1, 0.1]])
def test_standardised_advantages_that_are_all_0_are_warned_about(rewards):
    with pytest.warns(IgnoredRewardsWarning, match="its advantage is 0"):
        standardised_advantage(torch.tensor(rewards))


def test_small_rewards_are_no_ties():
    with warnings.catch_warnings():
        warnings.simplefilter("error", IgnoredRewardsWarning)
        group_advantage(torch.tensor([1e-6, 2e-6]), torch.zeros(2, dtype=torch.int64), divide_by_std=False)
        standardised_advantage(torch.tensor([1e-6, 2e-6]))
