"""What a run says of itself without a terminal: a line on the work before it, and lines on its progress."""

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from tests.tiny_online import online_trainer
from tests.tiny_training import ROWS, losses, tiny_trainer
from var_kernels.integrations.trainer import progress, record
from var_kernels.integrations.trainer.progress import ProgressLines, progress_bar

ARGS = SimpleNamespace(disable_tqdm=True, should_save=True)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_lines_come_after_ten_seconds_and_then_every_half_minute(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    lines, when = ProgressLines("scoring", 1000, "row", clock=clock), []
    for _ in range(1000):
        clock.now += 1.0
        lines.advance(1)
        if len(caplog.messages) > len(when):
            when.append(clock.now - 100.0)
    assert when == [10.0, *range(30, 1000, 30)]
    assert caplog.messages[0] == "scoring: 10 of 1000 rows (1 %), 1 rows/s, 16:30 left"
    assert caplog.messages[-1] == "scoring: 990 of 1000 rows (99 %), 1 rows/s, 0:10 left"


def test_slow_units_and_hours(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    lines = ProgressLines("training", 1002, "step", 2, clock)
    clock.now += 20.0
    lines.advance(1)
    assert caplog.messages == ["training: 3 of 1002 steps (0 %), 20 s/step, 5:33:00 left"]


def test_what_is_quick_needs_no_line(caplog):
    caplog.set_level(logging.INFO)
    with progress_bar(ARGS, "scoring", 5, "row") as advance:
        for _ in range(5):
            advance(1)
    assert not caplog.messages


@pytest.mark.parametrize("args", [None, SimpleNamespace(disable_tqdm=True, should_save=False)])
def test_other_processes_say_nothing(args, caplog, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    caplog.set_level(logging.INFO)
    with progress_bar(args, "scoring", 5, "row") as advance:
        advance(5)
    assert not caplog.messages


def test_a_run_says_what_it_is_about_to_do(tmp_path, caplog, monkeypatch):
    """Data, model and steps in a line; the reference's scoring with where it is kept; progress of both."""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "LAST_PAUSE", 0.0)
    caplog.set_level(logging.INFO)
    options = {"normalizer": "self_normalised", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = tiny_trainer(tmp_path, max_steps=3, per_device_eval_batch_size=8, **options)
    tokens = len(trainer.train_dataset.rows.token_ids)
    assert f"scoring 24 rows ({tokens} tokens) with the reference, once: kept in {tmp_path / 'cache'}" in caplog.text
    scoring = [message for message in caplog.messages if message.startswith("reference log-probs: ")]
    assert len(scoring) == 3
    assert f"reference log-probs: {tokens} of {tokens} tokens (100 %)" in scoring[-1]
    caplog.clear()
    trainer.train()
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    said = f"method var: 8 prompts, 24 completions, 8 items; {count:,} parameters; 3 steps of 4 items"
    assert said in caplog.messages
    assert [message.split(" (")[0] for message in caplog.messages if message.startswith("training: ")] == [
        "training: 1 of 3 steps", "training: 2 of 3 steps", "training: 3 of 3 steps",
    ]  # fmt: skip
    caplog.clear()
    tiny_trainer(tmp_path, **options)
    assert "reference log-probs of 24 rows read from" in caplog.text
    assert "scoring" not in caplog.text


def test_an_online_run_and_an_adapter_say_theirs(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    caplog.set_level(logging.INFO)
    online_trainer(tmp_path / "online", iterations=1).train()
    assert "method dpo: 8 prompts to draw for" in caplog.text
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = tiny_trainer(tmp_path / "lora", ROWS, trainer_options={"peft_config": adapter})
    assert record.summary(trainer).endswith(", 192 of them learn")


def test_the_reference_scores_what_the_steps_read(tmp_path, caplog):
    """A short run says so, trains as one that scores batch by batch, and refuses rows that it has not scored."""
    caplog.set_level(logging.INFO)
    options = {"per_device_train_batch_size": 2, "max_steps": 1}
    trainer = tiny_trainer(tmp_path / "a", **options)
    assert (~trainer.train_dataset.rows.columns["ref_logp"].isnan()).sum() == 2
    assert "scoring 2 of 24 rows" in caplog.text
    trainer.train()
    live = tiny_trainer(tmp_path / "b", precompute_ref_log_probs=False, **options)
    live.train()
    assert losses(trainer) == pytest.approx(losses(live), rel=1e-6)
    late = tiny_trainer(tmp_path / "c", **options)
    late.args.max_steps = 8
    with pytest.raises(RuntimeError, match="max_steps: the reference scored the rows of that many steps alone"):
        late.train()
