"""VARTrainer under DeepSpeed ZeRO-2 and ZeRO-3 on two CPU ranks: the losses and the weights of one process; the head is
gathered as often for many tiles of logits as for one."""

import collections
import contextlib
import os

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig

from tests.ranks import Collectives, as_accelerators, compile_nothing, run_ranks
from tests.tiny_training import ROWS, losses, tiny_config, tiny_model, tokenizer
from tests.tolerance import rms
from var_kernels.integrations.trainer import VARTrainer

HEAD = {"target_modules": ["q_proj", "lm_head"]}
SAVED_HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
ACCUMULATED = {"gradient_accumulation_steps": 2}
TWO_EPOCHS = {"num_train_epochs": 2.0, "max_steps": -1}
# name: (stage, method, items of a rank's micro-batch, options); "zero.Init": the weights are in parts from the start
CASES = {
    "2 var": (2, "var", 3, {"gradient_accumulation_steps": 2, **TWO_EPOCHS}),
    "2 dpo, live reference": (2, "dpo", 3, {"precompute_ref_log_probs": False, **TWO_EPOCHS}),
    "2 distill": (2, "distill", 3, TWO_EPOCHS),
    "3 var, zero.Init": (3, "var", 3, {"gradient_accumulation_steps": 2, **TWO_EPOCHS}),
    "3 dpo": (3, "dpo", 3, TWO_EPOCHS),
    "3 alol": (3, "alol", 5, TWO_EPOCHS),
    "3 var, adapted head": (3, "var", 3, {"adapter": HEAD, **ACCUMULATED, **TWO_EPOCHS}),
    "3 dpo, adapter": (3, "dpo", 3, {"adapter": {"target_modules": "all-linear"}, **TWO_EPOCHS}),
    "3 dpo, saved head": (3, "dpo", 3, {"adapter": SAVED_HEAD, **TWO_EPOCHS}),
}
RESUMED = "3 var, zero.Init"
COUNTED = ("2 dpo, live reference", "3 dpo", "3 var, adapted head")


def settings(stage):
    zero = {"stage": stage}
    if stage == 3:
        # drop each weight after its use, as in a model larger than these limits
        limits = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
        zero |= {f"stage3_{limit}": 0 for limit in limits} | {"stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    untested = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # SGD
    return {"zero_optimization": zero, **dict.fromkeys(sizes, "auto"), **untested}


def trainer_of(name, folder, size, **layout):
    _, method, _, options = CASES[name]
    options = dict(options)
    adapter = options.pop("adapter", None)
    config = tiny_config(folder, method=method, per_device_train_batch_size=size, **options, **layout)
    if "zero.Init" in name:  # from_pretrained asks the configuration that is alive
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder.parent / "model", dtype=torch.float32)
    else:
        model = tiny_model(dtype=torch.float32)
    torch.manual_seed(0)
    lora = adapter and LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **adapter)
    teacher = tiny_model(1, dtype=torch.float32) if method == "distill" else None
    return VARTrainer(model, config, ROWS, processing_class=tokenizer(), peft_config=lora, ref_model=teacher)


def whole_weights(trainer):
    from deepspeed import zero

    parameters = list(trainer.model.parameters())
    gather = zero.GatheredParameters(parameters) if hasattr(parameters[0], "ds_id") else contextlib.nullcontext()
    with gather:
        return [p.detach().clone() for p in parameters]


def collectives(trainer, batch, workspace_mb):
    """Of a forward and a backward."""
    trainer.args.workspace_mb = workspace_mb
    with Collectives() as counted:
        trainer.training_step(trainer.model_wrapped, dict(batch))
    return counted.sent


def train(name, folder):
    stage, _, size, _ = CASES[name]
    saving = {"save_strategy": "steps", "save_steps": 2} if name == RESUMED else {}
    options = {"deepspeed": settings(stage), "use_cpu": False, "ddp_backend": "gloo", **saving}
    trainer = trainer_of(name, folder, size, **options)
    in_parts = next(trainer.model.parameters()).numel() == 0
    trainer.train()
    results = {"losses": losses(trainer), "weights": whole_weights(trainer), "in parts": in_parts}
    if name == RESUMED:
        trainer.save_model()
        resumed = trainer_of(name, folder, size, **options)
        resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
        results["resumed"] = losses(resumed)
    if name in COUNTED:
        batch = trainer.data_collator([trainer.train_dataset[0]])
        results["collectives"] = [collectives(trainer, batch, mb) for mb in (0.02, 64)]
    return results


def refusal(folder):
    options = {"deepspeed": settings(3), "use_cpu": False, "ddp_backend": "gloo"}
    try:
        trainer_of("2 distill", folder, 3, **options)
    except ValueError as error:
        return str(error)
    return None


def run_rank(rank, world, folder):
    compile_nothing()
    results = {}
    with as_accelerators():
        for number, name in enumerate(CASES):
            results[name] = train(name, folder / str(number))
        results["refused"] = refusal(folder / "refused")
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_model(dtype=torch.float32).save_pretrained(folder / "model")
    run_ranks(run_rank, 2, folder)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name, tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    single = trainer_of(name, tmp_path / "one", 2 * CASES[name][2])
    before = [parameter.detach().clone() for parameter in single.model.parameters()]
    single.train()
    for found in ranks[1]:
        assert found[name]["losses"] == pytest.approx(losses(single), rel=1e-5, abs=1e-6)
        for made, wanted, start in zip(found[name]["weights"], single.model.parameters(), before, strict=True):
            error, change = rms(made - wanted.detach()), rms(wanted.detach() - start)
            assert error <= max(1e-4 * change, 1e-7 * rms(start))


def test_a_teacher_that_would_be_whole_is_refused(ranks):
    for found in ranks[1]:
        assert "must be one without a second model under ZeRO-3" in found["refused"]


def test_weights_are_in_parts_from_the_start(ranks):
    assert [found[RESUMED]["in parts"] for found in ranks[1]] == [True, True]


def test_the_run_resumes_to_the_same_losses(ranks):
    for found in ranks[1]:
        assert found[RESUMED]["resumed"] == found[RESUMED]["losses"]


def test_the_whole_model_is_exported(ranks):
    from transformers import AutoModelForCausalLM

    folder, (found, _) = ranks
    run = folder / str(list(CASES).index(RESUMED)) / "run"
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    for made, wanted in zip(model.parameters(), found[RESUMED]["weights"], strict=True):
        assert torch.equal(made, wanted)


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_sent_is_what_the_docs_say(ranks, name, tmp_path):
    """ZeRO-3: all weights gathered in the forward and once more in the backward, whatever the number of tiles; in the
    backward not those in front of the first that learns."""
    weights = dict(trainer_of(name, tmp_path, 1).model.named_parameters())
    total = sum(weight.nbytes for weight in weights.values())
    learning = [key for key in weights if weights[key].requires_grad]
    in_front = ("embed_tokens.", "0.input_layernorm.", "0.self_attn.q_proj.base", "0.self_attn.k", "0.self_attn.v")
    unread = [key for key in weights if any(part in key for part in in_front) and key not in learning]
    for found in ranks[1]:
        small, large = found[name]["collectives"]
        assert small == large
        sent = collections.Counter()
        for kind, size in small:
            sent[kind] += size * (size > 8)  # norms and overflow flags apart
        if name.startswith("2"):
            assert sent == {"allreduce_": total, "_allgather_base_": total // 2}
            continue
        assert sent["_allgather_base_"] == (2 * total - sum(weights[key].nbytes for key in unread)) // 2
        assert sent["_reduce_scatter_base_"] == sum(weights[key].nbytes for key in learning)
