"""A tiny transformer whose every response can be written down: what each loss's gradient is on average, in every
parameter and through the fused head, against the exact objective by full logits and autograd.

The world: 4 token ids, 0 ends a response, which has 2 tokens at most (13 responses); two prompts; fp64.
"""

import inspect
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel

from var_kernels import linear_loss, var_weights
from var_kernels.integrations.hf import sequence_logprobs
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.model import next_labels
from var_kernels.losses import LOSSES, dpo_loss, single_name

VOCABULARY, LONGEST, LAM, BETA = 4, 2, 0.7, 0.4
PROMPTS = ((1, 2, 3), (3,))
RESPONSES = [(0,), *((first, second) for first in range(1, VOCABULARY) for second in range(VOCABULARY))]
X, R = len(PROMPTS), len(RESPONSES)
WIN, LOSE = (index.flatten() for index in torch.meshgrid(torch.arange(R), torch.arange(R), indexing="ij"))
GENERATOR = torch.Generator().manual_seed(11)
REWARD = torch.randn(X, R, generator=GENERATOR, dtype=torch.float64)
NEEDED = {"tau": 0.4, "delta": 2.0, "target_weight": 0.2, "gamma": 0.5, "odds_weight": 0.3, "eta": 0.7,
          "reward_temperature": 0.8, "temperature": 3.0, "label_smoothing": 0.1, "beta": BETA}  # fmt: skip


def make_model(seed: int) -> GPT2LMHeadModel:
    """GPT-2, which rounds nothing to fp32 inside (a Llama's norms do); its head is its embedding."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=20, n_layer=1, n_head=2, n_positions=8, initializer_range=0.4)
    return GPT2LMHeadModel(config).double().eval()


def rows(prompt: torch.Tensor, response: torch.Tensor) -> dict[str, torch.Tensor]:
    """Padded input_ids, attention_mask and labels (unshifted) of these prompts and responses, one a row."""
    length = max(map(len, PROMPTS)) + LONGEST
    ids, labels = torch.zeros(len(prompt), length, dtype=torch.int64), torch.full((len(prompt), length), -100)
    mask = torch.zeros_like(ids)
    for row, (x, y) in enumerate(zip(prompt.tolist(), response.tolist(), strict=True)):
        whole = (*PROMPTS[x], *RESPONSES[y])
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(PROMPTS[x]) : len(whole)] = torch.tensor(RESPONSES[y])
        mask[row, : len(whole)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


PROMPT, RESPONSE = torch.arange(X).repeat_interleave(R), torch.arange(R).repeat(X)
EVERY = rows(PROMPT, RESPONSE)  # (X R) rows


def naive_tokens(model) -> torch.Tensor:
    """Log-probs of the labels of EVERY, aligned with the states that predict them, by full logits: (X, R, T)."""
    logp = model(EVERY["input_ids"], attention_mask=EVERY["attention_mask"]).logits.log_softmax(-1)
    labels = next_labels(EVERY["labels"], logp)
    return logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(labels != -100, 0.0).view(X, R, -1)


def naive_entropies(model) -> torch.Tensor:
    """Of the policy at every token, (X, R, T)."""
    logp = model(EVERY["input_ids"], attention_mask=EVERY["attention_mask"]).logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).view(X, R, -1)


def naive(model) -> torch.Tensor:
    """Log-prob of every response, (X, R)."""
    return naive_tokens(model).sum(-1)


MODEL = make_model(0)
POLICY = naive(MODEL).detach()  # log-probs of the policy at which gradients are taken
REF = naive(make_model(1)).detach()
NEAR_REF = (POLICY + 0.3 * torch.randn(X, R, generator=GENERATOR, dtype=torch.float64)).log_softmax(-1)
VALUE = torch.full((X, R), 0.55, dtype=torch.float64)


def test_the_world_is_whole():
    torch.testing.assert_close(POLICY.exp().sum(-1), torch.ones(X, dtype=torch.float64))
    assert POLICY.exp().min() > 1e-5
    assert (POLICY - REF).abs().max() > 1.0
    torch.testing.assert_close(sequence_logprobs(MODEL, EVERY).view(X, R), POLICY)


def parameter_gradients(loss, model) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def expected_gradient(name, probability, inputs, pairs=False, model=MODEL, **options) -> torch.Tensor:
    """Of the loss on every item, each weighing what its probability (X, items) says: in every parameter."""
    if pairs:
        index = torch.stack([WIN, LOSE], 1).flatten()  # chosen and rejected in turn
        prompt, response = torch.arange(X).repeat_interleave(len(index)), index.repeat(X)
        batch, inputs = rows(prompt, response), {key: value[prompt, response] for key, value in inputs.items()}
    else:
        batch, inputs = EVERY, {key: value.flatten(0, 1) for key, value in inputs.items()}

    def in_head(hidden, head):
        labels = next_labels(batch["labels"], hidden)
        return linear_loss(
            name, hidden, head.lm_head_weight, labels, inputs, head.bias, item_weight=probability.flatten(), **options
        )

    (loss,), _ = capture(model, in_head, {key: batch[key] for key in ("input_ids", "attention_mask")})
    return parameter_gradients(loss, model)


def assert_equal(got, exact):
    assert exact.abs().max() > 1e-3
    assert (got - exact).abs().max() < 1e-10 * exact.abs().max()  # asked for: 1e-6


# ---- SAIL: the bilevel objectives ------------------------------------------------------------------------------------

DATA = torch.rand(X, R, R, generator=GENERATOR, dtype=torch.float64)
DATA = DATA / DATA.sum((1, 2), keepdim=True)  # a data set's pairs, for each prompt


def pair_probability(logp, case) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (winner, loser), (X, R R), and its margin: drawn in either order, labelled by the policy or the reward."""
    margin = BETA * ((logp - REF)[:, WIN] - (logp - REF)[:, LOSE])
    label = torch.sigmoid(REWARD[:, WIN] - REWARD[:, LOSE]) if case == "sail_pr" else torch.sigmoid(margin)
    drawn = (DATA + DATA.mT).flatten(1) if case == "sail_dp" else 2 * (logp[:, WIN] + logp[:, LOSE]).exp()
    return drawn * label, margin


