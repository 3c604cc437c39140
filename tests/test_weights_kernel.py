"""VAR's weights over a batch by kernel: against the naive twin, from sums and from tokens, every option; mutants."""

import pytest
import torch

from tests.conftest import TARGETS
from tests.mutation import mutant_of
from tests.test_var_loss import Batch
from tests.test_var_weights import COMBINATIONS, assert_close, random_batch
from tests.test_var_weights import arguments as all_arguments
from var_kernels import var_loss, var_weights
from var_kernels.losses import weights as weights_module
from var_kernels.losses.sequences import expand_to_tokens, sequence_lengths, sequence_sum
from var_kernels.reference import var_weights_ref

pytest.importorskip("triton", reason="triton is not installed")
from var_kernels.kernels import weights_triton

pytestmark = [
    pytest.mark.filterwarnings("ignore::var_kernels.losses.CollapsedWeightsWarning"),
    pytest.mark.usefixtures("poisoned"),
]
interpreted = pytest.mark.parametrize("target", [p for p in TARGETS if p.id == "cpu-triton"], indirect=True)
on_triton = pytest.mark.parametrize("target", [p for p in TARGETS if "triton" in p.id], indirect=True)
FP32 = 2**-17


OF_A_BATCH = [c for c in COMBINATIONS if c[0] in ("batch", "batch_mean", "self_normalised")]


def weights_by_kernel(rewards, ref_logp, *, normalizer, group_ids=None, module=weights_triton, **options):
    return module.var_weights(rewards, ref_logp, mean=normalizer != "batch", **options)


def arguments(batch: dict, normalizer: str, reference: str) -> tuple[tuple, dict]:
    """Over the batch: without groups."""
    positional, options = all_arguments(batch, normalizer, reference)
    return positional, {**options, "group_ids": None}


def moved(batch: dict, device: str) -> dict:
    return {name: value.to(device) for name, value in batch.items()}


def check(got, want, tolerance=1e-12):
    for g, w in zip(got, want, strict=True):
        w = w if w.shape == g.shape else w[0]
        assert not g.isnan().any()
        assert_close(g.cpu(), w.cpu(), tolerance)


# -- from sums -----------------------------------------------------------------------------------------------------


@on_triton
@pytest.mark.parametrize(("normalizer", "reference"), OF_A_BATCH)
def test_equal_to_the_naive_twin(target, normalizer, reference):
    batch = random_batch(b=37, dtype=torch.float64)
    batch["lengths"][4] = batch["lengths"][36] = 0  # left out of Z
    positional, options = arguments(moved(batch, target.device), normalizer, reference)
    *got, over_tokens = weights_by_kernel(*positional, lam=0.8, **options, dtype=torch.float64)
    assert over_tokens is None
    check(got, var_weights_ref(*positional, lam=0.8, **options))
    assert got[0][4] == got[0][36] == 0


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(target, dtype):
    batch = moved(random_batch(dtype=dtype), target.device)
    positional, options = arguments(batch, "batch_mean", "mean")
    *got, _ = weights_by_kernel(*positional, lam=0.8, **options)
    assert {t.dtype for t in got} == {torch.float32}
    check(got, var_weights_ref(*positional, lam=0.8, **options), FP32)


