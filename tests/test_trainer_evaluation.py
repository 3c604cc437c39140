"""VARTrainer's evaluation: its metrics and losses, batches of unequal size, several sets by name, two ranks."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.ranks import run_ranks
from tests.tiny_training import ROWS, oracle_rows, tiny_model, tiny_trainer

# Five prompts of two or three completions: a rank's batches of two prompts differ in rows; the last one is not full.
UNEVEN = [
    {**row, **{key: row[key][: 2 + number % 2] for key in ("completions", "rewards")}}
    for number, row in enumerate(ROWS[:5])
]
METHODS = ("var", "dpo", "exo")
KEYS = ("eval_loss", "eval_nll_per_token", "eval_reward_mean", "eval_token_accuracy")


def evaluator(folder, method, size, **options):
    sizes = {"per_device_eval_batch_size": size, **options}
    given = {"ref_model": tiny_model(seed=1), "eval_dataset": UNEVEN}
    return tiny_trainer(folder, method=method, trainer_options=given, **sizes)


def run_rank(rank, world, folder):
    found = {method: evaluator(folder / method, method, 2, ddp_backend="gloo").evaluate() for method in METHODS}
    torch.save(found, folder / f"{rank}.pt")


def test_two_ranks_evaluate_as_one_process(tmp_path):
    """Their batches are the same; what accelerate fills the last ones up with does not count."""
    run_ranks(run_rank, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for method in METHODS:
        single = evaluator(tmp_path / "one" / method, method, 2).evaluate()
        for found in ranks:
            for key in KEYS:
                assert found[method][key] == pytest.approx(single[key], rel=1e-6), (method, key)


def test_the_loss_is_the_mean_over_items_whatever_the_batch(tmp_path):
    losses = [evaluator(tmp_path / str(size), "dpo", size).evaluate()["eval_loss"] for size in (2, 3, 5)]
    table, ref = oracle_rows(tiny_model(), UNEVEN), oracle_rows(tiny_model(seed=1), UNEVEN)
    pairs = []
    for prompt in range(len(UNEVEN)):
        rows = [i for i, row in enumerate(table) if row[3] == prompt]
        best, worst = max(rows, key=lambda i: table[i][0]), min(rows, key=lambda i: table[i][0])
        pairs.append((table[best][1] - ref[best][1]) - (table[worst][1] - ref[worst][1]))
    wanted = -torch.nn.functional.logsigmoid(0.1 * torch.stack(pairs)).mean().item()
    assert losses == pytest.approx([wanted] * 3, rel=1e-6)


def test_the_best_model_by_any_metric(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "kl_to_ref", "greater_is_better": False}
    trainer = tiny_trainer(tmp_path, trainer_options={"eval_dataset": ROWS[:3]}, **saving, **best)
    trainer.train()
    seen = [entry["eval_kl_to_ref"] for entry in trainer.state.log_history if "eval_kl_to_ref" in entry]
    assert len(seen) == 3
    assert trainer.state.best_metric == min(seen)
    assert trainer.evaluate()["eval_kl_to_ref"] == pytest.approx(min(seen), rel=1e-6)


def test_evaluation_leaves_the_trainings_metrics_alone(tmp_path):
    options = {"max_steps": 4, "logging_steps": 4, "logging_first_step": False}
    plain = tiny_trainer(tmp_path / "plain", **options)
    evaluated = tiny_trainer(
        tmp_path / "evaluated",
        trainer_options={"eval_dataset": ROWS[:3]},
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    for trainer in (plain, evaluated):
        trainer.train()
    logged = [next(e for e in t.state.log_history if "loss" in e) for t in (plain, evaluated)]
    assert logged[0]["nll_per_token"] == logged[1]["nll_per_token"]
    predicted = evaluated.predict(evaluated.eval_dataset).metrics
    assert predicted["test_loss"] == evaluated.evaluate()["eval_loss"]


def test_several_sets_by_name(tmp_path):
    sets = {"first": ROWS[:3], "others": ROWS[3:]}
    trainer = tiny_trainer(tmp_path, trainer_options={"eval_dataset": sets})
    found = trainer.evaluate()
    for name, rows in sets.items():
        alone = tiny_trainer(tmp_path, trainer_options={"eval_dataset": rows}).evaluate()
        assert found[f"eval_{name}_loss"] == alone["eval_loss"]
        assert found[f"eval_{name}_log_z"] == alone["eval_log_z"]
    assert trainer.evaluate("first")["eval_loss"] == found["eval_first_loss"]


def test_rows_that_the_reference_has_not_scored_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(TypeError, match=r"eval_dataset: expected None, a name.* got list"):
            call(ROWS[:3])
