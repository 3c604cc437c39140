"""Models spread over processes (DDP, FSDP1, FSDP2, HSDP): loss and every gradient are those of one process.

Two and four CPU processes with gloo. VAR's in-batch Z spans the ranks, whose shares of the batch differ in size; one
rank's labels may all be ignored.
"""

import collections
import functools
import itertools
import math

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.ranks import Collectives, run_ranks
from var_kernels import linear_loss, var_loss
from var_kernels.integrations.hf import capture, fused_lm_head, next_labels, token_divergence
from var_kernels.integrations.hf.model import inner_model

B, T, V = 8, 10, 151
PLAIN = ("ddp", "fsdp1", "fsdp2", "fsdp2, head apart")
ADAPTED = ("ddp, adapted", "fsdp2, adapted", "fsdp2, adapted, head apart")  # LoRA on the lm_head and in the body
LAYOUTS = {
    2: PLAIN + ADAPTED,
    4: (*PLAIN, *ADAPTED, "hsdp, head apart", "hsdp, adapted"),
}  # hsdp: 2 replicas x 2 shards
LOSSES = ("var", "dpo")
# Rows of each rank: whole pairs, of unequal number. "silent": rank 1's labels are all ignored.
SHARES = {2: {"uneven": (6, 2), "silent": (4, 4)}, 4: {"uneven": (4, 2, 0, 2)}}


def make_model(layout=""):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    if "adapted" in layout:
        lora = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
    return model


def make_batch(case, sizes):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, V, (B, T), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[::3, 7:] = -100
    if case == "silent":
        labels[sizes[0] : sizes[0] + sizes[1]] = -100
    rewards = torch.randn(B, generator=generator, dtype=torch.float64)
    ref = -30 + torch.randn(B, generator=generator, dtype=torch.float64)
    weight = torch.full((B,), 2 / B, dtype=torch.float64)
    return {"input_ids": ids, "labels": labels, "rewards": rewards, "ref_logp": ref, "weight": weight}


def step(model, batch, name, group, workspace_mb=None):
    """This rank's share times the number of ranks, whose mean is the loss of the whole batch."""

    def loss_in_head(hidden, head):
        labels = next_labels(batch["labels"], hidden)
        options = {**head.logit_options, "workspace_mb": workspace_mb}
        if name == "var":
            return var_loss(
                hidden, head.lm_head_weight, labels, batch["rewards"], batch["ref_logp"], lam=0.7,
                normalizer="batch_mean", reference="mean", process_group=group, **options,
            )  # fmt: skip
        inputs, weight = {"ref_logp": batch["ref_logp"]}, batch["weight"][0::2]
        loss = linear_loss(
            "dpo", hidden, head.lm_head_weight, labels, inputs, item_weight=weight, beta=0.3, head_options=options
        )
        return loss * (1 if group is None else dist.get_world_size(group))

    (loss,), _ = capture(model, loss_in_head, {"input_ids": batch["input_ids"]}, low_rank=True)
    loss.backward()
    return loss.detach()


