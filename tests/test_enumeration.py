"""Every response of a small world, written down: what each loss converges to, in exact arithmetic and without sampling.

The world: tokens {0 = end, 1, 2, 3}; a response ends at 0 or after 3 tokens (40 of them); 3 prompts. The policy is a
table: hidden is a one-hot of (prompt, prefix), the lm_head holds the logits, and the losses under test train it. "Drawn
from q" is exact too: each response stands in the batch as often as q says, q being integer counts over their sum.
"""

import itertools

import pytest
import torch

from var_kernels import dpo_loss, linear_logprob, linear_weighted_nll, sft_loss, var_loss, var_weights
from var_kernels.losses import sequence_sum
from var_kernels.losses import var as var_module

pytestmark = pytest.mark.filterwarnings("ignore::var_kernels.losses.CollapsedWeightsWarning")

VOCABULARY, LONGEST, PROMPTS, LAM = 4, 3, 3, 0.6
PREFIXES = [p for n in range(LONGEST) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
RESPONSES = [(*p, t) for p in PREFIXES for t in range(VOCABULARY) if t == 0 or len(p) == LONGEST - 1]
R = len(RESPONSES)
STATES = len(PREFIXES)
TOLERANCE = 1e-3  # total variation


def make_labels() -> torch.Tensor:
    labels = torch.full((R, LONGEST), -100)
    for row, response in enumerate(RESPONSES):
        labels[row, : len(response)] = torch.tensor(response)
    return labels


LABELS = make_labels()  # (R, T)
LENGTHS = (LABELS != -100).sum(-1)  # (R,)


def hidden_states(prompt: int, *, share_prompts: bool = False) -> torch.Tensor:
    """(R, T, D): one-hot of the prompt's prefix state; with share_prompts the policy cannot see the prompt."""
    hidden = torch.zeros(R, LONGEST, STATES * PROMPTS, dtype=torch.float64)
    for row, response in enumerate(RESPONSES):
        for position in range(len(response)):
            state = PREFIXES.index(response[:position])
            hidden[row, position, state + (0 if share_prompts else prompt * STATES)] = 1
    return hidden


HIDDEN = torch.stack([hidden_states(x) for x in range(PROMPTS)])  # (X, R, T, D)
GENERATOR = torch.Generator().manual_seed(7)
COUNTS = torch.randint(1, 9, (PROMPTS, R), generator=GENERATOR)
MU_COUNTS = torch.randint(1, 9, (PROMPTS, R), generator=GENERATOR)
PI_REF = COUNTS.double() / COUNTS.sum(-1, keepdim=True)  # (X, R)
MU = MU_COUNTS.double() / MU_COUNTS.sum(-1, keepdim=True)
REWARDS = torch.randn(PROMPTS, R, dtype=torch.float64, generator=GENERATOR)


def normalised(mass: torch.Tensor) -> torch.Tensor:
    return mass / mass.sum(-1, keepdim=True)


TILT = (REWARDS / LAM).exp()
PI_STAR = normalised(PI_REF * TILT)
Z = (PI_REF * TILT).sum(-1)  # (X,)


def policy(lm_head_weight: torch.Tensor, hidden: torch.Tensor = HIDDEN) -> torch.Tensor:
    """Probability of every response, (X, R)."""
    logp = linear_logprob(hidden, lm_head_weight, LABELS.expand(hidden.shape[:-1]))
    return logp.sum(-1).exp()


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return (0.5 * (p - q).abs().sum(-1)).max().item()


def minimise(loss_of) -> torch.Tensor:
    """The lm_head, (V, D), that minimises loss_of(lm_head): exact gradients, LBFGS, fp64."""
    lm_head_weight = torch.zeros(VOCABULARY, STATES * PROMPTS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([lm_head_weight], max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(lm_head_weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    return lm_head_weight.detach()


def rows_of(counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and response of every row, (B,) each: all candidates once, or each as often as counts (X, R) says."""
    times = torch.ones(PROMPTS, R, dtype=torch.int64) if counts is None else counts
    prompt, response = torch.meshgrid(torch.arange(PROMPTS), torch.arange(R), indexing="ij")
    return prompt.flatten().repeat_interleave(times.flatten()), response.flatten().repeat_interleave(times.flatten())


def loss_on(lm_head_weight, prompt, response, ref_logp, hidden=HIDDEN, **options):
    return var_loss(
        hidden[prompt, response],
        lm_head_weight,
        LABELS[response],
        REWARDS[prompt, response],
        ref_logp[prompt, response],
        **{"lam": LAM, "reference": "none" if options.get("normalizer") == "self_normalised" else "sum", **options},
    )


def train_var(counts=None, ref_logp=None, **options) -> torch.Tensor:
    """The policy (X, R) that VAR ends at: one batch a prompt for the batch normalisers, else one grouped batch."""
    prompt, response = rows_of(counts)
    ref_logp = PI_REF.log() if ref_logp is None else ref_logp
    if options["normalizer"] in ("batch", "batch_mean"):
        batches = [(prompt[prompt == x], response[prompt == x]) for x in range(PROMPTS)]
        return policy(minimise(lambda head: sum(loss_on(head, *batch, ref_logp, **options) for batch in batches)))
    return policy(minimise(lambda head: loss_on(head, prompt, response, ref_logp, group_ids=prompt, **options)))


# where the assumption of the estimator holds: all end at pi*
RIGHT = {
    "batch, enumerated candidates of one prompt": dict(normalizer="batch", reference="sum"),
    "batch_mean, enumerated candidates of one prompt": dict(normalizer="batch_mean", reference="sum"),
    "group, enumerated candidates": dict(normalizer="group", reference="sum"),
    "self_normalised, drawn from pi_ref": dict(counts=COUNTS, normalizer="self_normalised"),
    "batch without reference, drawn from pi_ref": dict(counts=COUNTS, normalizer="batch", reference="none"),
    "group on pi_ref/mu, drawn from mu": dict(
        counts=MU_COUNTS, ref_logp=PI_REF.log() - MU.log(), normalizer="group", reference="sum"
    ),
}

# where it does not: the target that docs/var.md names
WRONG = {
    "group, drawn from pi_ref: pi_ref^2": (
        dict(counts=COUNTS, normalizer="group", reference="sum"),
        normalised(PI_REF**2 * TILT),
    ),
    "self_normalised, enumerated: uniform prior": (dict(normalizer="self_normalised"), normalised(TILT)),
    "group without reference, enumerated: uniform prior": (
        dict(normalizer="group", reference="none"),
        normalised(TILT),
    ),
    "self_normalised, drawn from mu: prior mu": (
        dict(counts=MU_COUNTS, normalizer="self_normalised"),
        normalised(MU * TILT),
    ),
    "group, per-token mean, enumerated: pi_ref^(1/len)": (
        dict(normalizer="group", reference="mean"),
        normalised(PI_REF ** (1 / LENGTHS) * TILT),
    ),
    "group, token_reduction mean, enumerated: pi*/len": (
        dict(normalizer="group", reference="sum", token_reduction="mean"),
        normalised(PI_STAR / LENGTHS),
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_var_reaches_the_aligned_policy_where_the_assumption_holds(case):
    assert total_variation(train_var(**RIGHT[case]), PI_STAR) < TOLERANCE


@pytest.mark.parametrize("case", WRONG)
def test_var_reaches_the_documented_wrong_target_where_it_is_broken(case):
    options, target = WRONG[case]
    reached = train_var(**options)
    assert total_variation(reached, target) < TOLERANCE
    assert total_variation(reached, PI_STAR) > 0.05


def cross_batch(prompt, response, lm_head_weight):
    """Loss of one batch: every response of the batch scored under every prompt of the batch, (B, B)."""
    scores = PI_REF.log()[prompt][:, response]
    rewards = REWARDS[prompt][:, response]
    return var_loss(
        HIDDEN[prompt, response],
        lm_head_weight,
        LABELS[response],
        rewards,
        scores,
        lam=LAM,
        normalizer="cross",
        reference="sum",
    )


def test_cross_reaches_the_aligned_policy_when_its_responses_are_the_candidates_of_every_prompt():
    # each batch holds every response once, under one prompt each; over three batches every prompt meets every response
    response = torch.arange(R)
    batches = [((response + shift) % PROMPTS, response) for shift in range(PROMPTS)]
    reached = policy(minimise(lambda head: sum(cross_batch(x, y, head) for x, y in batches)))
    assert total_variation(reached, PI_STAR) < TOLERANCE


def test_cross_counts_the_reference_twice_on_responses_drawn_from_it():
    prompt, response = rows_of(COUNTS)
    reached = policy(minimise(lambda head: cross_batch(prompt, response, head)))
    assert total_variation(reached, normalised(PI_REF**2 * TILT)) < TOLERANCE
    assert total_variation(reached, PI_STAR) > 0.05


def test_batch_over_several_prompts_weighs_each_by_its_partition_function():
    # a policy that cannot see the prompt has to mix; which mixture tells how the prompts were weighted
    shared = hidden_states(0, share_prompts=True).expand(PROMPTS, -1, -1, -1)
    prompt, response = rows_of(None)

    def train(**options):
        head = minimise(lambda head: loss_on(head, prompt, response, PI_REF.log(), hidden=shared, **options))
        return policy(head, shared)[0]

    by_partition = (Z.unsqueeze(-1) * PI_STAR).sum(0) / Z.sum()
    assert total_variation(train(normalizer="batch"), by_partition) < TOLERANCE
    assert total_variation(train(normalizer="group", group_ids=prompt), PI_STAR.mean(0)) < TOLERANCE
    assert total_variation(by_partition, PI_STAR.mean(0)) > 0.01


def test_self_normalised_bias_falls_with_the_number_of_samples():
    # expectation over all K-tuples drawn from pi_ref, on 7 of the responses; the minimiser is the mean weight
    prior, reward = normalised(PI_REF[0, :7]), REWARDS[0, :7]
    distances = []
    for k in (1, 2, 3):
        tuples = torch.tensor(list(itertools.product(range(7), repeat=k)))  # (7^K, K)
        weights = var_weights(
            reward[tuples].flatten(),
            lam=LAM,
            normalizer="self_normalised",
            group_ids=torch.arange(len(tuples)).repeat_interleave(k),
        ).weight.view(-1, k)
        mass = prior[tuples].prod(-1, keepdim=True) * weights / k
        reached = torch.zeros(7, dtype=torch.float64).index_add_(0, tuples.flatten(), mass.flatten())
        assert reached.sum().item() == pytest.approx(1.0)
        distances.append(total_variation(reached, normalised(prior * (reward / LAM).exp())))
        if k == 1:
            torch.testing.assert_close(reached, prior)  # one sample a prompt has weight 1: plain SFT
    assert distances[0] > distances[1] > distances[2]


def test_dpo_reaches_the_same_policy_from_bradley_terry_labels():
    chosen, rejected = (index.flatten() for index in torch.meshgrid(torch.arange(R), torch.arange(R), indexing="ij"))
    label_probability = torch.sigmoid(REWARDS[:, chosen] - REWARDS[:, rejected])  # (X, P)
    ref_logp = PI_REF.log()

    def loss_of(head):
        logp = linear_logprob(HIDDEN, head, LABELS.expand(PROMPTS, -1, -1)).sum(-1)  # (X, R)
        losses = [
            dpo_loss(logp[x, chosen], logp[x, rejected], ref_logp[x, chosen], ref_logp[x, rejected], beta=LAM)
            for x in range(PROMPTS)
        ]
        return (label_probability * torch.stack(losses)).sum() / R

    assert total_variation(policy(minimise(loss_of)), PI_STAR) < TOLERANCE


def test_sft_reaches_the_data_distribution():
    prompt, response = rows_of(COUNTS)
    hidden, labels = HIDDEN[prompt, response], LABELS[response]
    fused = policy(minimise(lambda head: linear_weighted_nll(hidden, head, labels, None)))
    assert total_variation(fused, PI_REF) < TOLERANCE
    from_logp = policy(
        minimise(lambda head: sft_loss(sequence_sum(linear_logprob(hidden, head, labels), labels)).sum())
    )
    assert total_variation(from_logp, PI_REF) < TOLERANCE


def weigh_wrongly(**changes):
    def mutant(rewards, ref_logp, *, lam, **options):
        rewards = changes.get("reward_sign", 1) * rewards
        weights = var_weights(rewards, ref_logp, lam=changes.get("lam", lam), **options)
        return weights._replace(weight=changes.get("weight_sign", 1) * weights.weight)

    return mutant


@pytest.mark.parametrize(
    "changes",
    [dict(reward_sign=-1), dict(lam=1.0), dict(weight_sign=-1)],
    ids=["reward sign flipped", "1/lam missing", "weight sign flipped"],
)
def test_a_wrong_weight_fails_the_proof(monkeypatch, changes):
    monkeypatch.setattr(var_module, "var_weights", weigh_wrongly(**changes))
    with pytest.raises(AssertionError):
        test_var_reaches_the_aligned_policy_where_the_assumption_holds("group, enumerated candidates")
    monkeypatch.setattr(var_module, "var_weights", weigh_wrongly())
    test_var_reaches_the_aligned_policy_where_the_assumption_holds("group, enumerated candidates")
