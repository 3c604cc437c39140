"""Policy gradients by an importance ratio: numbers by hand, identities, limits, TRL's own losses on equal tensors."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from var_kernels.losses import (
    cispo_loss,
    dft_loss,
    gspo_loss,
    length_weights,
    ppo_clipped,
    ppo_loss,
    reinforce_loss,
    sapo_loss,
    topr_loss,
    vespo_loss,
)

FP64 = torch.float64
LN2 = math.log(2)


def tensor(*values):
    return torch.tensor(values, dtype=FP64)


def slope(function, logp):
    logp = logp.clone().requires_grad_()
    return torch.autograd.grad(function(logp).sum(), logp)[0]


TWO, HALF = tensor(LN2, -LN2), tensor(0.0, 0.0)  # ratios of 2 and 1/2 to an old log-prob of 0
BY_HAND = {
    # the ratio 2 is held at 1.5, 1/2 stays
    "cispo": (cispo_loss(TWO, HALF, tensor(1.0, -2.0), ratio_max=1.5), [-1.5 * LN2, -0.5 * 2 * LN2]),
    "cispo, both sides": (
        cispo_loss(TWO, HALF, tensor(1.0, -2.0), ratio_min=0.8, ratio_max=1.2), [-1.2 * LN2, -0.8 * 2 * LN2],
    ),
    # 4 sigmoid(1) of a positive advantage, 4 / 2 sigmoid(2 (1/2 - 1)) of a negative one
    "sapo": (
        sapo_loss(TWO, HALF, tensor(1.0, -3.0), temperature_neg=2.0),
        [-4 / (1 + math.exp(-1)), 3 * 2 / (1 + math.exp(1))],
    ),
    # sums of 2 ln 2 over 2 tokens: a ratio of 2, clipped where that is the smaller gain
    "gspo": (
        gspo_loss(2 * TWO.repeat(2), HALF.repeat(2), tensor(1, 1, -1, -1), torch.full((4,), 2), clip_high=0.3),
        [-1.3, -0.5, 2.0, 1 - 3e-4],
    ),
    "reinforce": (reinforce_loss(tensor(-3.0, -5.0), tensor(2.0, -1.0)), [6.0, -5.0]),
    # w = 2: phi = 2^2 exp(3 (1 - 2));  w = 1/2: phi = 2^-3 exp(2 / 2)
    "vespo": (
        vespo_loss(TWO, HALF, tensor(1.0, -1.0)), [-4 * math.exp(-3) * LN2, -math.exp(1) / 8 * LN2],
    ),
    "topr": (topr_loss(-TWO.abs().repeat(2), HALF.repeat(2), tensor(3, 0, -1, -2)), [3 * LN2, 0, -LN2 / 2, -LN2]),
    "topr, drawn more often": (topr_loss(TWO, HALF, tensor(-1, -1)), [LN2, -LN2 / 2]),
    "dual clip": (
        ppo_loss(tensor(math.log(5), math.log(2), math.log(5)), tensor(0, 0, 0), tensor(-1, -1, 1), dual_clip=3.0),
        [3.0, 2.0, -1.2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    got, expected = BY_HAND[name]
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


OLD = tensor(-0.4, -1.6, -2.0, -3.9, -0.8)
LOGP = OLD + tensor(0.3, -0.2, 0.05, 0.6, -1.1)
A = tensor(1.0, -2.0, 0.5, -0.3, 0.7)
LENGTHS = torch.tensor([3, 1, 2, 4, 7])


@pytest.mark.parametrize("call", [
    lambda logp: sapo_loss(logp, OLD, A), lambda logp: gspo_loss(logp, OLD, A, LENGTHS, clip_low=0.3, clip_high=0.3),
    lambda logp: ppo_loss(logp, OLD, A, dual_clip=1.5), lambda logp: reinforce_loss(logp, A),
])  # fmt: skip
def test_gradcheck(call):
    assert torch.autograd.gradcheck(call, (LOGP.clone().requires_grad_(),))


def test_on_policy_all_are_the_policy_gradient():
    """At the old policy the slope is -A; GSPO's is that of a mean over tokens."""
    for loss in (cispo_loss, sapo_loss, ppo_loss, vespo_loss, topr_loss):
        torch.testing.assert_close(slope(lambda logp, loss=loss: loss(logp, OLD, A), OLD), -A)
    torch.testing.assert_close(slope(lambda logp: reinforce_loss(logp, A), OLD), -A)
    torch.testing.assert_close(slope(lambda logp: gspo_loss(logp, OLD, A, LENGTHS), OLD), -A / LENGTHS)