@on_triton
@pytest.mark.parametrize("b", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("normalizer", ["batch", "self_normalised"])
def test_batch_sizes(target, b, normalizer):
    batch = moved(random_batch(b=b, dtype=torch.float64), target.device)
    positional, options = arguments(batch, normalizer, "none")
    *got, _ = weights_by_kernel(*positional, lam=0.3, **options, dtype=torch.float64)
    check(got, var_weights_ref(*positional, lam=0.3, **options))


@on_triton
def test_the_largest_batch(target):
    b = weights_triton.MAX_SEQUENCES
    rewards = torch.linspace(-3, 3, b, dtype=torch.float64, device=target.device)
    weight, log_z, ess, _ = weights_by_kernel(
        rewards, None, lam=0.5, normalizer="batch", reference="none", dtype=torch.float64
    )
    expected = (rewards / 0.5).softmax(0)
    assert_close(weight.cpu(), expected.cpu())
    assert_close(log_z.cpu(), (rewards / 0.5).logsumexp(0).cpu())
    assert_close(ess.cpu(), 1 / expected.square().sum().cpu())
    assert weights_module.weights_kernel(rewards, "batch", None) is weights_triton
    assert weights_module.weights_kernel(torch.ones(b + 1, device=rewards.device), "batch", None) is None


@on_triton
@pytest.mark.parametrize("lam", [0.1, 1 / 3, 1e-300, 1e300, float("inf"), 7])
def test_lam_keeps_all_its_bits(target, lam):
    rewards = torch.tensor([0.0, min(lam, 1e300), 2 * min(lam, 1e300)], dtype=torch.float64, device=target.device)
    got = weights_by_kernel(rewards, None, lam=lam, normalizer="batch", reference="none", dtype=torch.float64)[0]
    assert_close(got.cpu(), (rewards / lam).softmax(0).cpu(), 1e-15)


@on_triton
@pytest.mark.parametrize("normalizer", ["batch", "batch_mean"])
def test_extremes(target, normalizer):
    """Scores of +-1e36, a batch of fillers only, squares that underflow, NaN: no overflow, no NaN but for NaN."""
    one = torch.zeros(3, dtype=torch.int64, device=target.device)

    def run(rewards, lam, lengths=None):
        rewards = torch.tensor(rewards, dtype=torch.float64, device=target.device)
        options = {"normalizer": normalizer, "reference": "none", "lengths": lengths}
        return weights_by_kernel(rewards, None, lam=lam, dtype=torch.float64, **options)[:3]

    scale = 3 if normalizer == "batch_mean" else 1
    weight, _, ess = run([1e30, -1e30, 1e30], 1e-6)
    assert_close(weight.cpu(), torch.tensor([0.5, 0.0, 0.5]) * scale)
    assert_close(ess.cpu(), 2.0)
    weight, log_z, ess = run([1.0, 2.0, 3.0], 1.0, one)
    assert weight.tolist() == [0, 0, 0]
    assert ess == 0
    assert (log_z == -torch.inf).all()
    assert_close(run([0.0, -800.0, -800.0], 1.0)[2].cpu(), 1.0)
    assert run([1.0, float("nan"), 3.0], 1.0)[0].isnan().all()


@on_triton
def test_any_strides_and_integers(target):
    batch = moved(random_batch(dtype=torch.float64), target.device)
    rewards = batch["rewards"].repeat_interleave(2)[::2]
    lengths = batch["lengths"].to(torch.int16).repeat(2, 1).t()[:, 0]
    options = {"lam": 0.8, "normalizer": "batch", "reference": "mean"}
    *got, _ = weights_by_kernel(rewards, batch["ref_logp"], lengths=lengths, dtype=torch.float64, **options)
    want = var_weights_ref(batch["rewards"], batch["ref_logp"], lengths=batch["lengths"], **options)
    check(got, want)


# -- from tokens ---------------------------------------------------------------------------------------------------


def token_batch(device: str, packed: bool, b=19, t=23):
    """Log-probs per token, NaN where the label is ignored; sequences of any length, the last without a label."""
    generator = torch.Generator().manual_seed(3)
    token_logp = -torch.rand(b, t, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 50, (b, t), generator=generator)
    labels[torch.rand(b, t, generator=generator) < 0.4] = -100
    labels[-1] = -100
    token_logp[labels == -100] = torch.nan
    cu_seqlens = None
    if packed:
        keep = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=generator)
        keep[0] = False  # an empty segment
        cu_seqlens = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32).to(device)
        token_logp, labels = token_logp[keep], labels[keep]
    return token_logp.to(device), labels.to(device), cu_seqlens


