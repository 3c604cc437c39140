"""VARTrainer on two ranks (HSDP: on four): DDP, FSDP1 and FSDP2 give the losses and the weights of one process, over
epochs whose last batch is uneven; FSDP2 checkpoints, resumes and exports; what would be wrong is refused."""

import contextlib
import os

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from tests.ranks import as_accelerators, run_ranks
from tests.tiny_training import losses, tiny_model, tiny_trainer
from tests.tolerance import rms
from var_kernels.integrations.hf.heads import load_head

LOGGED = 2e-6  # losses are logged in fp32
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}
BODY = {"target_modules": "all-linear"}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
SAVED_HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
ACCUMULATED = {"gradient_accumulation_steps": 2}
TWO_EPOCHS = {"num_train_epochs": 2.0, "max_steps": -1}


def fsdp(version=2, **config):
    """sync_module_states, and FSDP1's gathering of whole weights, need a GPU."""
    plain = {"cpu_ram_efficient_loading": False, "sync_module_states": False}
    units = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": True, "fsdp_config": {"version": version, **units, **plain, **config}}


def hsdp():
    from accelerate import ParallelismConfig

    return fsdp() | {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}


# name: (layout, method, items of a rank's micro-batch, other options). 24 completions, 8 prompts or 8 pairs: batches of
# 10 leave 4 for the last, none for the second rank; of 6 leave 2, none for it; of 14 leave 10, 3 for it.
CASES = {
    "ddp var": ({}, "var", 5, TWO_EPOCHS),
    "ddp var, uneven": ({}, "var", 7, TWO_EPOCHS),
    "ddp var, accumulated": ({}, "var", 3, {**ACCUMULATED, **TWO_EPOCHS}),
    "ddp var by group": ({}, "var", 3, {"normalizer": "group", **TWO_EPOCHS}),
    "ddp sft": ({}, "sft", 3, TWO_EPOCHS),
    "ddp dpo": ({}, "dpo", 3, TWO_EPOCHS),
    "ddp kto": ({}, "kto", 5, TWO_EPOCHS),
    "ddp grpo": ({}, "grpo", 3, TWO_EPOCHS),
    "ddp awr": ({}, "awr", 5, TWO_EPOCHS),
    "ddp dpo, adapter": ({}, "dpo", 3, {"adapter": BODY, **TWO_EPOCHS}),
    "ddp var, adapted head": ({}, "var", 3, {"adapter": HEAD, **ACCUMULATED, **TWO_EPOCHS}),
    "ddp bradley_terry": ({"ddp_find_unused_parameters": False}, "bradley_terry", 3, TWO_EPOCHS),
    "fsdp2 var": (fsdp(), "var", 3, {**ACCUMULATED, **ADAM, **TWO_EPOCHS}),
    "fsdp2 var, first rank's weights": (fsdp(cpu_ram_efficient_loading=True), "var", 5, TWO_EPOCHS),
    "fsdp2 dpo, live reference": (fsdp(), "dpo", 3, {"precompute_ref_log_probs": False, **TWO_EPOCHS}),
    "fsdp2 dpo, adapter": (fsdp(), "dpo", 3, {"adapter": BODY, **TWO_EPOCHS}),
    "fsdp2 var, adapted head": (fsdp(), "var", 3, {"adapter": HEAD, **ACCUMULATED, **ADAM, **TWO_EPOCHS}),
    "fsdp2 dpo, adapted head": (
        fsdp(), "dpo", 3, {"adapter": HEAD, "precompute_ref_log_probs": False, **ACCUMULATED, **TWO_EPOCHS},
    ),
    "fsdp2 dpo, saved head": (fsdp(), "dpo", 3, {"adapter": SAVED_HEAD, **TWO_EPOCHS}),
    "fsdp2 dro": (fsdp(**SHARDED), "dro", 5, {**ADAM, **TWO_EPOCHS}),
    "fsdp2 alol": (fsdp(), "alol", 5, TWO_EPOCHS),
    "ddp distill": ({}, "distill", 3, {"direction": "jsd", **TWO_EPOCHS}),
    "fsdp2 distill": (fsdp(), "distill", 3, {**ACCUMULATED, **ADAM, **TWO_EPOCHS}),
    "fsdp2 distill, first rank's weights": (fsdp(cpu_ram_efficient_loading=True), "distill", 3, TWO_EPOCHS),
    "fsdp2 asft": (fsdp(), "asft", 3, {"kl_coef": 0.7, "sft_on": "all", **TWO_EPOCHS}),
    "fsdp2 asft, adapted head": (fsdp(), "asft", 3, {"adapter": HEAD, "kl_coef": 0.7, **TWO_EPOCHS}),
    "fsdp1 var": (fsdp(1), "var", 5, TWO_EPOCHS),
    "fsdp1 alol": (fsdp(1), "alol", 5, TWO_EPOCHS),
    "fsdp1 dpo, adapter": (fsdp(1), "dpo", 3, {"adapter": BODY, **TWO_EPOCHS}),
    "fsdp1 var, adapted head": (fsdp(1), "var", 3, {"adapter": HEAD, **ACCUMULATED, **TWO_EPOCHS}),
    "hsdp var": (hsdp(), "var", 3, {**ACCUMULATED, **TWO_EPOCHS}),
    "hsdp dpo, adapted head": (hsdp(), "dpo", 1, {"adapter": HEAD, **TWO_EPOCHS}),
}  # fmt: skip
RESUMED = ("fsdp2 var", "fsdp2 dro", "fsdp2 var, adapted head")
REFUSED = {
    "fsdp1 dro": (fsdp(1), {"method": "dro"}, "must be one without a head of its own under FSDP1"),
    "fsdp1 live": (
        fsdp(1), {"method": "dpo", "precompute_ref_log_probs": False},
        "model before training under FSDP1, which scores the data once, got precompute_ref_log_probs=False",
    ),
    "fsdp1 distill": (fsdp(1), {"method": "distill"}, "without a second model under FSDP1, got 'distill'"),
    "moving": (fsdp(), {"precompute_ref_log_probs": False, "sync_ref_model": True}, "must be False under FSDP2"),
    "uneven": ({"accelerator_config": {"even_batches": False}}, {}, "accelerator_config: even_batches must be True"),
    "dispatched": (
        {"accelerator_config": {"dispatch_batches": True}}, {}, "accelerator_config: dispatch_batches must be False",
    ),
}  # fmt: skip