def wrap(model, layout, group):
    if layout.startswith("ddp"):
        return torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    if layout == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hsdp, world, inner = layout.startswith("hsdp"), dist.get_world_size(), inner_model(model)
    shape, names = ((2, world // 2), ("replicate", "shard")) if hsdp else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for module in [*inner.model.layers, *([inner.lm_head] if "apart" in layout else [])]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_gradients(model, layout):
    if layout == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {name: p.grad.clone() for name, p in model.named_parameters()}
    else:
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in grads.items()}
    clean = ("_fsdp_wrapped_module.", "module.")
    return {functools.reduce(lambda n, part: n.replace(part, ""), clean, name): g for name, g in found.items()}


def collectives(model, batch, name, group, workspace_mb):
    """[(name, bytes that this rank puts in)] of a forward and a backward."""
    with Collectives() as counted:
        step(model, batch, name, group, workspace_mb)
    return counted.sent


def rounded_output(batch, early):
    """The loss of a model that FSDP2 rounds to bf16 on its way out, its head fused before or after sharding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model().float()
    fused = fused_lm_head(model)
    try:
        if early:
            fused.apply()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
        fused = fused if early else fused.apply()
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    except ValueError as error:
        return str(error)


def distil(student, teacher, ids, labels):
    """Its teacher is another model; the gradient is that of two passes, which read its head in the backward."""
    loss = token_divergence(student, teacher, {"input_ids": ids, "labels": labels}, direction="reverse").sum()
    loss.backward()
    return loss.detach()


def another_model():
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.roll(1, 0))
    return model


def run_rank(rank, world, folder):
    group, results = dist.group.WORLD, {}
    for (case, sizes), layout, name in itertools.product(SHARES[world].items(), LAYOUTS[world], LOSSES):
        start = sum(sizes[:rank])
        batch = {key: values[start : start + sizes[rank]] for key, values in make_batch(case, sizes).items()}
        if sizes[rank] == 0:  # a last batch may leave a rank without rows: an ignored pair of weight 0 stands in
            batch = {key: values[:2].clone() for key, values in make_batch(case, sizes).items()}
            batch["labels"].fill_(-100)
            batch["weight"].fill_(0)
        model = wrap(make_model(layout), layout, group)
        loss = step(model, batch, name, group)
        dist.all_reduce(loss)
        results[case, layout, name] = loss.item() / world, whole_gradients(model, layout)
        if layout != "fsdp1" and case == "uneven":
            counts = [collectives(model, batch, name, group, mb) for mb in (0.5, 64)]
            results["collectives", layout, name] = counts
    batch = make_batch("uneven", (4, 4))
    ids, labels = (batch[name].chunk(world)[rank] for name in ("input_ids", "labels"))
    for layout in PLAIN:
        student, teacher = (wrap(model, layout, group) for model in (make_model(), another_model()))
        loss = distil(student, teacher, ids, labels)
        dist.all_reduce(loss)
        results["distil", layout] = loss.item(), whole_gradients(student, layout)
    results["rounded"] = [rounded_output(make_batch("uneven", (4, 4)), early) for early in (True, False)]
    if rank == 0:
        torch.save(results, f"{folder}/{world}.pt")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    found = {}
    for world in SHARES:
        run_ranks(run_rank, world, folder)
        found[world] = torch.load(folder / f"{world}.pt")
    return found


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("world", "case", "layout"),
    [(world, case, layout) for world, cases in SHARES.items() for case in cases for layout in LAYOUTS[world]],
)
def test_equals_one_process(worlds, world, case, layout, name):
    model, sizes = make_model(layout), SHARES[world][case]
    expected = step(model, make_batch(case, sizes), name, None).item()
    loss, gradients = worlds[world][case, layout, name]
    assert math.isclose(loss, expected, rel_tol=1e-9), (loss, expected)
    learning = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == learning.keys()
    for parameter, wanted in learning.items():
        torch.testing.assert_close(gradients[parameter], wanted, rtol=1e-9, atol=1e-11, msg=parameter)


@pytest.mark.parametrize("world", SHARES)
@pytest.mark.parametrize("layout", PLAIN)
def test_a_teacher_in_parts(worlds, layout, world):
    student, batch = make_model(), make_batch("uneven", (4, 4))
    expected = distil(student, another_model(), batch["input_ids"], batch["labels"]).item()
    loss, gradients = worlds[world]["distil", layout]
    assert math.isclose(loss, expected, rel_tol=1e-9)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name] * world, parameter.grad, rtol=1e-9, atol=1e-11, msg=name)


def shard_bytes(parameters, world):
    """What FSDP2 makes of each on a rank: rows rounded up, 8 bytes an element."""
    return sum(-(-len(p) // world) * p[0].numel() * 8 for p in parameters)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("world", "layout"), [(world, layout) for world in SHARES for layout in LAYOUTS[world] if layout != "fsdp1"]
)
def test_what_is_sent_is_what_the_docs_say(worlds, layout, name, world):
    """And the same for a budget of many tiles as for one that holds all logits."""
    model, found = make_model(layout), []
    for sent in worlds[world]["collectives", layout, name]:
        found.append(collections.Counter())
        for kind, size in sent:
            found[-1][kind] += size
    inner, everything = inner_model(model), list(model.parameters())
    learning = [parameter for parameter in everything if parameter.requires_grad]
    units = list(inner.model.layers.parameters())
    if "apart" in layout:
        units += list(inner.lm_head.parameters())
    wanted = {"allreduce_": shard_bytes(learning, 1)}
    if not layout.startswith("ddp"):  # forward: all; backward: the units that were dropped after the forward
        shards = 2 if layout.startswith("hsdp") else world
        gathered = shard_bytes(everything, shards) + shard_bytes(units, shards)
        wanted = {"_allgather_base_": gathered, "_reduce_scatter_base_": shards * shard_bytes(learning, shards)}
        if shards < world:  # between the replicas
            wanted["allreduce_"] = shard_bytes(learning, shards)
    if name == "var":
        wanted["allgather_"] = 16 * SHARES[world]["uneven"][0] + 8  # log-weights and rewards, and their number
    for counted in found:
        del counted["broadcast_"]  # DDP's buckets, once
        assert counted == wanted


def test_a_model_that_rounds_its_output_is_fused_before_it_is_sharded(worlds):
    batch = make_batch("uneven", (4, 4))
    with fused_lm_head(model := make_model()):
        expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    early, late = worlds[2]["rounded"]
    assert math.isclose(early, expected, rel_tol=2**-6)
    assert "logits are rounded to torch.bfloat16" in late
    assert "before the model is sharded" in late