@on_triton
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("normalizer", "reference"), OF_A_BATCH)
def test_from_tokens_to_tokens(target, monkeypatch, packed, normalizer, reference):
    monkeypatch.setattr(weights_triton, "TOKEN_TILE", 256)
    token_logp, labels, cu_seqlens = token_batch(target.device, packed)
    batch = moved(random_batch(b=19, dtype=torch.float64), target.device)
    (rewards, _), options = arguments(batch, normalizer, reference)
    lengths = sequence_lengths(labels, cu_seqlens=cu_seqlens)
    sums = sequence_sum(token_logp, labels, cu_seqlens=cu_seqlens)
    options["lengths"] = lengths
    want = var_weights_ref(rewards, sums, lam=0.8, **options)

    options["lengths"] = None  # counted
    *got, token_weight = weights_by_kernel(
        rewards,
        token_logp,
        lam=0.8,
        labels=labels,
        cu_seqlens=cu_seqlens,
        dtype=torch.float64,
        **options,
    )
    check(got, want)
    expected = expand_to_tokens(got[0], labels, cu_seqlens).masked_fill(labels == -100, 0.0)
    assert torch.equal(token_weight, expected)


@on_triton
def test_rows_behind_the_last_sequence_weigh_nothing(target):
    rewards = torch.ones(2, device=target.device)
    labels, cu_seqlens = torch.zeros(7, dtype=torch.int64), torch.tensor([0, 2, 5])
    *_, token_weight = weights_by_kernel(
        rewards, None, lam=1.0, normalizer="batch", reference="none",
        labels=labels.to(target.device), cu_seqlens=cu_seqlens.to(target.device),
    )  # fmt: skip
    assert token_weight.tolist() == [0.5] * 5 + [0.0] * 2


# -- through the public functions ----------------------------------------------------------------------------------


