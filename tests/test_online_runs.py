"""Online runs that stop in their middle: killed while they draw or train, a reward that raises, buffers that do not
fit, two ranks."""

import json
import os
import signal

import pytest
import torch

pytest.importorskip("transformers")

from transformers import TrainerCallback

from tests.ranks import run_alone, run_ranks
from tests.tiny_online import Recording, buffered, online_trainer, reward, trained
from tests.tiny_training import ROWS, losses, tiny_trainer
from var_kernels.integrations.data import DataError
from var_kernels.integrations.trainer.online import Buffer, GenerateSampler
from var_kernels.integrations.trainer.online.buffer import Drawn, Iteration
from var_kernels.integrations.trainer.record import METRICS_FILE

SAMPLER = GenerateSampler(pad_token_id=2, end_token_ids=(1,))
# Three iterations of three steps; a checkpoint after steps 2, 4, ...: in the middle and at the end of iterations.
RUN = {"sampling_batch_size": 4, "steps_per_iteration": 3, "save_strategy": "steps", "save_steps": 2}


def logged(folder) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "run" / METRICS_FILE).read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def comparable(entries: list[dict]) -> list[dict]:
    timed = ("seconds", "per_second", "memory")
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in entries]


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


class Kill(TrainerCallback):
    """Ends the process after this step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_killed(folder, method: str, calls: int, step: int) -> None:
    """Ends at this call of the sampler or after this step, whichever is not 0."""

    def count(model):
        if len(sampler.calls) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    sampler = Recording(SAMPLER, count)
    options = {"sampler": sampler, "callbacks": [Kill(step)]}
    online_trainer(folder, method=method, trainer_options=options, **RUN).train()


@pytest.mark.parametrize(
    ("method", "calls", "step", "checkpoint", "calls_left"),
    [
        ("sail_pp", 2, 0, None, 6),  # at the second of two batches of the first draw
        ("grpo", 11, 0, 6, 4),  # at the third of four batches of the third draw
        ("dpo", 0, 7, 4, 0),  # training, one iteration further than the checkpoint, with all draws there
    ],
    ids=["drawing", "drawing later", "training"],
)
def test_a_killed_run_resumes_to_the_same_curve(method, calls, step, checkpoint, calls_left, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    trained(straight, method=method, **RUN)
    ended = run_alone(train_killed, tmp_path, killed, method, calls, step)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    folders = sorted((killed / "run").glob("checkpoint-*"))
    for later in folders:
        if int(later.name.split("-")[1]) > (checkpoint or 0):
            later.rename(killed / later.name)  # as if it had been killed before that one was written

    sampler = Recording(SAMPLER)
    resumed = online_trainer(killed, method=method, trainer_options={"sampler": sampler}, **RUN)
    resumed.train(resume_from_checkpoint=checkpoint and str(killed / "run" / f"checkpoint-{checkpoint}"))
    assert len(sampler.calls) == calls_left
    assert comparable(logged(killed)) == comparable(logged(straight))
    assert [entry["step"] for entry in logged(killed)] == list(range(1, 10))
    for iteration in range(3):
        assert buffered(killed, iteration) == buffered(straight, iteration)


def test_resuming_in_the_middle_needs_the_buffer_and_the_same_settings(tmp_path):
    trained(tmp_path, **RUN)
    checkpoint, path = str(tmp_path / "run" / "checkpoint-4"), Buffer(tmp_path / "run" / "buffer").path(1)
    with pytest.raises(
        ValueError, match=r"generations_per_prompt must be 3, with which iteration 1 was drawn, .* got 4"
    ):
        online_trainer(tmp_path, generations_per_prompt=4, **RUN).train(resume_from_checkpoint=checkpoint)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(
        FileNotFoundError, match=r"iteration-00001.jsonl .* must be whole, .* after 1 steps on it, got a missing"
    ):
        online_trainer(tmp_path, **RUN).train(resume_from_checkpoint=checkpoint)


def test_draws_of_another_policy_are_not_taken_over(tmp_path, caplog):
    trained(tmp_path, **RUN)
    before = buffered(tmp_path, 2)
    sampler = Recording(SAMPLER)
    other = online_trainer(tmp_path, beta=2.0, trainer_options={"sampler": sampler}, **RUN)
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert "iteration-00002.jsonl was drawn by another policy or with other settings: drawn anew" in caplog.text
    assert len(sampler.calls) == 4
    assert buffered(tmp_path, 2) != before


# ---- rewards that fail in the middle ---------------------------------------------------------------------------------


def test_after_a_reward_that_raises_the_same_is_drawn_again(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    trained(straight, **RUN)
    victim = buffered(straight, 1)[2]

    def breaks(prompts, completions):
        if victim["completions"][1] in completions:
            raise OSError("the judge is away")
        return reward(prompts, completions)

    sampler = Recording(SAMPLER)
    trainer = online_trainer(broken, reward_func=breaks, trainer_options={"sampler": sampler}, **RUN)
    where = "iteration 1, .*, sample 1: the reward function raised OSError on 12 rows from here on: the judge is away"
    with pytest.raises(DataError, match=f"{where}.*mend the reward function and resume, which draws the same"):
        trainer.train()
    assert len(sampler.calls) == 8
    assert buffered(broken, 0) == buffered(straight, 0)
    assert not Buffer(broken / "run" / "buffer").path(1).exists()
    checkpoint = broken / "run" / "checkpoint-2"
    assert (checkpoint / "trainer_state.json").exists()

    sampler = Recording(SAMPLER)
    mended = online_trainer(broken, trainer_options={"sampler": sampler}, **RUN)
    mended.train(resume_from_checkpoint=str(checkpoint))
    assert len(sampler.calls) == 8  # of the second iteration and of the third
    assert comparable(logged(broken)) == comparable(logged(straight))


def test_equal_rewards_everywhere_are_said(tmp_path):
    with pytest.raises(ValueError, match="iteration 0: method 'dpo' needs pairs: no prompt has two completions with"):
        trained(tmp_path, reward_func=lambda p, c: [1.0] * len(c))


# ---- the buffer ------------------------------------------------------------------------------------------------------


def test_a_buffer_is_read_as_it_was_written_or_not_at_all(tmp_path):
    buffer = Buffer(tmp_path / "b")
    text = 'line\u2028separator \N{GRINNING FACE}\n"quoted"'
    drawn = [Drawn("p", [text, ""], [0.5, -1.0], "file:1", [3, 4], [[5, 1], [1]])]
    content = Iteration({"seed": 3}, "abc", drawn, {"ref_logp": torch.rand(2)}, {"old": torch.rand(7)}, {"m": 0.25})
    assert buffer.read(4) is None
    buffer.write(4, content)
    read = buffer.read(4)
    assert (read.settings, read.policy, read.drawn, read.metrics) == ({"seed": 3}, "abc", drawn, {"m": 0.25})
    assert torch.equal(read.columns["ref_logp"], content.columns["ref_logp"])
    assert torch.equal(read.token_columns["old"], content.token_columns["old"])
    tensors = buffer.path(4).with_suffix(".safetensors")
    whole = tensors.read_bytes()
    buffer.write(4, Iteration({"seed": 3}, "abc", [*drawn, *drawn]))
    tensors.write_bytes(whole)  # the log-probs of other rows
    assert buffer.read(4) is None


# ---- two ranks -------------------------------------------------------------------------------------------------------

ON_RANKS = ("grpo", "sail_pr")


def run_rank(rank, world, folder):
    for method in ON_RANKS:
        sizes = {"per_device_train_batch_size": 2, "sampling_batch_size": 4}
        online_trainer(folder / method, method=method, ddp_backend="gloo", **sizes).train()
    pairs = [{"prompt": row["prompt"], "chosen": "12", "rejected": "x"} for row in ROWS]
    options = {"method": "bradley_terry", "max_steps": 3, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    tiny_trainer(folder / "judge", pairs, per_device_train_batch_size=2, **options).train()

    def breaks(prompts, completions):
        if rank == 1:
            raise OSError("away")
        return reward(prompts, completions)

    broken = online_trainer(folder / "broken", reward_func=breaks, sampling_batch_size=4, ddp_backend="gloo")
    with pytest.raises(DataError) as refused:
        broken.train()
    (folder / f"refusal-{rank}").write_text(str(refused.value))


def test_two_ranks_draw_their_shares_and_train_as_one(tmp_path):
    run_ranks(run_rank, 2, tmp_path)
    for method in ON_RANKS:
        two, one = tmp_path / method, tmp_path / "one" / method
        single = trained(one, method=method, per_device_train_batch_size=4, sampling_batch_size=4)
        for iteration in range(3):
            assert buffered(two, iteration) == buffered(one, iteration)
        assert [entry["loss"] for entry in logged(two)] == pytest.approx(losses(single), rel=1e-5, abs=1e-6)
        for name in ("sample_reward_mean", "sample_kl", "completion_length", "item_share"):
            both = [[entry[name] for entry in logged(folder) if name in entry] for folder in (two, one)]
            assert len(both[0]) == 3
            assert both[0] == pytest.approx(both[1], rel=1e-4, abs=1e-6)
    messages = [(tmp_path / f"refusal-{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "sample 1: the reward function raised OSError on 6 rows from here on: away" in messages[0]
