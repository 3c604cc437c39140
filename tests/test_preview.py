"""``var-kernels train --dry-run``: its figures against those of training, and that nothing is trained or written."""

import json
import re
import warnings

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.tiny_online import PROMPTS, reward
from tests.tiny_training import ROWS, tiny_config, tiny_model, tiny_trainer, tokenizer
from var_kernels.cli import main
from var_kernels.integrations.trainer.preview import _activations, preview, token_line

PAIRS = [
    {"prompt": "1 + 2 = ", "chosen": "3", "rejected": "x" * 60},
    {"prompt": "2 + 2 = ", "chosen": "x" * 60 + "3", "rejected": "x" * 60 + "4"},
    {"prompt": "y" * 60, "chosen": "3", "rejected": "4"},
]


def report(folder, rows=ROWS, *, model=None, reward_func=None, peft_config=None, **options):
    config = tiny_config(folder, max_steps=-1, **options)
    model = tiny_model() if model is None else model
    text = preview(model, config, rows, tokenizer(), reward_func=reward_func, peft_config=peft_config)
    assert not list(folder.iterdir())
    return text


def figures(text, name):
    """The numbers of the line that begins with this name."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [float(number.replace(",", "")) for number in re.findall(r"-?[\d,]*\d\.?\d*(?:e-?\d+)?", line)]


def test_the_first_rows_are_shown_by_token_with_their_labels(tmp_path):
    lines = report(tmp_path, normalizer="batch").splitlines()
    start = next(n for n, line in enumerate(lines) if "train_dataset row 1, completion 1 of 3" in line)
    trainer = tiny_trainer(tmp_path)
    row = trainer.train_dataset.rows.row(0)
    kept = row["labels"] != -100
    assert lines[start].endswith(f"{len(kept)} tokens, {kept.sum()} of them trained, reward 1")
    shown = [line.split(None, 1)[1] for line in (lines[start + 1].replace("not trained", "-"), lines[start + 2])]
    assert shown == [token_line(tokenizer(), row["input_ids"][mask].tolist()) for mask in (~kept, kept)]
    assert shown[0].startswith("<bos>|0")
    assert shown[1].endswith("<eos>")


def test_line_ends_are_visible_and_long_runs_lose_their_middle():
    ids = tokenizer()("a\nb", add_special_tokens=False)["input_ids"]
    assert token_line(tokenizer(), ids) == "a|\\n|b"
    assert token_line(tokenizer(), [ids[0]] * 60) == f"{'|'.join('a' * 24)} ... 12 more ... {'|'.join('a' * 24)}"


def test_counts_are_those_of_the_table_that_is_trained_on(tmp_path):
    text = report(tmp_path, PAIRS, method="dpo", max_length=24)
    table = tiny_trainer(tmp_path, PAIRS, method="dpo", max_length=24).train_dataset.rows
    assert figures(text, "prompts")[0] == 3
    assert figures(text, "completions")[0] == 6
    assert figures(text, "items")[:2] == [2, 2]
    assert figures(text, "cut")[:2] == [table.cut_prompts, table.cut_completions] == [2, 3]
    assert figures(text, "no end token")[0] == 3
    assert figures(text, "equal pairs")[0] == 1
    assert "none: pairs are ordered" in text


def test_rewards_over_all_and_in_a_prompt(tmp_path):
    rows = [*ROWS, {"prompt": "9 + 9 = ", "completions": ["18", "19"], "rewards": [0.5, 0.5]}]
    text = report(tmp_path, [*rows, {"prompt": "alone ", "completion": "4", "reward": 2.0}], normalizer="batch")
    groups = [torch.tensor(row["rewards"], dtype=torch.float64) for row in rows]
    known = torch.cat([*groups, torch.tensor([2.0], dtype=torch.float64)])
    mean, std, low, high = figures(text, "over all")
    assert mean == pytest.approx(known.mean().item(), rel=1e-3)
    assert std == pytest.approx(known.std(correction=0).item(), rel=1e-3)
    assert (low, high) == (0.0, 2.0)
    inside, count, tied = figures(text, "in a prompt")
    assert inside == pytest.approx(sum(g.std(correction=0).item() for g in groups) / 9, rel=1e-3)
    assert (count, tied) == (9, 1)
    assert figures(text, "alone")[0] == 1


def test_rewards_without_effect_are_part_of_the_report(tmp_path):
    text = report(tmp_path, [{**row, "rewards": [1.0] * 3} for row in ROWS], normalizer="group", reference="none")
    assert "training would stop: train_dataset: rewards would have no effect" in text


def test_rows_longer_than_the_model_are_part_of_the_report(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    size = len(tokenizer())
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=10, n_embd=8, n_layer=1, n_head=1))
    text = report(tmp_path, model=model, max_length=32)
    assert re.search(r"training would stop: max_length must be at most 10, the learned positions", text)


@pytest.mark.parametrize(
    ("normalizer", "reference"),
    [("batch", "none"), ("batch", "mean"), ("batch", "sum"), ("group", "none"), ("self_normalised", "none")],
)
def test_the_sample_size_is_that_of_the_first_step(normalizer, reference, tmp_path):
    """One step holds all data, so the order does not matter."""
    options = {"normalizer": normalizer, "reference": reference, "per_device_train_batch_size": 24}
    text = report(tmp_path, **options)
    line = next(line for line in text.splitlines() if "(the setting)" in line)
    shown = dict(re.findall(r"lam ([\d.]+): (\d+)%", line))
    assert list(shown) == ["0.05", "0.15", "0.5", "1.5", "5"]
    for lam in ("0.05", "0.5", "5"):
        trainer = tiny_trainer(tmp_path / lam, lam=float(lam), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        logged = next(entry["ess_share"] for entry in trainer.state.log_history if "ess_share" in entry)
        assert int(shown[lam]) == pytest.approx(100 * logged, abs=0.51)


def test_steps_are_those_that_the_trainer_makes(tmp_path):
    options = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    text = report(tmp_path, **options)
    trainer = tiny_trainer(tmp_path, max_steps=-1, **options)
    trainer.train()
    assert f"  {trainer.state.global_step // 2} an epoch, {trainer.state.global_step} in all" in text
    assert "1 an epoch, 7 in all" not in text


def test_online_prompts_are_shown_and_nothing_is_drawn(tmp_path):
    text = report(
        tmp_path, PROMPTS, method="dpo", reward_func=reward, online=True, max_new_tokens=5, generations_per_prompt=3,
        iterations=4, prompts_per_iteration=6, per_device_train_batch_size=3,
    )  # fmt: skip
    assert figures(text, "prompts")[0] == len(PROMPTS)
    assert "3 completions of 6 prompts an iteration, at most 5 tokens each" in text
    assert "2 an iteration, 8 in all" in text
    assert "reference, a copy of the weights" in text
    assert (
        f"activations of 6 x {max(len(tokenizer()(row['prompt'])['input_ids']) for row in PROMPTS) + 5} tokens" in text
    )


def test_parameters_and_parts_of_the_memory(tmp_path):
    model = tiny_model(dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters())
    text = report(tmp_path, model=model, optim="adamw_torch")
    assert figures(text, "parameters") == [size, size]
    assert figures(text, "weights")[0] == pytest.approx(4 * size / 2**20, abs=0.051)
    assert figures(text, "optimizer")[-1] == pytest.approx(8 * size / 2**20, abs=0.051)
    assert "reference, a copy" not in text
    live = report(tmp_path, method="dpo", rows=PAIRS, precompute_ref_log_probs=False)
    assert "reference, a copy" in live
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    text = report(tmp_path, model=tiny_model(dtype=torch.float32), peft_config=lora)
    total, learned = figures(text, "parameters")
    assert total == size + learned
    assert 0 < learned < size / 2


@pytest.mark.parametrize("shape", [(2, 7), (5, 32)])
def test_activations_are_what_a_forward_pass_saves(shape, tmp_path):
    model = tiny_model(dtype=torch.float32)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(shape, dtype=torch.int64), use_cache=False)
    size = sum(storage.nbytes() for storage in saved.values())
    assert _activations(model, tiny_config(tmp_path), shape) == pytest.approx(size, rel=0.1)
    checkpointed = tiny_config(tmp_path, gradient_checkpointing=True)
    assert _activations(model, checkpointed, shape) < size


def test_a_model_that_reads_values_has_no_estimate(tmp_path):
    model = tiny_model()
    forward = model.model.forward
    model.model.forward = lambda *args, **kw: forward(*args, **kw) if kw["input_ids"].sum().item() < 1e9 else None
    assert _activations(model, tiny_config(tmp_path), (2, 7)) is None


def test_the_command_reports_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{}\n")
    words = ["--from-scratch", "hidden=16,layers=1,heads=2,vocab=270", "--dataset", "rows.jsonl", "--max-length", "32"]
    assert main(["train", *words, "--use-cpu", "--skip-malformed", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dry run of method 'var': nothing is trained or written")
    assert "rows.jsonl:1, completion 1 of 3" in said
    assert "1 rows were left out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    # also beside a run that is there, which training would refuse
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert main(["train", *words, "--use-cpu", "--skip-malformed", "--dry-run", "--output-dir", "run"]) == 0
