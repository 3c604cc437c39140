"""TRL's trainers with this library's head on two ranks: the numbers of TRL's own head on two ranks."""

import contextlib
import copy

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets")

from accelerate.state import AcceleratorState, PartialState

from tests.ranks import as_accelerators, run_ranks
from tests.test_trainer_layouts import fsdp
from tests.trl_runs import assert_same_curves, build, fused, logs, lora, needs_fused_trl, on_full_logits, own, tiny

pytestmark = needs_fused_trl
STEPS = 4
# name: TRL's trainer, what gives the numbers to compare with, layout, options
CASES = {
    "ddp sft, accumulated": ("SFT", own, {}, {"gradient_accumulation_steps": 2}),
    "ddp grpo": ("GRPO", own, {}, {"beta": 0.1, "per_device_train_batch_size": 4}),
    "fsdp2 dft": ("SFT", own, fsdp(), {"loss_type": "dft"}),
    "fsdp2 dpo, adapted head": ("DPO", on_full_logits, fsdp(), {"adapter": lora("q_proj", "lm_head")}),
}


def run_rank(rank, world, folder):
    found = {}
    for number, (case, (name, yardstick, layout, options)) in enumerate(CASES.items()):
        options = {"max_steps": STEPS, "per_device_train_batch_size": 2, **options}
        if layout:
            options |= {"use_cpu": False, "ddp_backend": "gloo"}
        for wrap in (yardstick, fused):
            with as_accelerators() if layout else contextlib.nullcontext():
                run = folder / f"{number}-{wrap.__name__}-{rank}"
                found[case, wrap is fused] = logs(build(wrap, name, run, **copy.deepcopy(layout), **options))
            AcceleratorState._reset_state()
            PartialState._reset_state()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl") / "ranks"
    folder.mkdir()
    tiny().save_pretrained(folder / "model")
    run_ranks(run_rank, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_trl_on_two_ranks(ranks, case):
    for found in ranks:
        assert_same_curves(found[case, True], found[case, False], STEPS)
