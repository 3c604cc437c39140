"""Z over the global batch: two gloo processes, unevenly split, give the weights, loss and gradients of one."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import run_ranks
from var_kernels import VARLoss, var_loss, var_weights
from var_kernels.losses import CollapsedWeightsWarning, IgnoredRewardsWarning

pytestmark = pytest.mark.filterwarnings("ignore::var_kernels.losses.CollapsedWeightsWarning")

B, T, D, V, RANKS = 7, 5, 12, 31, 2
SPLITS = {"uneven": (5, 2), "one rank empty": (7, 0)}
LAM = 0.7
BAD_VALUES = ["nan", "-inf"]  # minus infinity alone would pass for a row that is left out
WEIGHT_CASES = ["batch", "batch_mean", "group", "self_normalised", "self_normalised, groups", "cross", "cross (B,)"]


def make_batch():
    generator = torch.Generator().manual_seed(11)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.3] = -100
    labels[:, 0] = 1
    return {
        "hidden": torch.randn(B, T, D, dtype=torch.float64, generator=generator),
        "labels": labels,
        "rewards": torch.randn(B, dtype=torch.float64, generator=generator),
        "ref_logp": -10 + torch.randn(B, dtype=torch.float64, generator=generator),
        "group_ids": torch.tensor([3, 3, 9, 9, 9, 3, 9]),  # both groups live on both ranks
        "lengths": torch.randint(1, 6, (B,), generator=generator),
        "cross_logp": -10 + torch.randn(B, B, dtype=torch.float64, generator=generator),
        "cross_rewards": torch.randn(B, B, dtype=torch.float64, generator=generator),
    }


def weights_of(case, batch, rows, process_group):
    part = {name: values[rows] for name, values in batch.items()}
    options = {"lam": LAM, "process_group": process_group, "lengths": part["lengths"]}
    if case == "cross":
        return var_weights(part["cross_rewards"], part["cross_logp"], normalizer="cross", reference="mean", **options)
    if case == "cross (B,)":
        return var_weights(part["rewards"], part["cross_logp"], normalizer="cross", reference="sum", **options)
    if case.startswith("self_normalised"):
        group_ids = part["group_ids"] if "groups" in case else None
        return var_weights(part["rewards"], normalizer="self_normalised", group_ids=group_ids, **options)
    options |= {"normalizer": case, "reference": "sum"}
    return var_weights(part["rewards"], part["ref_logp"], group_ids=part["group_ids"], **options)


class Model(nn.Module):
    """A head and the VAR loss, as a user would wrap it in DistributedDataParallel."""

    def __init__(self, process_group=None):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.lm_head_weight = nn.Parameter(torch.randn(V, D, dtype=torch.float64, generator=generator))
        self.loss = VARLoss(lam=LAM, normalizer="batch_mean", reference="mean", process_group=process_group)

    def forward(self, batch):
        return self.loss(batch["hidden"], self.lm_head_weight, batch["labels"], batch["rewards"], batch["ref_logp"])


def bad_value_on(rank, process_group, value):
    """The refusal that each rank sees when only rank 1 holds the value."""
    rewards = torch.ones(2) if rank == 0 else torch.tensor([1.0, value])
    try:
        var_weights(rewards, lam=1.0, reference="none", process_group=process_group)
    except ValueError as error:
        return str(error)
    return None


def collapse_warnings(rank, process_group):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        var_weights(torch.tensor([0.0, 50.0 * rank]), lam=0.1, reference="none", process_group=process_group)
    return sum(issubclass(w.category, CollapsedWeightsWarning) for w in caught)


IGNORED = {  # of each rank: rewards, group_ids; and whether the global batch ignores them
    "one row a rank, different": ([[0.0], [1.0]], None, False),
    "one row a rank, equal": ([[1.0], [1.0]], None, True),
    "ties on one rank alone": ([[1.0, 1.0], [2.0, 2.0]], None, False),
    "a group on two ranks": ([[0.0], [1.0]], [[3], [3]], False),
    "groups of one on two ranks": ([[0.0], [1.0]], [[3], [4]], True),
    "a rank without rows": ([[0.0], []], None, True),
}


def ignored_warnings(rank, process_group, case, **options):
    rewards, ids, _ = IGNORED[case]
    ids = None if ids is None else torch.tensor(ids[rank])
    rewards = torch.tensor(rewards[rank])
    if options:
        options |= {"ref_logp": -3 * torch.arange(len(rewards)).float(), "reference": "sum"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        var_weights(rewards, lam=1.0, group_ids=ids, process_group=process_group, **options)
    return sum(issubclass(w.category, IgnoredRewardsWarning) for w in caught)


def run_rank(rank, world, folder):
    group, batch, out = dist.group.WORLD, make_batch(), {}
    for split, sizes in SPLITS.items():
        start = sum(sizes[:rank])
        rows = slice(start, start + sizes[rank])
        for case in WEIGHT_CASES:
            out[split, case] = tuple(weights_of(case, batch, rows, group))
    rows = slice(0, 5) if rank == 0 else slice(5, B)
    part = {name: values[rows] for name, values in batch.items()}
    model = nn.parallel.DistributedDataParallel(Model(group))
    loss = model(part)
    loss.backward()
    out["ddp"] = loss.detach(), model.module.lm_head_weight.grad
    hidden = part["hidden"].clone().requires_grad_()
    stats = var_loss(
        hidden, model.module.lm_head_weight.detach(), part["labels"], part["rewards"], part["ref_logp"], lam=LAM,
        normalizer="batch", reference="sum", process_group=group, return_stats=True,
    )  # fmt: skip
    stats.loss.backward()
    out["hidden"] = stats.loss.detach(), hidden.grad, stats.logp
    for value in BAD_VALUES:
        out["bad value", value] = bad_value_on(rank, group, float(value))
    out["warnings"] = collapse_warnings(rank, group)
    for case, (_, ids, _) in IGNORED.items():
        weighed = {"normalizer": "batch" if ids is None else "group"}
        out["ignored", case] = ignored_warnings(rank, group, case), ignored_warnings(rank, group, case, **weighed)
    try:
        var_weights(torch.empty(0), lam=1.0, reference="none", process_group=group)
    except ValueError as error:
        out["empty"] = str(error)
    torch.save(out, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes returned."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, RANKS, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", WEIGHT_CASES)
def test_weights_equal_those_of_one_process(ranks, case, split):
    want = weights_of(case, make_batch(), slice(None), None)
    parts = [out[split, case] for out in ranks]
    assert [len(weight) for weight, _, _ in parts] == list(SPLITS[split])
    torch.testing.assert_close(torch.cat([weight for weight, _, _ in parts]), want.weight, rtol=1e-12, atol=1e-14)
    if want.log_z.dim():
        torch.testing.assert_close(torch.cat([log_z for _, log_z, _ in parts]), want.log_z, rtol=1e-12, atol=1e-12)
    for _, log_z, ess in parts:
        torch.testing.assert_close(ess, want.ess, rtol=1e-12, atol=1e-12)
        if not want.log_z.dim():
            torch.testing.assert_close(log_z, want.log_z, rtol=1e-12, atol=1e-12)


def test_ddp_gives_the_loss_and_gradient_of_the_whole_batch(ranks):
    model, batch = Model(), make_batch()
    want = model(batch)
    want.backward()
    mean_loss = torch.stack([out["ddp"][0] for out in ranks]).mean()
    torch.testing.assert_close(mean_loss, want.detach(), rtol=1e-12, atol=1e-12)
    for out in ranks:  # DDP has averaged: the factor of 2 ranks is already in each rank's loss
        torch.testing.assert_close(out["ddp"][1], model.lm_head_weight.grad, rtol=1e-10, atol=1e-12)


def test_normaliser_of_the_own_rows_alone_would_be_noticed(ranks):
    batch = make_batch()
    for rank, rows in enumerate((slice(0, 5), slice(5, B))):
        local = weights_of("batch", batch, rows, None).weight
        assert (local - ranks[rank]["uneven", "batch"][0]).abs().max() > 0.05


def test_gradient_of_the_rows_is_that_of_one_process_times_the_ranks(ranks):
    batch, head = make_batch(), Model().lm_head_weight.detach()
    hidden = batch["hidden"].clone().requires_grad_()
    stats = var_loss(
        hidden, head, batch["labels"], batch["rewards"], batch["ref_logp"], lam=LAM, normalizer="batch",
        reference="sum", return_stats=True,
    )  # fmt: skip
    stats.loss.backward()
    got = torch.cat([out["hidden"][1] for out in ranks])
    torch.testing.assert_close(got, RANKS * hidden.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([out["hidden"][2] for out in ranks]), stats.logp)


@pytest.mark.parametrize("value", BAD_VALUES)
def test_every_rank_refuses_what_one_rank_cannot_use(ranks, value):
    assert f"rewards must be finite, got {value} at index (1,)" in ranks[1]["bad value", value]
    assert "another rank" in ranks[0]["bad value", value]


def test_a_batch_that_is_empty_everywhere_is_refused(ranks):
    assert all("at least one sequence" in out["empty"] for out in ranks)


def test_collapse_is_warned_about_once(ranks):
    assert [out["warnings"] for out in ranks] == [1, 0]


@pytest.mark.parametrize("case", IGNORED)
def test_rewards_without_effect_are_those_of_the_global_batch(ranks, case):
    """Named once, by the first rank, with and without a reference term."""
    wanted = int(IGNORED[case][2])
    assert [out["ignored", case] for out in ranks] == [(wanted, wanted), (0, 0)]
