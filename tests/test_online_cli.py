"""``var-kernels train --online``: what it refuses, what it leaves, a reward that fails in the middle and --resume."""

import json

import pytest

pytest.importorskip("transformers")

from tests.test_bad_input_train import folder, tree  # noqa: F401 - a fixture
from tests.test_online_runs import comparable
from tests.tiny_online import PROMPTS
from tests.tiny_training import ROWS
from var_kernels.cli import main

BASE = {
    "from-scratch": "hidden=16,layers=1,heads=2,vocab=270",
    "dataset": "prompts.jsonl",
    "output-dir": "run",
    "max-length": "32",
    "max-new-tokens": "4",
    "method": "dpo",
    "online": "true",
    "reward": "judge:lengths",
}
JUDGE = "def lengths(prompts, completions):\n    return [len(c) + 0.01 * sum(map(ord, c)) for c in completions]\n"


@pytest.fixture
def place(folder):  # noqa: F811 - the fixture
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (folder / "judge.py").write_text(JUDGE)
    return folder


def words(**options) -> list[str]:
    settings = BASE | {name.replace("_", "-"): value for name, value in options.items()}
    given = {name: value for name, value in settings.items() if value is not None}
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


# name: (options over BASE, None taking one away; files to write first; what the message must say)
REFUSED = {
    "no reward": ({"reward": None}, {}, "reward_func: online, method 'dpo' needs the reward of completions"),
    "two rewards": ({"reward_model": "m"}, {}, "give one of --reward and --reward-model"),
    "no such reward model": ({"reward": None, "reward_model": "./m"}, {}, "reward model must be an existing folder"),
    "chat without a model": ({"reward_model_chat": ""}, {}, "--reward-model-chat needs --reward-model"),
    "one completion where pairs are needed": (
        {"generations_per_prompt": 1},
        {},
        "generations_per_prompt must be at least 2 for dpo, got 1; it compares completions of a prompt",
    ),
    "one completion where groups are compared": (
        {"method": "grpo", "generations_per_prompt": 1},
        {},
        "generations_per_prompt must be at least 2 for grpo, got 1",
    ),
    "three for SAIL": (
        {"method": "sail_pp", "generations_per_prompt": 3},
        {},
        "generations_per_prompt must be 2 for sail_pp, got 3; a pair is two draws of the policy as they come",
    ),
    "SAIL on a data set's responses": ({"method": "sail_dp"}, {}, "'sail_dp', got True; it learns from the responses"),
    "a reward model's method": ({"method": "ava_p"}, {}, "'ava_p', got True; it learns a reward model"),
    "Bradley-Terry": ({"method": "bradley_terry"}, {}, "'bradley_terry', got True; it learns"),
    "fitted values": ({"method": "alol"}, {}, "'alol', got True; it fits its values on the data"),
    "VAR with a reference term": (
        {"method": "var", "normalizer": "batch", "reference": "mean"},
        {},
        "reference must be 'none' online, where the reference itself drew the completions",
    ),
    "VAR far from its reference": (
        {"method": "var", "normalizer": "self_normalised", "refresh_reference": "false"},
        {},
        "refresh_reference must be True for VAR online, whose weights are those of completions drawn from the",
    ),
    "a cold policy": ({"sampling_temperature": 0}, {}, "sampling_temperature must be finite and > 0, got 0.0"),
    "no room for prompts": ({"max_new_tokens": 32}, {}, "max_new_tokens must be < max_length = 32"),
    "no iterations": ({"iterations": 0}, {}, "iterations must be >= 1, got 0"),
    "no prompts in an iteration": ({"prompts_per_iteration": 0}, {}, "prompts_per_iteration must be >= 1, got 0"),
    "no steps": ({"steps_per_iteration": 0}, {}, "steps_per_iteration must be >= 1, or None, got 0"),
    "no completions at once": ({"sampling_batch_size": 0}, {}, "sampling_batch_size must be >= 1, got 0"),
    "two moving references": (
        {"sync_ref_model": "true", "precompute_ref_log_probs": "false"},
        {},
        "sync_ref_model must be False online, where refresh_reference=True moves the reference",
    ),
    "workers that stay": (
        {"dataloader_persistent_workers": "true", "dataloader_num_workers": 1},
        {},
        "dataloader_persistent_workers must be False online, where every iteration has other data",
    ),
    "unknown label": (
        {"method": "sail_pr", "label_by": "best"},
        {},
        "label_by must be one of 'draw', 'higher', got 'best'",
    ),
    "label of another method": (
        {"label_by": "draw"},
        {},
        "--label-by is no option of method 'dpo'; it belongs to sail_pr",
    ),
    "a word for a switch": ({"online": "perhaps"}, {}, "online must be of type bool, got 'perhaps'"),
    "a row without a prompt": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": '{"prompt": "1 + 1 = "}\n{"text": "2"}\n'},
        "m.jsonl:2: a row must have prompt ",
    ),
    "an empty prompt": ({"dataset": "m.jsonl"}, {"m.jsonl": '{"prompt": ""}\n'}, "m.jsonl:1: prompt must not"),
    "prompts for offline training": (
        {"online": "false"},
        {},
        "prompts.jsonl:1: a row must have the keys prompt + completion",
    ),
}