def test_identities():
    # a ratio without bounds, held constant, has the slope of the ratio itself
    unbounded = slope(lambda logp: cispo_loss(logp, OLD, A, ratio_max=1e9), LOGP)
    torch.testing.assert_close(unbounded, slope(lambda logp: (logp - OLD).exp() * -A, LOGP))
    # an old policy of log-prob 0 and advantage 1: the ratio is the probability, and CISPO is DFT
    torch.testing.assert_close(cispo_loss(LOGP, 0 * OLD, 0 * A + 1, ratio_max=1.0), dft_loss(LOGP))
    # one token a sequence: GSPO is PPO
    torch.testing.assert_close(
        gspo_loss(LOGP, OLD, A, torch.ones_like(LENGTHS), clip_low=0.1, clip_high=0.2),
        ppo_loss(LOGP, OLD, A, clip_low=0.1, clip_high=0.2),
    )
    # its other published form: a token loss with sg(ratio) lp / sg(lp), where no clip binds
    tokens, before = torch.randn(2, 3, dtype=FP64), torch.randn(2, 3, dtype=FP64)
    both = {"clip_low": 0.999, "clip_high": 1e9}
    count, advantage = torch.full((2,), 3), A[:2]
    whole = slope(lambda lp: gspo_loss(lp.sum(1), before.sum(1), advantage, count, **both), tokens)
    ratio = (tokens - before).mean(1, keepdim=True).exp()
    by_token = slope(lambda lp: -(ratio * (lp - lp.detach()).exp() * advantage[:, None]).mean(1), tokens)
    torch.testing.assert_close(whole, by_token)
    # TOPR: SFT on what is good
    torch.testing.assert_close(topr_loss(LOGP, OLD, A.abs()), reinforce_loss(LOGP, A.abs()))


def test_limits():
    # SAPO at high temperatures stops the gradient that PPO stops, beyond the ratio 1 and before it
    far = slope(lambda logp: sapo_loss(logp, OLD, A, temperature_pos=1e3, temperature_neg=1e3), LOGP)
    assert far.abs().max() < 1e-12
    # VESPO and TOPR leave alone what the policy no longer draws, CISPO with a lower bound does not
    never = torch.full_like(OLD, -1e3)
    for got in (vespo_loss(never, OLD, A), topr_loss(never, OLD, -A.abs()), cispo_loss(never, OLD, A)):
        assert got.abs().max() == 0
    torch.testing.assert_close(cispo_loss(never, OLD, A, ratio_min=0.5), -0.5 * A * never)
    assert vespo_loss(-OLD.abs() * 0, never, A).abs().max() == 0  # nor what it draws a thousand nats more often
    # a dual clip far away is none
    torch.testing.assert_close(ppo_loss(LOGP, OLD, A, dual_clip=1e9), ppo_loss(LOGP, OLD, A))


def test_a_dual_clip_is_where_the_gradient_stops():
    logp = tensor(1.3, 2.9, 3.1, 3.1).log()
    advantage = tensor(-1, -1, -1, 1)
    options = {"dual_clip": 3.0}
    clipped = ppo_clipped(logp, 0 * logp, advantage, **options)
    assert clipped.tolist() == [False, False, True, True]
    gradient = slope(lambda logp: ppo_loss(logp, 0 * logp, advantage, **options), logp)
    assert torch.equal(gradient == 0, clipped)