def world_of(name):
    return 4 if name.startswith("hsdp") else 2


def dtype_of(name):
    return torch.float32 if name.startswith("fsdp1") else torch.float64  # FSDP1 clips in fp32


def trainer_of(name, folder, size, layout, weightless=False, **more):
    _, method, _, options = CASES[name]
    settings = {"method": method, "per_device_train_batch_size": size, **options, **layout, **more}
    others, weights = {}, [tiny_model(dtype=dtype_of(name))]
    if method == "distill":
        weights.append(tiny_model(1, dtype=dtype_of(name)))
        others = {"trainer_options": {"ref_model": weights[1]}}
    if adapter := settings.pop("adapter", None):
        from peft import LoraConfig

        torch.manual_seed(0)
        lora = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **adapter)
        others = {"trainer_options": {"peft_config": lora}}
    if weightless:  # what from_pretrained leaves on all ranks but the first
        with torch.no_grad():
            for parameter in (p for model in weights for p in model.parameters()):
                parameter.fill_(torch.nan)
    return tiny_trainer(folder, model=weights[0], **others, **settings)


def whole_weights(trainer):
    if trainer.accelerator.distributed_type == "FSDP" and not hasattr(next(trainer.model.parameters()), "full_tensor"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(trainer.model, writeback=False):
            return [p.detach().clone() for p in trainer.model.parameters()]
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in trainer.model.parameters()]


def train(name, folder, rank):
    layout, _, size, _ = CASES[name]
    saving = {"save_strategy": "steps", "save_steps": 2} if name in RESUMED else {}
    weightless = "first rank's" in name and rank > 0
    trainer = trainer_of(name, folder, size, layout, weightless, ddp_backend="gloo", **saving)
    trainer.train()
    weights = whole_weights(trainer)
    results = {"losses": losses(trainer), "weights": weights, "history": trainer.state.log_history[:2]}
    if name in RESUMED:
        trainer.save_model()
        results["files"] = sorted(os.listdir(folder / "run" / "checkpoint-2"))
        resumed = trainer_of(name, folder, size, layout, ddp_backend="gloo", **saving)
        resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
        results["resumed"] = losses(resumed), whole_weights(resumed)
    return results