def counted(monkeypatch) -> list:
    calls, original = [], weights_triton.var_weights
    monkeypatch.setattr(weights_triton, "var_weights", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    return calls


@on_triton
@pytest.mark.parametrize(("normalizer", "reference"), COMBINATIONS)
def test_var_weights_over_the_batch_are_the_kernels(target, monkeypatch, normalizer, reference):
    calls = counted(monkeypatch)
    batch = moved(random_batch(), target.device)
    positional, options = all_arguments(batch, normalizer, reference)
    got = var_weights(*positional, lam=0.8, **options)
    assert len(calls) == (normalizer in ("batch", "batch_mean"))
    check(got, var_weights_ref(*positional, lam=0.8, **options), FP32)
    assert {t.dtype for t in got} == {torch.float32}


@pytest.mark.parametrize("target", [p for p in TARGETS if "torch" in p.id], indirect=True)
def test_other_backends_do_not(target, monkeypatch):
    calls = counted(monkeypatch)
    var_weights(torch.ones(3, device=target.device), lam=1.0, reference="none")
    assert not calls


@on_triton
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("per_token", [False, True], ids=["sums", "tokens"])
@pytest.mark.parametrize("normalizer", ["batch", "self_normalised"])
def test_var_loss_by_kernel_equals_the_other_path(target, monkeypatch, packed, per_token, normalizer):
    batch, device = Batch(), target.device
    labels, cu_seqlens = batch.labels, None
    hidden, token_ref = batch.hidden.detach(), -torch.rand(labels.shape)
    if packed:
        keep = torch.arange(labels.shape[1]) < torch.tensor([9, 7, 8, 9, 5, 6, 9])[:, None]
        cu_seqlens = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32).to(device)
        hidden, labels, token_ref = hidden[keep], labels[keep], token_ref[keep]
    ref_logp = token_ref if per_token else batch.ref_logp
    reference = "mean" if normalizer == "batch" else "none"
    options = {"lam": 0.5, "normalizer": normalizer, "reference": reference, "return_stats": True}

    def run():
        leaves = [t.detach().to(device).requires_grad_() for t in (hidden, batch.lm_head_weight)]
        stats = var_loss(
            *leaves, labels.to(device), batch.rewards.to(device), ref_logp.to(device),
            cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
        return stats, torch.autograd.grad(stats.loss, leaves)

    calls = counted(monkeypatch)
    by_kernel, gradients = run()
    assert len(calls) == 1
    monkeypatch.setattr(weights_module, "weights_kernel", lambda *_: None)
    other, expected = run()
    assert len(calls) == 1
    torch.testing.assert_close(by_kernel.loss, other.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_kernel.weights.weight, other.weights.weight)
    torch.testing.assert_close(by_kernel.weights.log_z, other.weights.log_z)
    torch.testing.assert_close(by_kernel.logp, other.logp, equal_nan=True)
    for g, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


@on_triton
def test_refusals_stay_where_they_were(target):
    batch, device = Batch(), target.device
    tensors = [t.to(device) for t in (batch.hidden, batch.lm_head_weight, batch.labels, batch.rewards)]
    with pytest.raises(ValueError, match="ref_logp must be given"):
        var_loss(*tensors, lam=1.0, normalizer="batch", reference="sum")
    with pytest.raises(ValueError, match=r"ref_logp must be \(7\)"):
        var_loss(*tensors, torch.ones(5, device=device), lam=1.0, normalizer="batch", reference="sum")
    with pytest.raises(ValueError, match="group_ids must be given"):
        var_loss(*tensors, torch.ones(7, device=device), lam=1.0, normalizer="group", reference="sum")


# -- mistakes ------------------------------------------------------------------------------------------------------


def check_sums(module, normalizer: str) -> None:
    batch = random_batch(b=37, dtype=torch.float64)
    batch["lengths"][4] = 0
    # Digits for fp32 to lose, and no reference term, which would leave all the weight to one row.
    batch["rewards"] = batch["rewards"] / 3
    positional, options = arguments(batch, normalizer, "none")
    *got, _ = weights_by_kernel(*positional, lam=0.8, module=module, **options, dtype=torch.float64)
    check(got, var_weights_ref(*positional, lam=0.8, **options))


def check_tokens(module, normalizer: str) -> None:
    token_logp, labels, _ = token_batch("cpu", packed=False)
    batch = random_batch(b=19, dtype=torch.float64)
    options = {"lam": 0.8, "normalizer": normalizer, "reference": "mean"}
    *got, token_weight = weights_by_kernel(
        batch["rewards"], token_logp, labels=labels, module=module, dtype=torch.float64, **options
    )
    lengths = sequence_lengths(labels)
    check(got, var_weights_ref(batch["rewards"], sequence_sum(token_logp, labels), lengths=lengths, **options))
    assert torch.equal(token_weight, expand_to_tokens(got[0], labels).masked_fill(labels == -100, 0.0))


MUTANTS = {  # id: (source, its replacement, the check that must notice, normalizer)
    "maximum not taken off": ("share = tl.exp(score - top)", "share = tl.exp(score)", check_sums, "batch"),
    "mean over left-out rows too": ("tl.maximum(kept, 1).to", "tl.maximum(B, 1).to", check_sums, "batch_mean"),
    "scores in fp32": ("score = reward.to(tl.float64)", "score = reward.to(tl.float32)", check_sums, "batch"),
    "fillers kept": ("inside & (length > 0)", "inside & (length > -1)", check_sums, "batch"),
    "ignored tokens read": ("mask=counts, other=0.0", "mask=mask, other=0.0", check_tokens, "batch"),
    "ignored tokens weighed": ("tl.where(counts, weight[:, None], 0.0)", "weight[:, None]", check_tokens, "batch"),
    "tail of tokens dropped": (
        "range(0, tl.max(length, 0)",
        "range(0, 16 + 0 * tl.max(length, 0)",
        check_tokens,
        "batch",
    ),
}


@interpreted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_refused(target, name, tmp_path, monkeypatch):
    before, after, check_it, normalizer = MUTANTS[name]
    mutant = mutant_of(weights_triton, before, after, tmp_path)
    for module in (weights_triton, mutant):
        monkeypatch.setattr(module, "TOKEN_TILE", 256)
    check_it(weights_triton, normalizer)
    with pytest.raises(AssertionError):
        check_it(mutant, normalizer)
