"""VARTrainer's evaluation: its metrics and losses, batches of unequal size, several sets by name, two ranks."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.ranks import run_ranks
from tests.tiny_online import online_trainer
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


# ---- rows that come after the trainer is made ------------------------------------------------------------------------

NEW = [{**row, "prompt": f"{row['prompt']}?"} for row in UNEVEN]
AT_HAND = {  # id: (method, settings, what is given)
    "no reference": ("sft", {}, {}),
    "live": ("var", {"precompute_ref_log_probs": False, "reference": "mean"}, {}),
    "live, of its own": ("dpo", {"precompute_ref_log_probs": False}, {"ref_model": 1}),
    "live, per token": ("grpo", {"precompute_ref_log_probs": False}, {}),
    "an adapter": ("dpo", {}, {"adapter": True}),
    "an adapter, fitted values": ("alol", {}, {"adapter": True}),
    "standardised by the training set": ("dro", {"precompute_ref_log_probs": False}, {}),
}


def with_new_rows(folder, method, settings, given, **options):
    options_given = {}
    if "ref_model" in given:
        options_given["ref_model"] = tiny_model(seed=given["ref_model"])
    if "adapter" in given:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        options_given["peft_config"] = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"per_device_eval_batch_size": 3, "max_steps": 2, **settings}
    trainer = tiny_trainer(folder, method=method, trainer_options={**options_given, **options}, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", AT_HAND)
def test_new_rows_are_scored_where_a_reference_is_at_hand(case, tmp_path):
    """As if the trainer had been given them at its start; after training, whose policy is another."""
    method, settings, given = AT_HAND[case]
    trainer = with_new_rows(tmp_path / "new", method, settings, given)
    wanted = with_new_rows(tmp_path / "known", method, settings, given, eval_dataset=NEW).evaluate()
    found = trainer.evaluate(NEW)
    names = [name for name in wanted if not name.endswith(("_runtime", "_per_second"))]
    assert {name: found[name] for name in names} == pytest.approx({name: wanted[name] for name in names}, rel=1e-6)
    if "eval_logp_minus_ref" in wanted:
        assert abs(wanted["eval_logp_minus_ref"]) > 1e-3
    assert trainer.predict(NEW).metrics["test_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-6)
    several = trainer.evaluate({"new": NEW, "old": ROWS[:3]})
    assert several["eval_new_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-6)


class MapStyle(torch.utils.data.Dataset):
    """As torch's documentation has one: a length and items, and no IndexError that would end a loop over it."""

    def __len__(self):
        return len(NEW)

    def __getitem__(self, number):
        assert number < 2 * len(NEW), "read beyond its end"
        return NEW[number % len(NEW)]


def test_a_map_style_set_is_read_to_its_length(tmp_path):
    trainer = tiny_trainer(tmp_path, MapStyle(), method="sft")
    assert len(trainer.train_dataset.rows.groups) == len(NEW)
    assert trainer.evaluate(MapStyle())["eval_loss"] == trainer.evaluate(NEW)["eval_loss"]


def test_new_rows_that_the_cache_knows_or_that_come_before_training(tmp_path):
    before = tiny_trainer(tmp_path, method="dpo").evaluate(NEW)["eval_loss"]
    assert before == pytest.approx(0.693147, rel=1e-5)
    trainer = with_new_rows(tmp_path, "dpo", {}, {})
    known = with_new_rows(tmp_path / "known", "dpo", {"cache_dir": str(tmp_path / "c")}, {}, eval_dataset=NEW)
    assert trainer.evaluate(NEW)["eval_loss"] == pytest.approx(known.evaluate()["eval_loss"], rel=1e-6)
    assert abs(known.evaluate()["eval_loss"] - before) > 1e-4


@pytest.mark.parametrize("given", [{}, {"ref_model": 1}, {"ref_model": 1, "adapter": True}])
def test_new_rows_are_refused_where_the_reference_was_let_go(given, tmp_path):
    trainer = with_new_rows(tmp_path, "dpo", {}, given)
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"eval_dataset must be .* pass precompute_ref_log_probs=False"):
            call(NEW)


def test_new_rows_get_the_reward_function(tmp_path):
    score = {"reward_func": lambda prompts, completions: [float(len(completion)) for completion in completions]}
    trainer = tiny_trainer(tmp_path, method="awr", trainer_options=score)
    lengths = [len(completion) for row in NEW for completion in row["completions"]]
    assert trainer.evaluate(NEW)["eval_reward_mean"] == pytest.approx(sum(lengths) / len(lengths))


WRONG = {"a path": ("rows.jsonl", ValueError, "got 'rows.jsonl'; load_examples"), "a number": (3, TypeError, "got int")}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_rows_is_refused(case, tmp_path):
    given, error, message = WRONG[case]
    with pytest.raises(error, match=f"eval_dataset must be .*{message}"):
        tiny_trainer(tmp_path, trainer_options={"eval_dataset": {"short": ROWS[:2]}}).evaluate(given)


def test_malformed_new_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset row 1: a row must have prompt "):
        tiny_trainer(tmp_path, method="sft").evaluate([{"question": "a", "completion": "b"}])


def test_online_new_prompts_are_drawn_for(tmp_path):
    seen = []

    def score(prompts, completions):
        seen.extend(prompts)
        return [1.0] * len(prompts)

    trainer = online_trainer(tmp_path, method="grpo", reward_func=score, trainer_options={"eval_dataset": ROWS[:1]})
    trainer.evaluate()
    assert set(seen) == {ROWS[0]["prompt"]}
    seen.clear()
    trainer.evaluate([{"prompt": "3 + 3 = "}])
    assert seen == ["3 + 3 = "]
