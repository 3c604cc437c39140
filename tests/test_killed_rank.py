"""A rank that dies or hangs in the middle of training: the other ends with an error within the group's timeout, and the
last checkpoint continues to the losses of a run that nothing happened to."""

import datetime
import json
import os
import signal

import pytest
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import TrainerCallback

from tests.ranks import HANG, as_accelerators, end_of_ranks, run_ranks, start_ranks
from tests.test_trainer_layouts import fsdp
from tests.tiny_training import tiny_trainer
from var_kernels.cli.train import last_complete_checkpoint

TIMEOUT = datetime.timedelta(seconds=5)  # of the process groups, from the blow on; HANG before it, on a slow machine
SETTINGS = {
    "max_steps": 8, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 5, "ddp_backend": "gloo",
    "optim": "adamw_torch", "learning_rate": 1e-2, **fsdp(),
}  # fmt: skip


class Strike(TrainerCallback):
    """The second rank gets a signal once five steps are done, and the timeout is a short one from then on."""

    def __init__(self, kind):
        self.kind = kind

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != 5:
            return
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
        if args.process_index == 1:
            os.kill(os.getpid(), self.kind)


def run_rank(rank, world, folder, kind, resume):
    checkpoint = last_complete_checkpoint(folder / "run") if resume else None
    callbacks = [] if kind is None else [Strike(kind)]
    with as_accelerators():
        trainer = tiny_trainer(folder, trainer_options={"callbacks": callbacks}, **SETTINGS)
        trainer.train(resume_from_checkpoint=checkpoint)
    if rank == 0:
        steps = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses").write_text(json.dumps([checkpoint, steps]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(run_rank, 2, folder, None, False)
    return json.loads((folder / "losses").read_text())[1]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_the_others_end_in_time_and_the_checkpoint_resumes(kind, undisturbed, tmp_path):
    processes = start_ranks(run_rank, 2, tmp_path, kind, False)
    survivor, struck = end_of_ranks(processes, HANG / 3, wait_for=1)  # without a timeout of its own it waits for HANG
    assert survivor == 1
    assert struck == (-signal.SIGKILL if kind == signal.SIGKILL else None)
    error = (tmp_path / "error-0").read_text()
    assert ("Timed out" if kind == signal.SIGSTOP else "by peer") in error  # "Connection closed" or "reset by peer"

    (tmp_path / "error-0").unlink()
    run_ranks(run_rank, 2, tmp_path, None, True)
    resumed_from, steps = json.loads((tmp_path / "losses").read_text())
    assert resumed_from.endswith("checkpoint-4")
    assert steps == undisturbed
