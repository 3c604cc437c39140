"""Sequences whose tokens lie on several ranks: sums per sequence, losses and gradients are those of one process."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import run_ranks
from var_kernels import linear_logprob, linear_weighted_nll, var_weights
from var_kernels.losses import dpo_loss, sequence_lengths, sequence_sum

B, T, D, V = 6, 11, 12, 41
PARTS = {"halves": (slice(0, 4), slice(4, T)), "both ends": ([0, 1, 2, 8, 9, 10], [3, 4, 5, 6, 7])}  # ring attention's


def make_batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.3] = -100
    labels[1, 4:] = -100  # of this sequence the second half has no label
    return {
        "hidden": torch.randn(B, T, D, generator=generator, dtype=torch.float64),
        "weight": torch.randn(V, D, generator=generator, dtype=torch.float64),
        "labels": labels,
        "ref": -20 + torch.randn(B, generator=generator, dtype=torch.float64),
        "reward": torch.randn(B, generator=generator, dtype=torch.float64),
    }


def dpo(hidden, weight, labels, batch, group):
    s = sequence_sum(linear_logprob(hidden, weight, labels), labels, process_group=group)
    return dpo_loss(s[0::2], s[1::2], batch["ref"][0::2], batch["ref"][1::2], beta=0.1).mean()


def var(hidden, weight, labels, batch, group):
    """Its weights are known before; the loss is a sum over tokens, so each rank has a part of it."""
    lengths = sequence_lengths(labels, process_group=group)
    weights = var_weights(
        batch["reward"], batch["ref"], lam=0.7, normalizer="batch", reference="mean", lengths=lengths
    ).weight
    return linear_weighted_nll(hidden, weight, labels, weights.unsqueeze(1).expand(labels.shape), reduction="sum")


LOSSES = {"dpo": dpo, "var": var}


def step(name, batch, part, group):
    hidden = batch["hidden"][:, part].clone().requires_grad_()
    weight = batch["weight"].clone().requires_grad_()
    loss = LOSSES[name](hidden, weight, batch["labels"][:, part], batch, group)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def model_and_ids():
    from tests.test_sharded import make_model

    ids = torch.randint(1, 151, (2, 10), generator=torch.Generator().manual_seed(1))
    return make_model(), ids, F.pad(ids[:, 1:], (0, 1), value=-100)


class Gathered(torch.autograd.Function):
    """(B, H, T, D) of this rank -> (B, H, T * ranks, D) of all."""

    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, dwhole):
        dwhole = dwhole.contiguous()
        dist.all_reduce(dwhole)
        return dwhole.chunk(dist.get_world_size(), 2)[dist.get_rank()]


def gathered_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention of this rank's positions to those of all ranks."""
    key, value = Gathered.apply(key), Gathered.apply(value)
    own = query.shape[2]
    start = dist.get_rank() * own
    visible = torch.arange(key.shape[2]) <= torch.arange(start, start + own).unsqueeze(1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def scored(model, inputs, group):
    """Of a loss that couples the tokens of a sequence: (sums of log-probs, gradients summed over the ranks)."""
    from var_kernels.integrations.hf import token_logprobs

    s = sequence_sum(token_logprobs(model, inputs), inputs["shift_labels"], process_group=group)
    (s.square() * torch.tensor([1.0, -0.5])).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    if group is not None:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return s.detach(), gradients


def in_parts(rank, world):
    from transformers import AttentionInterface

    from var_kernels.integrations.hf.calibration import calibrate

    AttentionInterface.register("gathered", gathered_attention)
    model, ids, following = model_and_ids()
    calibrate(model)  # on a plain pass: the parts of a sequence see other ranks' tokens
    model.set_attn_implementation("gathered")
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    whole = {"input_ids": ids, "position_ids": positions, "shift_labels": following}
    size = ids.shape[1] // world
    part = slice(rank * size, (rank + 1) * size)
    return scored(model, {name: values[:, part] for name, values in whole.items()}, dist.group.WORLD)


def run_rank(rank, world, folder):
    batch = make_batch()
    results = {
        (name, part): step(name, batch, PARTS[part][rank], dist.group.WORLD) for name in LOSSES for part in PARTS
    }
    packed = batch["labels"][:, PARTS["halves"][rank]]
    offsets = torch.arange(B + 1) * packed.shape[1]
    results["lengths"] = sequence_lengths(packed.reshape(-1), cu_seqlens=offsets, process_group=dist.group.WORLD)
    if importlib.util.find_spec("transformers"):
        results["model"] = in_parts(rank, world)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    run_ranks(run_rank, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_one_process(ranks, name, part):
    loss, dhidden, dweight = step(name, make_batch(), slice(None), None)
    found = [rank[name, part] for rank in ranks]
    if name == "dpo":  # every rank has the whole loss
        assert all(torch.allclose(got[0], loss, rtol=1e-12) for got in found)
    else:
        torch.testing.assert_close(found[0][0] + found[1][0], loss, rtol=1e-12, atol=1e-12)
    for got, where in zip(found, PARTS[part], strict=True):
        torch.testing.assert_close(got[1], dhidden[:, where], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0][2] + found[1][2], dweight, rtol=1e-9, atol=1e-12)


def test_lengths_of_packed_rows_go_over_the_ranks(ranks):
    for found in ranks:
        assert torch.equal(found["lengths"], sequence_lengths(make_batch()["labels"]))


def test_a_model_with_attention_over_the_ranks_equals_one_process(ranks):
    pytest.importorskip("transformers")
    model, ids, following = model_and_ids()
    s, gradients = scored(model, {"input_ids": ids, "shift_labels": following}, None)
    for got, found in (rank["model"] for rank in ranks):
        torch.testing.assert_close(got, s, rtol=1e-7, atol=1e-7)  # the norms round to fp32
        for made, wanted in zip(found, gradients, strict=True):
            assert (made - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_shifted_labels_give_the_same_log_probs():
    pytest.importorskip("transformers")
    from var_kernels.integrations.hf import token_logprobs

    model, ids, following = model_and_ids()
    whole = token_logprobs(model, {"input_ids": ids})
    shifted = token_logprobs(model, {"input_ids": ids, "shift_labels": following})
    assert torch.equal(shifted[:, :-1], whole[:, 1:])
    assert shifted[:, -1].eq(0).all()
    with pytest.raises(ValueError, match="must have labels or shift_labels, got both"):
        token_logprobs(model, {"input_ids": ids, "labels": ids, "shift_labels": following})
