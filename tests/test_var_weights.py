"""var_weights: numbers to check by hand, the naive twin, identities, limits, and what it refuses."""

import math
import warnings

import pytest
import torch

from var_kernels import var_weights
from var_kernels.losses import (
    CollapsedWeightsWarning,
    IgnoredRewardsWarning,
    effective_sample_size,
    warn_if_collapsed,
)
from var_kernels.losses.weights import NORMALIZERS, REFERENCES
from var_kernels.reference import var_weights_ref

pytestmark = pytest.mark.filterwarnings("ignore::var_kernels.losses.CollapsedWeightsWarning")

FP32 = 2**-17  # the house's tier for fp32 results, times max(1, max|ref|)
LOG2, LOG3 = math.log(2), math.log(3)
NAN, INF = math.nan, math.inf


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def assert_close(got, want, tolerance=1e-12):
    want = torch.as_tensor(want, dtype=torch.float64)
    assert (got.double() - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


# exp(a) = 1, 3, 4 throughout: sum 8, mean 8/3
HAND = {
    "batch": ({}, [1 / 8, 3 / 8, 4 / 8], math.log(8), 64 / 26),
    "batch_mean": ({}, [3 / 8, 9 / 8, 12 / 8], math.log(8 / 3), 64 / 26),
    "group": ({"group_ids": torch.tensor([7, -2, 7])}, [1 / 5, 1, 4 / 5], [math.log(5), LOG3, math.log(5)], 4 / 1.68),
}


@pytest.mark.parametrize("normalizer", HAND)
def test_weights_by_hand(normalizer):
    options, weight, log_z, ess = HAND[normalizer]
    # a = log pi_ref + r / lam with lam = 1/2: 0 + 0, log 3 - 2 log 2 + 2 log 2, 0 + 2 log 2
    rewards, ref_logp = tensor(0.0, LOG2, LOG2), tensor(0.0, LOG3 - 2 * LOG2, 0.0)
    got = var_weights(rewards, ref_logp, lam=0.5, normalizer=normalizer, reference="sum", **options)
    assert_close(got.weight, weight)
    assert_close(got.log_z, log_z)
    assert_close(got.ess, ess)


def test_cross_by_hand():
    # exp(a_ij) = [[1, 3], [2, 2]]
    scores = tensor(1.0, 3.0, 2.0, 2.0).log().view(2, 2)
    got = var_weights(torch.zeros(2, 2, dtype=torch.float64), scores, lam=1.0, normalizer="cross", reference="sum")
    assert_close(got.weight, [1 / 4, 1 / 2])
    assert_close(got.log_z, [math.log(4), math.log(4)])
    # the same from rewards (B,): those of the columns, whatever the prompt
    rewards = tensor(LOG2, 0.0)
    got = var_weights(rewards, scores - rewards, lam=1.0, normalizer="cross", reference="sum")
    assert_close(got.weight, [1 / 4, 1 / 2])


def test_self_normalised_by_hand():
    rewards = tensor(0.0, LOG3, 0.0)
    got = var_weights(rewards, lam=1.0, normalizer="self_normalised")  # exp: 1, 3, 1; mean 5/3
    assert_close(got.weight, [3 / 5, 9 / 5, 3 / 5])
    assert_close(got.log_z, math.log(5 / 3))
    got = var_weights(rewards, lam=1.0, normalizer="self_normalised", group_ids=torch.tensor([0, 0, 1]))
    assert_close(got.weight, [1 / 2, 3 / 2, 1])
    assert_close(got.log_z, [LOG2, LOG2, 0.0])


def test_pair_is_the_sigmoid_of_the_margin():
    generator = torch.Generator().manual_seed(0)
    rewards, ref_logp = torch.randn(2, 8, 2, dtype=torch.float64, generator=generator)  # (P, 2) each
    lam = 0.7
    got = var_weights(
        rewards.flatten(),
        ref_logp.flatten(),
        lam=lam,
        normalizer="group",
        reference="sum",
        group_ids=torch.arange(8).repeat_interleave(2),
    )
    chosen = torch.sigmoid((rewards[:, 0] - rewards[:, 1]) / lam + ref_logp[:, 0] - ref_logp[:, 1])
    assert_close(got.weight.view(8, 2), torch.stack([chosen, 1 - chosen], -1))


def random_batch(b=13, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "rewards": torch.randn(b, generator=generator).to(dtype),
        "ref_logp": (-300 + 40 * torch.randn(b, generator=generator)).to(dtype),
        "cross_logp": (-300 + 40 * torch.randn(b, b, generator=generator)).to(dtype),
        "cross_rewards": torch.randn(b, b, generator=generator).to(dtype),
        "lengths": torch.randint(1, 90, (b,), generator=generator),
        "group_ids": torch.randint(0, 4, (b,), generator=generator),
    }


COMBINATIONS = [(n, r) for n in NORMALIZERS for r in REFERENCES if n != "self_normalised" or r == "none"]


def arguments(batch, normalizer, reference):
    cross = normalizer == "cross"
    return (batch["cross_rewards" if cross else "rewards"], batch["cross_logp" if cross else "ref_logp"]), {
        "normalizer": normalizer,
        "reference": reference,
        "lengths": batch["lengths"],
        "group_ids": batch["group_ids"],
    }


@pytest.mark.parametrize(("normalizer", "reference"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equal_to_the_naive_twin(normalizer, reference, dtype):
    batch = random_batch(dtype=dtype)
    batch["lengths"][4] = 0  # left out of Z
    positional, options = arguments(batch, normalizer, reference)
    got = var_weights(*positional, lam=0.8, **options)
    weight, log_z, ess = var_weights_ref(*positional, lam=0.8, **options)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in got} == {out_dtype}
    tolerance = 1e-12 if out_dtype == torch.float64 else FP32
    assert_close(got.weight, weight, tolerance)
    assert_close(got.log_z, log_z if got.log_z.dim() else log_z[0], tolerance)
    assert_close(got.ess, ess, tolerance)
    assert got.weight[4] == 0


@pytest.mark.parametrize(("normalizer", "reference"), COMBINATIONS)
def test_identities(normalizer, reference):
    batch = random_batch(dtype=torch.float64)
    positional, options = arguments(batch, normalizer, reference)
    got = var_weights(*positional, lam=0.8, **options)
    # a reward known up to a constant gives the same weights, and log Z moves by constant / lam
    shifted = var_weights(positional[0] + 3.0, positional[1], lam=0.8, **options)
    assert_close(shifted.weight, got.weight, 1e-10)
    assert_close(shifted.log_z, got.log_z + 3.0 / 0.8, 1e-10)
    # rewards and lam in other units
    assert_close(var_weights(positional[0] * 10, positional[1], lam=8.0, **options).weight, got.weight, 1e-10)
    b, groups = 13, batch["group_ids"].unique().numel()
    total = {"batch": 1, "batch_mean": b, "group": groups, "self_normalised": b, "cross": None}[normalizer]
    if total is not None:
        assert_close(got.weight.sum(), total, 1e-10)


def test_estimators_agree_where_they_must():
    batch = random_batch(dtype=torch.float64)
    rewards, ref_logp = batch["rewards"], batch["ref_logp"]
    one_group = torch.full((13,), 5)
    summed = {"lam": 0.8, "reference": "sum"}
    plain = var_weights(rewards, ref_logp, normalizer="batch", **summed)
    assert_close(var_weights(rewards, ref_logp, normalizer="group", group_ids=one_group, **summed).weight, plain.weight)
    assert_close(var_weights(rewards, ref_logp, normalizer="batch_mean", **summed).weight, 13 * plain.weight)
    same_prompt = ref_logp.expand(13, 13)  # a_ij does not depend on i
    assert_close(var_weights(rewards, same_prompt, normalizer="cross", **summed).weight, plain.weight)
    free = var_weights(rewards, lam=0.8, normalizer="batch_mean", reference="none")
    assert_close(var_weights(rewards, lam=0.8, normalizer="self_normalised").weight, free.weight)
    with pytest.warns(IgnoredRewardsWarning):
        each_its_own = var_weights(rewards, ref_logp, normalizer="group", group_ids=torch.arange(13), **summed)
    assert_close(each_its_own.weight, torch.ones(13))  # nothing to compare with: plain SFT


def test_order_of_rows_does_not_matter():
    batch = random_batch(dtype=torch.float64)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    options = {"lam": 0.8, "normalizer": "group", "reference": "mean"}
    columns = ("lengths", "group_ids")
    got = var_weights(batch["rewards"], batch["ref_logp"], **options, **{c: batch[c] for c in columns})
    moved = var_weights(
        batch["rewards"][order], batch["ref_logp"][order], **options, **{c: batch[c][order] for c in columns}
    )
    assert_close(moved.weight, got.weight[order])


def test_limits_of_lam():
    batch = random_batch(dtype=torch.float64)
    rewards, ref_logp, ids = batch["rewards"], batch["ref_logp"] / 100, batch["group_ids"]
    # lam -> infinity: the reward no longer counts, pi* -> pi_ref
    with pytest.warns(IgnoredRewardsWarning):
        far = var_weights(rewards, ref_logp, lam=1e12, normalizer="batch", reference="sum")
    assert_close(far.weight, ref_logp.softmax(0), 1e-9)
    with pytest.warns(IgnoredRewardsWarning):
        far = var_weights(rewards, lam=math.inf)
    assert_close(far.weight, torch.ones(13))
    # lam -> 0: all weight on the best response of each group
    got = var_weights(rewards, ref_logp, lam=1e-9, normalizer="group", reference="sum", group_ids=ids).weight
    best = torch.stack([(rewards == rewards[ids == i].max()).double() for i in ids.unique()]).sum(0)
    assert_close(got, best)


def test_cross_turns_into_sft_when_each_response_fits_its_own_prompt_only():
    # what responses to unrelated prompts look like: a_ii is far above a_ij
    scores = torch.full((6, 6), -400.0).fill_diagonal_(-200.0)
    got = var_weights(torch.randn(6), scores, lam=0.5, normalizer="cross", reference="sum")
    assert_close(got.weight, torch.ones(6))


@pytest.mark.parametrize("normalizer", ["batch", "group", "self_normalised"])
def test_huge_numbers_do_not_overflow(normalizer):
    rewards = torch.tensor([1e30, -1e30, 1e30])
    got = var_weights(
        rewards, torch.tensor([-1e6, 0.0, -1e6]), lam=1e-6, normalizer=normalizer,
        reference="none" if normalizer == "self_normalised" else "sum",
        group_ids=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    assert_close(got.weight, torch.tensor([0.5, 0.0, 0.5]) * (3 if normalizer == "self_normalised" else 1))
    assert_close(got.ess, 2.0)


def test_rows_of_length_zero_have_no_part():
    rewards, ref_logp = tensor(0.3, 9.0, -0.2), tensor(-1.0, 0.0, -2.0)
    options = {"lam": 0.5, "normalizer": "batch_mean", "reference": "sum"}
    got = var_weights(rewards, ref_logp, lengths=torch.tensor([4, 0, 6]), **options)
    kept = torch.tensor([0, 2])
    want = var_weights(rewards[kept], ref_logp[kept], **options)
    assert_close(got.weight[kept], want.weight)
    assert got.weight[1] == 0
    assert_close(got.log_z, want.log_z)
    assert_close(got.ess, want.ess)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_batch_of_fillers_only_has_weight_zero(normalizer):
    scores = torch.zeros(2, 2) if normalizer == "cross" else torch.zeros(2)
    reference = "none" if normalizer == "self_normalised" else "sum"
    zeros = torch.zeros(2, dtype=torch.int64)
    got = var_weights(
        torch.zeros(2), scores, lam=1.0, normalizer=normalizer, reference=reference, lengths=zeros, group_ids=zeros
    )
    assert got.weight.tolist() == [0, 0]
    assert got.ess == 0


def test_detached_and_strided():
    batch = random_batch()
    rewards = batch["rewards"].repeat_interleave(2).requires_grad_()[::2]
    ref_logp = batch["ref_logp"].clone().requires_grad_()
    options = {"lam": 0.8, "normalizer": "batch", "reference": "sum"}
    got = var_weights(rewards, ref_logp, **options)
    assert not any(t.requires_grad for t in got)
    assert_close(got.weight, var_weights(batch["rewards"], batch["ref_logp"], **options).weight)


def test_ess_by_hand():
    assert_close(effective_sample_size(tensor(2.0, 2.0, 2.0)), 3.0)
    assert_close(effective_sample_size(tensor(0.0, 5.0)), 1.0)
    assert_close(effective_sample_size(tensor(1.0, 3.0)), 1.6)
    assert_close(effective_sample_size(tensor(1e-200, 3e-200)), 1.6)  # squares underflow
    # groups: the harmonic mean of their own, times their number
    batch = random_batch(dtype=torch.float64)
    ids = batch["group_ids"]
    got = var_weights(batch["rewards"], lam=0.5, normalizer="group", reference="none", group_ids=ids)
    own = torch.stack([effective_sample_size(got.weight[ids == i]) for i in ids.unique()])
    assert_close(got.ess / len(own), 1 / (1 / own).mean())


# -- collapse ------------------------------------------------------------------------------------------------------


COLLAPSED = {  # each once collapsed, once not: (rewards, options)
    "one batch": (torch.arange(32.0), {"normalizer": "batch", "reference": "none"}, 0.1, 100.0),
    # every one of 4 groups one-hot has an ess of 4 of 32: only a share that knows the groups can tell
    "groups": (
        torch.arange(8.0).repeat(4),
        {"normalizer": "group", "reference": "none", "group_ids": torch.arange(32) // 8},
        0.1,
        100.0,
    ),
    "self-normalised": (torch.arange(32.0), {"normalizer": "self_normalised"}, 0.1, 100.0),
}


@pytest.mark.parametrize("case", COLLAPSED)
def test_collapse_is_warned_about_on_the_cpu(case):
    rewards, options, low, high = COLLAPSED[case]
    with pytest.warns(CollapsedWeightsWarning, match=r"effective sample size about.*groups?.*Raise lam.$"):
        var_weights(rewards, lam=low, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        var_weights(rewards, lam=high, **options)


def test_summed_reference_of_real_size_collapses_for_every_lam():
    batch, options = random_batch(b=32), {"normalizer": "batch", "reference": "sum"}
    for lam in (0.1, 1.0, 10.0, 100.0):
        with pytest.warns(CollapsedWeightsWarning, match=r"reference='sum'.*Take reference='mean' or 'none'"):
            assert var_weights(batch["rewards"], batch["ref_logp"], lam=lam, **options).ess < 3


def test_nothing_to_collapse_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapsedWeightsWarning)
        var_weights(torch.ones(1), lam=1.0, reference="none")
        var_weights(torch.arange(4.0), lam=0.01, normalizer="group", reference="none", group_ids=torch.arange(4))


def test_warning_threshold_and_repetition():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(50):
            assert warn_if_collapsed(torch.tensor(4.05), 32)
        assert not warn_if_collapsed(4.15, 32)
        assert warn_if_collapsed(4 * 1.65, 32, 4)
        assert not warn_if_collapsed(4 * 1.75, 32, 4)
    assert len(caught) == 2  # fifty equal ones are shown once


# -- rewards without effect ----------------------------------------------------------------------------------------

ALONE, EQUAL, FAR = "has one sequence", "they are equal within", "differ by less than 0.001 lam"
IGNORED = {  # rewards, options, what the warning says
    "a batch of one": ([0.3], {}, f"the batch {ALONE}"),
    "a batch of one, with the reference": (
        [0.3], {"normalizer": "batch", "reference": "mean", "lengths": torch.tensor([3])}, f"the batch {ALONE}",
    ),
    "one row that carries loss": ([0.3, 9.0], {"lengths": torch.tensor([4, 0])}, f"the batch {ALONE}"),
    "a completion a prompt": ([1.0, 2.0, 3.0], {"group_ids": torch.arange(3)}, f"every group {ALONE}"),
    "a completion a prompt, group": (
        [1.0, 2.0, 3.0], {"normalizer": "group", "reference": "none", "group_ids": torch.arange(3)},
        f"every group {ALONE}",
    ),
    "all but one masked in each prompt": (
        [1.0, 2.0, 3.0, 4.0], {"group_ids": torch.tensor([0, 0, 1, 1]), "lengths": torch.tensor([0, 3, 3, 0])},
        f"every group {ALONE}",
    ),
    "equal in every prompt": ([1.0, 1.0, 5.0, 5.0], {"group_ids": torch.tensor([0, 0, 1, 1])}, f"{EQUAL} every group"),
    "one alone, the others equal": ([1.0, 1.0, 5.0], {"group_ids": torch.tensor([0, 0, 1])}, f"{EQUAL} every group"),
    "equal in the batch": ([2.0, 2.0, 2.0], {"normalizer": "batch_mean", "reference": "none"}, f"{EQUAL} the batch"),
    "a huge lam": ([0.0, 1.0], {"lam": 1e6}, f"{FAR}, lam=1e.06"),
    "an infinite lam": ([0.0, 1.0], {"lam": INF}, FAR),
    "cross": ([2.0, 2.0], {"normalizer": "cross", "reference": "none"}, f"{EQUAL} the batch"),
    "cross, differing between prompts alone": (
        [[1.0, 1.0], [5.0, 5.0]], {"normalizer": "cross", "reference": "none"}, f"{EQUAL} the batch",
    ),
}  # fmt: skip
HEARD = {  # id: rewards and options that do move a weight
    "one group that differs": ([1.0, 1.0, 5.0, 5.1], {"group_ids": torch.tensor([0, 0, 1, 1])}),
    "a lam that is large": ([0.0, 1.0], {"lam": 100.0}),
    "cross": ([[1.0, 1.0], [5.0, 6.0]], {"normalizer": "cross", "reference": "none"}),
    "ids that batch does not read": ([1.0, 2.0], {"normalizer": "batch", "group_ids": torch.arange(2)}),
    "fillers alone": ([1.0, 2.0], {"lengths": torch.zeros(2, dtype=torch.int64)}),
}


@pytest.mark.parametrize("case", IGNORED)
def test_rewards_without_effect_are_warned_about(case):
    """And have none: other rewards of the same kind give the same weights."""
    rewards, options, message = IGNORED[case]
    rewards = torch.tensor(rewards, dtype=torch.float64)
    weighed = options.get("reference") == "mean"
    ref_logp = torch.full((1,), -3.0, dtype=torch.float64) if weighed else None
    with pytest.warns(IgnoredRewardsWarning, match=message):
        got = var_weights(rewards, ref_logp, **{"lam": 1.0, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = var_weights(rewards * 0, ref_logp, **{"lam": 1.0, **options})
    assert_close(got.weight, zero.weight, 1e-3)


@pytest.mark.parametrize("case", HEARD)
def test_rewards_with_an_effect_are_not(case):
    rewards, options = HEARD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", IgnoredRewardsWarning)
        var_weights(torch.tensor(rewards), **{"lam": 1.0, **options})


def test_the_warning_stands_at_the_caller_and_does_not_repeat():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            var_weights(torch.ones(2), lam=1.0)
    assert [entry.filename for entry in caught] == [__file__]


def test_metadata_tells_of_one_row_where_values_are_not_read():
    with pytest.warns(IgnoredRewardsWarning, match="the batch has one sequence"):
        var_weights(torch.ones(1, device="meta"), lam=1.0)


# -- refusals ------------------------------------------------------------------------------------------------------

REFUSED = {  # id: (error, words of the message, rewards, ref_logp, options)
    "lam 0": (ValueError, "lam must be > 0", [1.0, 2.0], None, {"lam": 0}),
    "lam negative": (ValueError, "negate the rewards", [1.0, 2.0], None, {"lam": -1.0}),
    "lam NaN": (ValueError, "lam must be > 0", [1.0, 2.0], None, {"lam": NAN}),
    "lam a tensor": (TypeError, "lam=float", [1.0, 2.0], None, {"lam": torch.tensor(1.0)}),
    "unknown normalizer": (ValueError, "normalizer must be one of", [1.0, 2.0], None, {"normalizer": "softmax"}),
    "unknown reference": (ValueError, "reference must be one of", [1.0, 2.0], None, {"reference": "median"}),
    "sum without ref_logp": (ValueError, "ref_logp must be given", [1.0, 2.0], None, {"reference": "sum"}),
    "a reference that nothing reads": (
        ValueError, "reference must be given with ref_logp, got None.*normalizer='group' or 'batch' with",
        [1.0, 2.0], [-1.0, -2.0], {"reference": None},
    ),
    "mean without lengths": (ValueError, "lengths must be given", [1.0, 2.0], [-1.0, -2.0], {"reference": "mean"}),
    "group without ids": (ValueError, "group_ids must be given", [1.0, 2.0], None, {"normalizer": "group"}),
    "self_normalised with sum": (
        ValueError, "must be 'none'", [1.0, 2.0], [-1.0, -2.0], {"normalizer": "self_normalised", "reference": "sum"},
    ),
    "NaN reward": (ValueError, r"rewards must be finite, got nan at index \(1,\)", [1.0, NAN], None, {}),
    "infinite reward": (ValueError, "rewards must be finite, got -inf", [-INF, 1.0], None, {}),
    "NaN ref_logp": (ValueError, "ref_logp must be finite", [1.0, 2.0], [NAN, -1.0], {"reference": "sum"}),
    "overflow": (ValueError, "overflows at lam", [1e300, 2e300], None, {"lam": 1e-20}),
    "empty batch": (ValueError, "at least one sequence", [], None, {}),
    "rewards a list": (TypeError, "rewards must be a floating-point tensor", "list", None, {}),
    "rewards integers": (TypeError, r"rewards.float\(\)", torch.tensor([1, 0]), None, {}),
    "rewards (P, K)": (ValueError, "group_ids", [[1.0, 2.0], [3.0, 4.0]], None, {}),
    "ref_logp too long": (ValueError, "ref_logp must be", [1.0, 2.0], [-1.0] * 3, {"reference": "sum"}),
    "ref_logp per token": (ValueError, "sequence_sum", [1.0, 2.0], [[-1.0] * 3] * 2, {"reference": "sum"}),
    "ref_logp (B,) for cross": (
        ValueError, r"\(2, 2\)", [1.0, 2.0], [-1.0, -2.0], {"normalizer": "cross", "reference": "sum"},
    ),
    "lengths a list": (TypeError, "lengths must be an integer tensor", [1.0, 2.0], None, {"lengths": [1, 2]}),
    "lengths floating": (TypeError, "lengths.*long", [1.0, 2.0], None, {"lengths": torch.ones(2)}),
    "lengths negative": (ValueError, "lengths must be >= 0", [1.0, 2.0], None, {"lengths": torch.tensor([1, -1])}),
    "group_ids too short": (
        ValueError, "group_ids must be", [1.0, 2.0], None, {"normalizer": "group", "group_ids": torch.tensor([1])},
    ),
    "group_ids a mask": (
        TypeError, "group_ids.*torch.bool", [1.0, 2.0], None, {"group_ids": torch.tensor([True, False])},
    ),
    "other device": (ValueError, "on cpu like rewards, got meta", [1.0], "meta", {"reference": "sum"}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_and_the_remedy(case):
    error, message, rewards, ref_logp, options = REFUSED[case]
    if rewards == "list":
        rewards = [1.0, 2.0]
    elif not isinstance(rewards, torch.Tensor):
        rewards = torch.tensor(rewards, dtype=torch.float64)
    if ref_logp is not None:
        ref_logp = torch.zeros(1, device="meta") if ref_logp == "meta" else torch.tensor(ref_logp)
    normalizer = "batch" if options.get("reference") else "self_normalised"
    with pytest.raises(error, match=message):
        var_weights(rewards, ref_logp, **{"lam": 1.0, "normalizer": normalizer, "reference": "none", **options})