@pytest.mark.parametrize(("options", "files", "message"), REFUSED.values(), ids=REFUSED)
def test_the_command_refuses_says_why_and_leaves_nothing(options, files, message, place, capsys):
    for name, content in files.items():
        (place / name).write_text(content)
    before = {name for name in tree(place) if "__pycache__" not in name}
    line = [word for word in words(**options) if word]
    assert main(line) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("var-kernels train: ")
    assert {name for name in tree(place) if "__pycache__" not in name} == before


def test_a_reward_that_fails_in_the_middle_stops_with_its_row_and_resumes_when_mended(place, capsys, monkeypatch):
    settings = {"iterations": 3, "prompts_per_iteration": 4, "generations_per_prompt": 3, "steps_per_iteration": 2,
                "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1, "disable_tqdm": "true",
                "use_cpu": "true"}  # fmt: skip

    def metrics(name):
        entries = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
        return comparable([entry for entry in entries if "loss" in entry])

    import judge

    assert main(words(**settings, output_dir="straight")) == 0
    right, calls = judge.lengths, []

    def fails_later(prompts, completions):
        calls.append(len(prompts))
        values = right(prompts, completions)
        return [float("nan"), *values[1:]] if len(calls) > 1 else values

    monkeypatch.setattr(judge, "lengths", fails_later)
    assert main(words(**settings)) == 2
    printed = capsys.readouterr().err
    assert "mend the reward function and resume, which draws the same completions again" in printed
    assert "iteration 1, prompts.jsonl:" in printed
    assert "sample 1: the reward function must return finite fp32 numbers, got nan" in printed
    assert main(words(**settings)) == 2
    assert "already holds a run: --resume continues it" in capsys.readouterr().err

    monkeypatch.setattr(judge, "lengths", right)
    assert main([*words(**settings), "--resume"]) == 0
    assert "resuming from run/checkpoint-2" in capsys.readouterr().out
    assert metrics("run") == metrics("straight")


def test_the_example_is_understood(place, capsys):
    from pathlib import Path

    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    example = Path(__file__).parents[1] / "examples" / "train_online.yaml"
    line = ["train", "--config", str(example), "--from-scratch", BASE["from-scratch"], "--dataset", "rows.jsonl",
            "--reward", "judge:lengths", "--output-dir", "run", "--iterations", "1", "--prompts-per-iteration", "4",
            "--max-new-tokens", "4", "--max-length", "32", "--use-cpu", "--disable-tqdm"]  # fmt: skip
    assert main(line) == 0, capsys.readouterr().err
    assert (place / "run" / "buffer" / "iteration-00000.jsonl").exists()


def test_several_rewards_and_a_sampler_by_name(place, capsys):
    """Weights behind the names; another engine's log-probs weigh the tokens; both by the dry run too."""
    (place / "engine.py").write_text(
        "from var_kernels.integrations.trainer.online import Samples\n"
        "def draw(model, prompts, *, n, **options):\n"
        "    ids = [[[5, 6 + k, 1] for k in range(n)] for _ in prompts]\n"
        "    return Samples(ids, [[[-5.0, -5.0, -5.0]] * n for _ in prompts])\n"
    )
    settings = {"method": "ppo", "reward": "judge:lengths*-1,judge:lengths*3", "sampler": "engine:draw",
                "importance_cap": "2", "iterations": "1", "prompts_per_iteration": "4", "generations_per_prompt": "3",
                "logging_steps": "1", "use_cpu": "true", "disable_tqdm": "true"}  # fmt: skip
    assert main([*words(**settings), "--dry-run"]) == 0, capsys.readouterr().err
    assert main(words(**settings)) == 0, capsys.readouterr().err
    (row, *_) = [json.loads(line) for line in (place / "run/buffer/iteration-00000.jsonl").read_text().splitlines()]
    single = [len(c) + 0.01 * sum(map(ord, c)) for c in row["completions"]]
    assert row["rewards"] == pytest.approx([2 * value for value in single])
    assert row["completion_logps"] == [[-5.0] * 3] * 3
    entries = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert any("sampler_logp_gap" in entry for entry in entries)
    assert main(words(**{**settings, "sampler": None, "output_dir": "other"})) == 2
    assert "importance_cap must be None without a sampler, got 2.0" in capsys.readouterr().err
    assert main(words(**{**settings, "sampler": "engine:missing", "output_dir": "other"})) == 2
    assert "sampler: module 'engine' must have a function 'missing', got none" in capsys.readouterr().err
