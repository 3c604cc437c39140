"""VARTrainer: the loss of a step against an oracle, whatever way its batch is cut up, and what is logged of it."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import ROWS, losses, oracle_rows, oracle_var, tiny_model, tiny_trainer
from var_kernels.integrations.trainer.record import METRICS_FILE
from var_kernels.losses.weights import CollapsedWeightsWarning

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # fp64 throughout; only the order of additions differs
LOGGED = 3e-7  # Trainer adds up the losses that it logs in fp32


def step_gradient(trainer) -> dict[str, torch.Tensor]:
    """What one optimiser step of plain SGD took off each weight, over the learning rate: the gradient of the step's
    loss."""
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    return {
        name: (before[name] - param.detach()) / trainer.args.learning_rate
        for name, param in trainer.model.named_parameters()
    }


@pytest.mark.parametrize(
    ("normalizer", "reference_term"),
    [("batch", "mean"), ("batch", "sum"), ("batch_mean", "none"), ("group", "sum"), ("self_normalised", "none")],
)
def test_var_step_is_the_oracles(normalizer, reference_term, tmp_path):
    per_prompt = normalizer in ("group", "self_normalised")
    model = tiny_model()
    expected = oracle_var(model, ROWS, 0.5, normalizer, reference_term)
    expected.backward()
    gradient = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    size = len(ROWS) if per_prompt else 3 * len(ROWS)
    options = {"normalizer": normalizer, "reference": reference_term, "per_device_train_batch_size": size}
    trainer = tiny_trainer(tmp_path, model=model, **options)
    made = step_gradient(trainer)
    # Reference log-probs and weights travel in fp32.
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-6)
    for name, grad in gradient.items():
        torch.testing.assert_close(made[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_sft_is_the_mean_over_tokens_of_the_best_completions_or_of_all(tmp_path):
    table = oracle_rows(tiny_model(), ROWS)
    best = [max((row for row in table if row[3] == prompt), key=lambda row: row[0]) for prompt in range(len(ROWS))]
    for sft_on, rows in (("best", best), ("all", table)):
        trainer = tiny_trainer(tmp_path / sft_on, method="sft", sft_on=sft_on, per_device_train_batch_size=len(rows))
        trainer.train()
        expected = -sum(row[1].item() for row in rows) / sum(row[2] for row in rows)
        assert losses(trainer)[0] == pytest.approx(expected, rel=LOGGED)


def test_dpo_on_the_best_and_worst_of_each_prompt(tmp_path):
    other = tiny_model(seed=1)
    table, ref_table = oracle_rows(tiny_model(), ROWS), oracle_rows(other, ROWS)
    margins = []
    for prompt in range(len(ROWS)):
        rows = [i for i, row in enumerate(table) if row[3] == prompt]
        best, worst = max(rows, key=lambda i: table[i][0]), min(rows, key=lambda i: table[i][0])
        margins.append((table[best][1] - ref_table[best][1]) - (table[worst][1] - ref_table[worst][1]))
    expected = -torch.nn.functional.logsigmoid(0.3 * torch.stack(margins)).mean()
    options = {"method": "dpo", "beta": 0.3, "per_device_train_batch_size": len(ROWS)}
    trainer = tiny_trainer(tmp_path, trainer_options={"ref_model": other}, **options)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert abs(expected.item() - 0.6931) > 1e-3  # the references differ, so the loss is not log 2


# ---- the global batch ------------------------------------------------------------------------------------------------

WAYS = [
    ("var", "batch", 12),
    ("var", "group", 8),
    ("sft", "batch", 8),
    ("dpo", "batch", 8),
]


@pytest.mark.parametrize(("method", "normalizer", "size"), WAYS, ids=lambda value: str(value))
def test_accumulating_four_micro_batches_is_one_batch_four_times_as_large(method, normalizer, size, tmp_path):
    results = []
    for accumulation in (1, 4):
        options = {"per_device_train_batch_size": size // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = tiny_trainer(
            tmp_path / str(accumulation), method=method, normalizer=normalizer, max_steps=2, **options
        )
        results.append((step_gradient(trainer), trainer))
    (whole, one), (parts, four) = results
    assert losses(one) == pytest.approx(losses(four), rel=LOGGED)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, **EXACT, msg=name)
    for key in ("ess", "log_z", "weight_entropy", "reward_mean", "weighted_reward", "kl_to_ref", "token_accuracy"):
        if key in one.state.log_history[1]:
            assert one.state.log_history[1][key] == pytest.approx(four.state.log_history[1][key], rel=1e-5, abs=1e-6)


def test_the_last_accumulation_of_an_epoch_may_be_short(tmp_path):
    """24 completions in micro-batches of 5: 5 5 5 5 4; two steps of four and of one."""
    trainer = tiny_trainer(
        tmp_path, max_steps=2, per_device_train_batch_size=5, gradient_accumulation_steps=4, learning_rate=0.0
    )
    trainer.train()
    whole = tiny_trainer(tmp_path / "whole", max_steps=2, per_device_train_batch_size=20, learning_rate=0.0)
    whole.train()
    assert losses(trainer) == pytest.approx(losses(whole), rel=LOGGED)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_logged_metrics_are_what_they_say(tmp_path):
    options = {"per_device_train_batch_size": 24, "lam": 0.5, "reference": "mean"}
    trainer = tiny_trainer(tmp_path, max_steps=2, **options)
    table = oracle_rows(trainer.model, ROWS)
    trainer.train()
    one_step = tiny_trainer(tmp_path / "one", max_steps=1, **options)
    one_step.train()
    change = torch.stack([new[1] - old[1] for new, old in zip(oracle_rows(one_step.model, ROWS), table, strict=True)])
    reward = torch.tensor([row[0] for row in table], dtype=torch.float64)
    s, length = torch.stack([row[1] for row in table]).detach(), torch.tensor([row[2] for row in table])
    score = s / length + reward / 0.5
    weight = score.softmax(0)
    first, second = (json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()[:2])
    assert first["step"] == 1
    expected = {
        "ess": 1 / weight.square().sum().item(),
        "ess_share": 1 / weight.square().sum().item() / 24,
        "log_z": score.logsumexp(0).item(),
        "weight_entropy": -(weight * weight.log()).sum().item(),
        "reward_mean": reward.mean().item(),
        "weighted_reward": (weight * reward).sum().item(),
        "nll_per_token": -(s.sum() / length.sum()).item(),
        "kl_to_ref": 0.0,
        "logp_minus_ref": 0.0,
    }
    for key, value in expected.items():
        assert first[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert second["logp_minus_ref"] == pytest.approx(change.mean().item(), rel=1e-5)
    assert second["kl_to_ref"] == pytest.approx((weight * change).sum().item(), rel=1e-5)
    assert abs(second["kl_to_ref"] - second["logp_minus_ref"]) > 1e-2
    assert first["tokens_per_second"] > 0
    assert first["peak_memory_mb"] > 50
    assert 0 <= first["token_accuracy"] <= 1


@pytest.mark.parametrize(("method", "per_token"), [("dpo", False), ("simpo", True)])
def test_logged_metrics_of_pairs(method, per_token, tmp_path):
    trainer = tiny_trainer(tmp_path, method=method, max_steps=2, learning_rate=1.0)
    first = oracle_rows(trainer.model, ROWS)
    trainer.train()
    one_step = tiny_trainer(tmp_path / "one", method=method, max_steps=1, learning_rate=1.0)
    one_step.train()
    table, s = oracle_rows(one_step.model, ROWS), {}
    for pick, name in ((max, "chosen"), (min, "rejected")):
        rows = [[row for row in range(len(table)) if table[row][3] == prompt] for prompt in range(len(ROWS))]
        s[name] = [pick(own, key=lambda row: table[row][0]) for own in rows]
    score = {
        name: torch.tensor([
            (table[row][1] - (first[row][1] if method == "dpo" else 0.0)).item() / (table[row][2] if per_token else 1)
            for row in rows
        ])
        for name, rows in s.items()
    }  # fmt: skip
    margin = score["chosen"] - score["rejected"]
    expected = {
        "pair_accuracy": (margin > 0).double().mean().item(),
        "pair_margin": margin.mean().item(),
        "logp_chosen": sum(table[row][1].item() for row in s["chosen"]) / len(ROWS),
        "logp_rejected": sum(table[row][1].item() for row in s["rejected"]) / len(ROWS),
    }
    for key, value in expected.items():
        assert trainer.state.log_history[1][key] == pytest.approx(value, rel=1e-4), key


def test_logged_metrics_of_clipped_losses(tmp_path):
    rows = [{**row, "rewards": [1.0, 1.0, 1.0] if number == 0 else row["rewards"]} for number, row in enumerate(ROWS)]
    trainer = tiny_trainer(tmp_path, rows, method="grpo", max_steps=2, learning_rate=20.0)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["tied_share"] == pytest.approx(1 / 8)
    assert first["clip_share"] == 0  # the policy is the reference, up to fp32
    assert first["kl_k3"] == pytest.approx(0, abs=1e-9)
    assert 0 < second["clip_share"] < 1
    # k3 is not below KL's other estimate, mean of lp - lpr, by Jensen: exp(x) - 1 >= x
    assert second["kl_k3"] > 0.01


def test_collapsed_weights_are_warned_about(tmp_path):
    rows = [{**row, "rewards": [1000.0 * i, 0.0, 0.0]} for i, row in enumerate(ROWS)]
    trainer = tiny_trainer(tmp_path, rows, per_device_train_batch_size=24)
    with pytest.warns(CollapsedWeightsWarning, match="effective sample size about 1 of 24"):
        trainer.train()
    assert trainer.state.log_history[0]["ess"] == pytest.approx(1.0)


def test_training_by_var_moves_the_policy_to_the_reward(tmp_path):
    trainer = tiny_trainer(
        tmp_path, normalizer="group", max_steps=40, learning_rate=0.02, optim="adamw_torch", logging_steps=40, lam=0.2
    )
    before = oracle_rows(trainer.model, ROWS)
    trainer.train()
    after = oracle_rows(trainer.model, ROWS)

    def mean_rank_correlation(table):
        hits = 0
        for prompt in range(len(ROWS)):
            rows = [row for row in table if row[3] == prompt]
            hits += max(rows, key=lambda row: row[1])[0] == max(row[0] for row in rows)
        return hits / len(ROWS)

    assert mean_rank_correlation(after) >= mean_rank_correlation(before) + 0.4
    assert sum(row[0] * row[1].exp() for row in after) > 50 * sum(row[0] * row[1].exp() for row in before)