@pytest.mark.parametrize("case", ["sail_dp", "sail_pp", "sail_pr"])
def test_sail_is_the_gradient_of_its_bilevel_objective(case):
    probability, margin = pair_probability(naive(MODEL), case)
    torch.testing.assert_close(probability.sum(-1), torch.ones(X, dtype=torch.float64))
    exact = parameter_gradients(-(probability * margin.sigmoid().log()).sum(), MODEL)
    assert_equal(expected_gradient(case, probability.detach(), {"ref_logp": REF}, pairs=True, beta=BETA), exact)


def test_sail_without_its_score_or_as_dpo_is_another():
    probability, margin = pair_probability(naive(MODEL), "sail_pp")
    exact = parameter_gradients(-(probability * margin.sigmoid().log()).sum(), MODEL)
    for options in ({"score_coef": 0.0}, {"squared_coef": 0.0}):
        other = expected_gradient("sail_pp", probability.detach(), {"ref_logp": REF}, True, beta=BETA, **options)
        assert (other - exact).abs().max() > 0.01 * exact.abs().max()


# ---- objectives of single responses ----------------------------------------------------------------------------------


def aligned(reward=REWARD, prior=REF, lam=LAM):
    return (prior + reward / lam).log_softmax(-1)


def var_share(normalizer, ref_logp, drawn=None):
    """VAR's weight of every response: on all of them once, or on draws (X, R) of a distribution."""
    if drawn is None:
        groups = {"group_ids": PROMPT, "reference": "sum"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are uneven
            weights = var_weights(REWARD.flatten(), ref_logp.flatten(), lam=LAM, normalizer=normalizer, **groups)
        return weights.weight.view(X, R)
    tilt = (REWARD / LAM).exp()
    return drawn * tilt / (drawn * tilt).sum(-1, keepdim=True)  # self_normalised, as its number of draws grows


ADVANTAGE = (REWARD.sigmoid() - VALUE).clamp(min=0)
ONES = torch.ones(X, R, dtype=torch.float64)
TOKENS = naive_tokens(MODEL).detach()


def spread(values):
    """A value of each response at all of its tokens: (X, R, T)."""
    return values.unsqueeze(-1).expand_as(TOKENS)


def regularised_reward(logp):
    """E_pi[r] - lam KL(pi || ref), summed over the prompts."""
    return (logp.exp() * (REWARD - LAM * (logp - REF))).sum()


# (loss, how often each response is seen, its inputs, options, the objective, a function of log-probs of tokens)
OBJECTIVES = {
    "SFT on the reference's draws: KL(ref || pi)": (
        "sft", REF.exp(), {}, {}, lambda tokens: (REF.exp() * (REF - tokens.sum(-1))).sum()),
    "VAR on all candidates: KL(pi* || pi)": (
        "var", ONES, {"sample_weight": var_share("group", REF)}, {},
        lambda tokens: (aligned().exp() * (aligned() - tokens.sum(-1))).sum()),
    "VAR on the reference's draws: KL(pi* || pi)": (
        "var", ONES, {"sample_weight": var_share("self_normalised", REF, REF.exp())}, {},
        lambda tokens: (aligned().exp() * (aligned() - tokens.sum(-1))).sum()),
    "PPO on the policy's draws: -E[r]": (
        "ppo", POLICY.exp(), {"old_token_logp": TOKENS, "advantage": spread(REWARD)}, {},
        lambda tokens: -(tokens.sum(-1).exp() * REWARD).sum()),
    "A-LoL on a near reference's draws: -E[A+]": (
        "alol", NEAR_REF.exp(), {"ref_logp": NEAR_REF, "reward": REWARD, "value": VALUE}, {},
        lambda tokens: -(tokens.sum(-1).exp() * ADVANTAGE).sum()),
    "A-LoL ref-free on the policy's draws: -E[A+]": (
        "alol_ref_free", POLICY.exp(), {"reward": REWARD, "value": VALUE}, {},
        lambda tokens: -(tokens.sum(-1).exp() * ADVANTAGE).sum()),
    "R-LoL on a near reference's draws: -E[R]": (
        "rlol", NEAR_REF.exp(), {"ref_logp": NEAR_REF, "reward": REWARD}, {},
        lambda tokens: -(tokens.sum(-1).exp() * REWARD.sigmoid()).sum()),
    "weighted BC on the policy's draws: -E[R]": (
        "weighted_bc", POLICY.exp(), {"reward": REWARD}, {},
        lambda tokens: -(tokens.sum(-1).exp() * REWARD.sigmoid()).sum()),
    "DRO on the policy's draws: -(E[r] - tau KL(pi || ref))": (
        "dro",
        POLICY.exp(),
        {"ref_logp": REF, "reward": REWARD, "value": VALUE},
        {"tau": LAM},
        lambda tokens: -regularised_reward(tokens.sum(-1)),
    ),
    "QRPO on the policy's draws: 2 beta times the same": (
        "qrpo",
        POLICY.exp(),
        {"ref_logp": REF, "reward": REWARD},
        {"beta": LAM},
        lambda tokens: -2 * LAM * regularised_reward(tokens.sum(-1)),
    ),
    "DFT: -sum of p over tokens": ("dft", ONES, {}, {}, lambda tokens: -tokens.exp().sum()),
    "R-GOLD, unbounded: -sum of R p over tokens": (
        "rgold", ONES, {"advantage": spread(REWARD.sigmoid())}, {"min_prob": 0.0},
        lambda tokens: -(spread(REWARD.sigmoid()) * tokens.exp()).sum()),
}  # fmt: skip


@pytest.mark.parametrize("case", OBJECTIVES)
def test_expected_gradient_is_that_of_the_objective(case):
    name, seen, inputs, options, objective = OBJECTIVES[case]
    ratio = (POLICY - NEAR_REF).exp()
    assert ((ratio > 0.1) & (ratio < 1.9)).all()  # what A-LoL does not clip
    exact = parameter_gradients(objective(naive_tokens(MODEL)), MODEL)
    assert_equal(expected_gradient(name, seen, inputs, **options), exact)


# ---- where they stand still ------------------------------------------------------------------------------------------

# references for which the policy, this very transformer, is the optimum
TILTED = (POLICY - REWARD / LAM).log_softmax(-1)
LOG_Z = (TILTED + REWARD / LAM).logsumexp(-1, keepdim=True)
WINS = torch.sigmoid(REWARD[:, WIN] - REWARD[:, LOSE])  # (X, R R), Bradley-Terry
WIN_RATE = WINS.view(X, R, R).mean(-1)
GROUPS = PROMPT.view(X, R)
REFERENCE = {"ref_logp": TILTED}
RATED = {**REFERENCE, "reward": REWARD}

# (loss, probability, inputs, pairs, options)
OPTIMA = {
    "DPO": ("dpo", WINS, REFERENCE, True, {"beta": LAM}),
    "robust DPO": (
        "robust_dpo", 0.8 * WINS + 0.2 * (1 - WINS), REFERENCE, True, {"beta": LAM, "label_smoothing": 0.2}),
    "IPO": (
        "ipo", WINS, {"ref_logp": (POLICY - WIN_RATE / LAM).log_softmax(-1)}, True,
        {"tau": LAM, "token_reduction": "sum"}),
    "REBEL": ("rebel", torch.ones_like(WINS), RATED, True, {"eta": 1 / LAM}),
    "EXO": ("exo", ONES, {**RATED, "group_ids": GROUPS}, False, {"beta": BETA, "reward_temperature": LAM / BETA}),
    "QRPO": ("qrpo", ONES, {**REFERENCE, "reward": REWARD - LAM * LOG_Z}, False, {"beta": LAM, "log_z": 0.0}),
    "DRO": ("dro", ONES, {**RATED, "value": (LAM * LOG_Z).expand(X, R)}, False, {"tau": LAM}),
    "AWR": ("awr", TILTED.exp(), {"advantage": REWARD}, False, {"beta": LAM, "max_weight": 1e9}),
    "VAR, candidates": ("var", ONES, {"sample_weight": var_share("group", TILTED)}, False, {}),
    "VAR, draws": ("var", ONES, {"sample_weight": var_share("", TILTED, TILTED.exp())}, False, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIMA)
def test_no_parameter_moves_at_the_optimum(case):
    name, probability, inputs, pairs, options = OPTIMA[case]
    assert expected_gradient(name, probability, inputs, pairs, **options).abs().max() < 1e-12
    if "ref_logp" in inputs:
        inputs = {**inputs, "ref_logp": REF}
    else:
        probability = probability * (1 + REWARD.sigmoid())
    assert expected_gradient(name, probability, inputs, pairs, **options).abs().max() > 1e-2


def train(loss_of) -> torch.Tensor:
    """Log-probs (X, R) of a transformer that minimises loss_of(log-probs), which come through the fused head."""
    model = make_model(2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(sequence_logprobs(model, EVERY).view(X, R))
        loss.backward()
        return loss

    optimizer.step(closure)
    return naive(model).detach()


def dpo_over_all_pairs(logp):
    wins, losses = (logp[:, WIN], REF[:, WIN]), (logp[:, LOSE], REF[:, LOSE])
    loss = dpo_loss(wins[0].flatten(), losses[0].flatten(), wins[1].flatten(), losses[1].flatten(), beta=LAM)
    return (WINS.flatten() * loss).sum() / R


TRAINED = {
    "VAR": lambda logp: -(var_share("group", REF) * logp).sum(),
    "DPO": dpo_over_all_pairs,
}


@pytest.mark.parametrize("case", TRAINED)
def test_training_ends_at_the_aligned_policy(case):
    distance = 0.5 * (train(TRAINED[case]).exp() - aligned().exp()).abs().sum(-1).max()
    assert distance < 1e-3 < 0.05 < 0.5 * (REF.exp() - aligned().exp()).abs().sum(-1).max()


# ---- every loss of the registry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_that_of_full_logits_in_every_parameter(name):
    loss = LOSSES[name]
    options = {key: NEEDED[key] for key, value in loss.options.items() if value is inspect.Parameter.empty}
    shape = TOKENS.shape if loss.reads_tokens else (X, R)
    draw = torch.Generator().manual_seed(3)
    given = {key: torch.randn(shape, generator=draw, dtype=torch.float64) for key in loss.inputs}
    given |= {key: -3 + value for key, value in given.items() if key.endswith("logp")}
    given |= {"group_ids": GROUPS} if "group_ids" in given else {}
    given |= {"desirable": REWARD > 0} if "desirable" in given else {}
    pairs = loss.item == "pair"
    seen = torch.rand(X, R * R if pairs else R, generator=draw, dtype=torch.float64)

    tokens, kept = (
        naive_tokens(MODEL),
        (next_labels(EVERY["labels"], EVERY["labels"].unsqueeze(-1)) != -100).view(TOKENS.shape),
    )
    known = {
        "token_logp": tokens,
        "entropy": naive_entropies(MODEL),
        "policy_logp": tokens.sum(-1),
        "mask": kept,
        "lengths": kept.sum(-1),
        **given,
    }
    arguments = {}
    for argument in loss.tensors:
        single, row = single_name(argument)
        if single in known:
            values = known[single] if row is None else known[single][:, (WIN, LOSE)[row]]
            arguments[argument] = values.flatten(0, 1)
    items = loss.function(**arguments, **options)
    if loss.item == "token":
        items = items.where(kept.flatten(0, 1), 0.0).sum(-1)
    exact = parameter_gradients((items * seen.flatten()).sum(), MODEL)
    assert_equal(expected_gradient(name, seen, given, pairs, **options), exact)