def refusal(layout, options, folder):
    try:
        tiny_trainer(folder, ddp_backend="gloo", **options, **layout)
    except ValueError as error:
        return str(error)
    return None


def run_rank(rank, world, folder):
    results = {}
    for number, (name, (layout, *_)) in enumerate(CASES.items()):
        if world_of(name) == world:
            with as_accelerators() if "fsdp" in layout else contextlib.nullcontext():
                results[name] = train(name, folder / str(number), rank)
    if world == 2:
        with as_accelerators():
            for name, (layout, options, _) in REFUSED.items():
                results[name] = refusal(layout, options, folder / "refused")
    torch.save(results, folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Each rank's results: the first two of two and of four."""
    folder, found = tmp_path_factory.mktemp("layouts"), [{}, {}]
    for world in (2, 4):
        run_ranks(run_rank, world, folder)
        for rank in range(2):
            found[rank] |= torch.load(folder / f"{world}-{rank}.pt", weights_only=False)
    return folder, found


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name, tmp_path):
    single = trainer_of(name, tmp_path, world_of(name) * CASES[name][2], {})
    before = [parameter.detach().clone() for parameter in single.model.parameters()]
    single.train()
    # the heads beside the lm_head are fp32
    exact = dtype_of(name) == torch.float64 and CASES[name][1] not in ("bradley_terry", "dro")
    for found in ranks[1]:
        assert found[name]["losses"] == pytest.approx(losses(single), rel=LOGGED if exact else 5e-6, abs=1e-7)
        for made, wanted, start in zip(found[name]["weights"], single.model.parameters(), before, strict=True):
            if exact:
                torch.testing.assert_close(made, wanted.detach(), rtol=1e-9, atol=1e-11)
            else:
                # factors of an adapter, trained in fp32 by one process, are up to 4e-4 of their change from fp64's
                error, change = rms(made - wanted.detach()), rms(wanted.detach() - start)
                assert error <= max(1e-3 * change, 1e-7 * rms(start))
    keys = ("ess", "log_z", "weight_entropy", "reward_mean", "kl_to_ref", "logp_minus_ref", "nll_per_token")
    for logged, expected in zip(ranks[1][0][name]["history"], single.state.log_history, strict=False):
        for key in (*keys, "pair_accuracy", "token_accuracy", "weighted_reward"):
            if key in expected:
                assert logged[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", RESUMED)
def test_a_sharded_run_resumes_to_the_same_losses(ranks, name):
    for found in ranks[1]:
        resumed, weights = found[name]["resumed"]
        assert resumed == found[name]["losses"]
        for made, wanted in zip(weights, found[name]["weights"], strict=True):
            assert torch.equal(made, wanted)


@pytest.mark.parametrize("name", RESUMED)
def test_the_whole_model_is_exported(ranks, name):
    from transformers import AutoModelForCausalLM

    folder, (found, _) = ranks
    run = folder / str(list(CASES).index(name)) / "run"
    assert ("pytorch_model_fsdp_0" in found[name]["files"]) == ("SHARDED_STATE_DICT" in str(CASES[name][0]))
    weights = found[name]["weights"]
    if "adapted" in name:
        from peft import PeftModel

        model = PeftModel.from_pretrained(tiny_model(), run)
    else:
        model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float64)
    if name == "fsdp2 dro":
        head = load_head(run)
        for made, wanted in zip(head.parameters(), weights[-2:], strict=True):
            assert torch.equal(made, wanted)
        assert head.weight.abs().max() > 0
        weights = weights[:-2]
    for made, wanted in zip(model.parameters(), weights, strict=True):
        assert torch.equal(made, wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(ranks, name):
    for found in ranks[1]:
        assert REFUSED[name][2] in str(found[name])
