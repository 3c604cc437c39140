"""TRL's trainers with this library's head on two ranks: the numbers of TRL's own head on two ranks."""

import contextlib
import copy

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets")

import trl
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig

from tests.ranks import as_accelerators, run_ranks
from tests.test_trainer_layouts import fsdp
from tests.trl_runs import (
    PAIRS,
    PROMPTS,
    SFT,
    assert_same_curves,
    fused,
    length_reward,
    logs,
    make,
    needs_fused_trl,
    on_full_logits,
    tiny,
)

pytestmark = needs_fused_trl
STEPS = 4
ONLINE = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "per_device_train_batch_size": 4}
ROWS_OF = {"SFT": SFT, "DPO": PAIRS, "GRPO": PROMPTS}
CASES = {
    "ddp sft, accumulated": ("SFT", {}, {"gradient_accumulation_steps": 2}),
    "ddp grpo": ("GRPO", {}, ONLINE),
    "fsdp2 dft": ("SFT", fsdp(), {"loss_type": "dft"}),
    "fsdp2 dpo, adapted head": ("DPO", fsdp(), {"adapter": True}),
}


def run_rank(rank, world, folder):
    found = {}
    for case, (name, layout, options) in CASES.items():
        options = {"per_device_train_batch_size": 2, **copy.deepcopy(layout), **options}
        trainer_options, yardstick = {}, lambda cls: cls
        if options.pop("adapter", False):
            adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
            trainer_options, yardstick = {"peft_config": adapter}, on_full_logits
        if name == "GRPO":
            trainer_options["reward_funcs"] = length_reward
        if layout:
            options |= {"use_cpu": False, "ddp_backend": "gloo"}
        for wrap in (yardstick, fused):
            run = folder / f"{len(found)}-{rank}"
            with as_accelerators() if layout else contextlib.nullcontext():
                trainer = make(
                    wrap(getattr(trl, f"{name}Trainer")), getattr(trl, f"{name}Config"), ROWS_OF[name], run,
                    trainer_options=copy.deepcopy(trainer_options), max_steps=STEPS, **options,
                )  # fmt: skip
                found.setdefault(case, []).append(logs(trainer))
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
    expected, got = ranks[0][case]
    assert_same_curves(got, expected, STEPS)