REFUSED = {
    "ratio_min": ("ratio_min must be finite and >= 0, got -1", lambda: cispo_loss(OLD, OLD, A, ratio_min=-1.0)),
    "bounds": ("ratio_max must be finite and >= 2, got 1;", lambda: cispo_loss(OLD, OLD, A, ratio_min=2, ratio_max=1)),
    "temperature": ("temperature_neg must be finite and > 0", lambda: sapo_loss(OLD, OLD, A, temperature_neg=0.0)),
    "dual_clip": ("dual_clip must be finite and > 1, got 1.0; pass None", lambda: ppo_loss(OLD, OLD, A, dual_clip=1.0)),
    "k": ("k_neg must be finite and > 0", lambda: vespo_loss(OLD, OLD, A, k_neg=0.0)),
    "no lengths": ("lengths must be", lambda: gspo_loss(OLD, OLD, A, None)),
    "not finite": ("advantage must be finite, got nan at index", lambda: reinforce_loss(OLD, A * math.nan)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    message, call = REFUSED[case]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()


# ---- TRL's own losses on the same tensors ----------------------------------------------------------------------------

B, T = 6, 5


def batch():
    draw = torch.Generator().manual_seed(3)
    old = -torch.rand(B, T, generator=draw, dtype=FP64) * 4
    logp = old + 0.5 * torch.randn(B, T, generator=draw, dtype=FP64)
    ref = old + 0.3 * torch.randn(B, T, generator=draw, dtype=FP64)
    labels = torch.arange(B * T).view(B, T)
    for row, length in enumerate((5, 3, 1, 4, 5, 2)):
        labels[row, length:] = -100
    return logp, old, ref, torch.randn(B, generator=draw, dtype=FP64), labels


def theirs(logp, old, ref, advantage, labels, **options):
    """``GRPOTrainer._compute_loss``, with these log-probs for the model's."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    args = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    args |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    args |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    given = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token"} | options
    me = SimpleNamespace(
        **{key: value for key, value in given.items() if key not in args},
        args=SimpleNamespace(**(args | {key: value for key, value in given.items() if key in args})),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, model=SimpleNamespace(training=True), max_completion_length=T,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value),
        get_gamma_weights=trainer.get_gamma_weights,
    )  # fmt: skip
    ids, mask = labels.clamp(min=0), (labels != -100).long()
    inputs = {"prompt_ids": ids[:, :0], "prompt_mask": mask[:, :0], "completion_ids": ids, "completion_mask": mask,
              "advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": ref,
              "num_items_in_batch": mask.sum()}  # fmt: skip
    return trainer._compute_loss(me, me.model, inputs)


def by_tokens(loss, normalization, **options):
    def ours(logp, old, ref, advantage, labels):
        weight = length_weights(labels, normalization=normalization).double()
        return (weight * loss(logp, old, advantage[:, None].expand(B, T), **options)).sum()

    return ours


def by_sequences(loss, count_of, **options):
    def ours(logp, old, ref, advantage, labels):
        kept = labels != -100
        sums = [(values * kept).sum(1) for values in (logp, old)]
        lengths = [kept.sum(1)] if loss is gspo_loss else []
        return loss(*sums, advantage, *lengths, **options).sum() / count_of(kept)

    return ours


TRL = {  # TRL's options: ours
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, by_tokens(cispo_loss, "token", ratio_max=1.3)),
    "sapo": ({"loss_type": "sapo"}, by_tokens(sapo_loss, "sequence")),
    "delta": ({"loss_type": "grpo", "delta": 1.4}, by_tokens(ppo_loss, "sequence", dual_clip=1.4)),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, by_tokens(ppo_loss, "token", clip_high=0.28)),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
        by_sequences(gspo_loss, len, clip_low=0.1, clip_high=0.15),
    ),
    "vespo": ({"loss_type": "vespo"}, by_sequences(vespo_loss, torch.sum)),
}


# ---- verl's and OpenRLHF's formulas, read again ----------------------------------------------------------------------


def verl_vanilla(logp, old, advantage, mask, low=0.2, high=0.28, c=3.0):
    """Its clipped surrogate with the dual clip, mean over tokens."""
    ratio = (logp - old).clamp(-20, 20).exp()
    clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    loss = torch.where(advantage < 0, torch.minimum(clipped, -advantage * c), clipped)
    return (loss * mask).sum() / mask.sum()


def verl_gspo(logp, old, advantage, mask, low=0.1, high=0.15):
    """Token losses whose ratio has the sequence's value and the token's gradient; mean over tokens, then sequences."""
    mean = ((logp - old) * mask).sum(1) / mask.sum(1)
    ratio = (logp - logp.detach() + mean.detach().unsqueeze(1)).clamp(max=10).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def verl_cispo(logp, old, advantage, mask, low=0.2, high=0.2):
    ratio = (logp - old).clamp(-20, 20).exp().clamp(1 - low, 1 + high).detach()
    return (-ratio * advantage * logp * mask).sum() / mask.sum()


def openrlhf_dual(logp, old, advantage, mask, low=0.2, high=0.28, c=3.0):
    ratio = (logp - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    loss = -torch.where(advantage < 0, torch.maximum(gain, c * advantage), gain)
    return (loss * mask).sum() / mask.sum()


def openrlhf_cispo(logp, old, advantage, mask, cap=1.2):
    """Its bound is of the ratio itself, as TRL's."""
    return (-(logp - old).exp().clamp_max(cap).detach() * advantage * logp * mask).sum() / mask.sum()


OTHERS = {
    "vanilla": (verl_vanilla, by_tokens(ppo_loss, "token", clip_high=0.28, dual_clip=3.0)),
    "gspo": (verl_gspo, by_sequences(gspo_loss, len, clip_low=0.1, clip_high=0.15)),
    "cispo": (verl_cispo, by_tokens(cispo_loss, "token", ratio_min=0.8, ratio_max=1.2)),
    "OpenRLHF, dual clip": (openrlhf_dual, by_tokens(ppo_loss, "token", clip_high=0.28, dual_clip=3.0)),
    "OpenRLHF, cispo": (openrlhf_cispo, by_tokens(cispo_loss, "token", ratio_max=1.2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_trainers_have_the_same_loss_and_gradient(name):
    theirs_of, ours = OTHERS[name]
    logp, old, ref, advantage, labels = batch()
    logp = old + 4 * (logp - old)  # so far that every clip binds somewhere
    kept, slopes = (labels != -100).double(), []
    for loss in (
        lambda lp: theirs_of(lp, old, advantage[:, None], kept),
        lambda lp: ours(lp, old, ref, advantage, labels),
    ):
        leaf = logp.clone().requires_grad_()
        value = loss(leaf)
        slopes.append((value, torch.autograd.grad(value, leaf)[0] * kept))
    for got, expected in zip(slopes[1], slopes[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert slopes[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("name", TRL)
def test_trl_has_the_same_loss_and_gradient(name):
    options, ours = TRL[name]
    logp, *rest = batch()
    values = []
    for loss in (lambda *tensors: theirs(*tensors, **options), ours):
        leaf = logp.clone().requires_grad_()
        value = loss(leaf, *rest)
        values.append((value, torch.autograd.grad(value, leaf)[0]))
    (their_loss, their_slope), (our_loss, our_slope) = values
    kept = rest[-1] != -100
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-7, atol=1e-12)  # length_weights are fp32
    torch.testing.assert_close(our_slope[kept], their_slope[kept], rtol=1e-7, atol=1e-12)
    assert our_slope.abs().max() > 1e-3
