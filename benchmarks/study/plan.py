"""What the study runs: sizes, methods with their settings, and the grid that their learning rates come from."""

from dataclasses import dataclass, field, replace

from benchmarks.small_world import MAX_NEW_TOKENS
from var_kernels.integrations.from_scratch import ScratchSpec


@dataclass(frozen=True)
class RealPlan:
    """The part on a file of rated completions. ``lam`` in the file's reward units."""

    model: ScratchSpec = field(default_factory=lambda: ScratchSpec(hidden=96, layers=2, heads=3, vocab=2048))
    max_length: int = 112
    pretrain_steps: int = 400
    pretrain_batch: int = 16
    pretrain_rate: float = 4e-3
    held_out: int = 200
    completions: int = 4  # of each training prompt, the first ones of the file
    prompts: int = 4  # per step
    steps: int = 50
    lam: float = 0.3
    rates: tuple[float, ...] = (3e-4, 1e-3)


@dataclass(frozen=True)
class Plan:
    """The part on the small world. ``lam`` is the price of a nat of KL in reward points, for every method that has a
    place for it."""

    name: str
    model: ScratchSpec
    pretrain_steps: int
    pretrain_batch: int
    pretrain_rate: float
    completions: int  # drawn from the reference for each training prompt
    prompts: int  # per step
    steps: int
    probes: tuple[int, ...]  # steps at which the policy is sampled on held-out prompts
    probe_samples: int  # per prompt
    long_steps: int
    long_probes: tuple[int, ...]
    iteration_steps: int  # online: steps on what was drawn at once
    lam: float
    rates: tuple[float, ...]
    eval_samples: int
    tuning_samples: int
    frontier_samples: int
    watched_pairs: int  # whose log-probs are followed over the steps
    head_steps: int
    head_pairs: int  # per step
    head_noise: tuple[float, ...]  # share of the training labels that are flipped
    head_rates: tuple[float, ...]
    reply_tokens: int = MAX_NEW_TOKENS
    max_prompts: int | None = None  # None: all of the world's
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    methods: tuple[str, ...] = ()  # empty: all
    real: RealPlan = field(default_factory=RealPlan)


FULL = Plan(
    name="full",
    model=ScratchSpec(hidden=64, layers=2, heads=2, vocab=1024),
    pretrain_steps=1200,
    pretrain_batch=32,
    pretrain_rate=5e-3,
    completions=8,
    prompts=8,
    steps=64,
    probes=(0, 16, 32, 64),
    probe_samples=2,
    long_steps=320,
    long_probes=(0, 32, 64, 128, 224, 320),
    iteration_steps=8,
    lam=0.5,
    rates=(1e-4, 2e-4, 4e-4, 1.6e-3),
    eval_samples=8,
    tuning_samples=4,
    frontier_samples=32,
    watched_pairs=64,
    head_steps=100,
    head_pairs=16,
    head_noise=(0.0, 0.2, 0.4),
    head_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
)
# On a GPU, where a step of this model costs what a step of FULL's costs on a core.
LARGE = replace(
    FULL,
    name="large",
    model=ScratchSpec(hidden=256, layers=4, heads=4, vocab=1024),
    pretrain_steps=3000,
    pretrain_batch=64,
    pretrain_rate=2e-3,
    completions=16,
    prompts=16,
    steps=200,
    probes=(0, 25, 50, 100, 200),
    long_steps=1000,
    long_probes=(0, 50, 100, 200, 400, 600, 800, 1000),
    rates=(3e-5, 1e-4, 3e-4, 1e-3),
    head_rates=(1e-4, 3e-4, 1e-3),
    eval_samples=16,
    real=RealPlan(
        model=ScratchSpec(hidden=256, layers=4, heads=4, vocab=4096),
        max_length=512,
        pretrain_steps=2000,
        pretrain_rate=2e-3,
        completions=8,
        prompts=8,
        steps=150,
        rates=(1e-4, 3e-4, 1e-3),
    ),
)
# Every section in a few seconds; its figures mean nothing.
QUICK = replace(
    FULL,
    name="quick",
    model=ScratchSpec(hidden=16, layers=1, heads=1, vocab=600),
    pretrain_steps=60,
    pretrain_batch=8,
    pretrain_rate=2e-2,
    completions=4,
    prompts=4,
    steps=2,
    probes=(0, 2),
    probe_samples=2,
    long_steps=4,
    long_probes=(0, 2, 4),
    iteration_steps=1,
    rates=(1e-3, 3e-3),
    eval_samples=2,
    tuning_samples=2,
    frontier_samples=2,
    watched_pairs=4,
    head_steps=2,
    head_pairs=4,
    head_noise=(0.2,),
    head_rates=(1e-3,),
    reply_tokens=6,
    max_prompts=12,
    seeds=(0, 1),
    methods=("VAR", "DPO", "SAIL-DP, mixed", "SAIL-PR"),
    real=RealPlan(
        model=ScratchSpec(hidden=16, layers=1, heads=1, vocab=300),
        max_length=24,
        pretrain_steps=2,
        pretrain_batch=4,
        held_out=4,
        completions=2,
        prompts=2,
        steps=2,
        rates=(1e-3,),
    ),
)


@dataclass(frozen=True)
class Entry:
    """A method as the study trains it. settings: "lam" stands for the plan's lambda. ``per_row``: an item of a batch is
    one completion, not a prompt or a pair. own_share: of the steps, those on labels of the policy's own; the others are
    DPO on the data's. note: for the table of settings."""

    method: str
    settings: dict
    per_row: bool = False
    online: bool = False
    own_share: float = 1.0
    note: str = ""

    def resolved(self, lam: float) -> dict:
        return {key: lam if value == "lam" else value for key, value in self.settings.items()}


def _var(normalizer: str, reference: str, note: str) -> Entry:
    settings = {"lam": "lam", "normalizer": normalizer, "reference": reference}
    return Entry("var", settings, per_row=normalizer == "batch", note=note)


VAR, DPO = "VAR", "DPO"
METHODS: dict[str, Entry] = {
    "SFT": Entry("sft", {"sft_on": "all"}, per_row=True, note="all completions, rewards unread"),
    "Best-of-n SFT": Entry("sft", {"sft_on": "best"}, note="the best completion of each prompt"),
    VAR: _var("self_normalised", "none", "the weights for y ~ pi_ref"),
    "VAR, group, mean": _var("group", "mean", "within a prompt, per-token mean of log pi_ref"),
    "VAR, group, sum": _var("group", "sum", "within a prompt, log pi_ref"),
    "VAR, batch, none": _var("batch", "none", "over the batch's prompts"),
    "VAR, batch, mean": _var("batch", "mean", "over the batch's prompts, per-token mean of log pi_ref"),
    "VAR, batch, sum": _var("batch", "sum", "over the batch's prompts, log pi_ref"),
    DPO: Entry("dpo", {"beta": "lam"}, note="best against worst of a prompt"),
    "DPO, beta 0.1": Entry("dpo", {"beta": 0.1}, note="a weaker leash"),
    "IPO": Entry("ipo", {"tau": "lam", "token_reduction": "sum"}),
    "SLiC": Entry("slic", {}, note="no reference"),
    "KTO": Entry("kto", {"beta": "lam", "desirable_above": 0.5}, per_row=True, note="desirable: at least one point"),
    "A-LoL": Entry("alol", {}, per_row=True),
    "DRO": Entry("dro", {"tau": "lam", "standardise_rewards": False}, per_row=True),
    "GRPO, offline": Entry("grpo", {}, note="the reference's completions, not the policy's; beta 0.04 a token"),
    "AVA-p": Entry("ava_p", {}),
    "SAIL-DP": Entry("sail_dp", {"beta": "lam"}, note="the data's pairs, all labels drawn by the policy"),
    "SAIL-DP, mixed": Entry(
        "sail_dp",
        {"beta": "lam"},
        own_share=0.4,
        note="DPO on the data's labels at 6 steps of 10, SAIL-DP at the others",
    ),
    "SAIL-PP": Entry("sail_pp", {"beta": "lam"}, online=True, note="pairs and labels from the policy"),
    "SAIL-PP, baseline": Entry(
        "sail_pp",
        {"beta": "lam", "baseline": "leave_one_out"},
        online=True,
        note="F of the batch's other pairs taken off",
    ),
    "SAIL-PR": Entry("sail_pr", {"beta": "lam"}, online=True, note="pairs from the policy, labels from the reward"),
    "SAIL-PR, baseline": Entry(
        "sail_pr",
        {"beta": "lam", "baseline": "leave_one_out"},
        online=True,
        note="F of the batch's other pairs taken off",
    ),
    "SAIL-PR, k 0.3": Entry(
        "sail_pr", {"beta": "lam", "score_coef": 0.3}, online=True, note="the score term at the released weight"
    ),
    "SAIL-PR, k 0": Entry(
        "sail_pr", {"beta": "lam", "score_coef": 0.0}, online=True, note="no score term: DPO on two draws of the policy"
    ),
    "Iterative DPO": Entry(
        "dpo", {"beta": "lam"}, online=True, note="best against worst of the policy's own, reference moves along"
    ),
    "Online VAR": Entry(
        "var", {"lam": "lam", "normalizer": "self_normalised"}, online=True, note="reference moves along"
    ),
}
LONG = (VAR, "Best-of-n SFT", DPO, "DPO, beta 0.1")
HEADS = {
    "Bradley-Terry": None,
    "AVA-p": {},
    "AVA-p, contrast 20": {"contrast": 20.0},
}  # None: no such loss; its options
REAL: dict[str, Entry] = {
    "SFT": METHODS["SFT"],
    "Best-of-n SFT": METHODS["Best-of-n SFT"],
    "VAR, group, none": _var("group", "none", ""),
    "VAR, group, sum": METHODS["VAR, group, sum"],
    DPO: Entry("dpo", {"beta": 0.1}),
    "A-LoL": METHODS["A-LoL"],
    "DRO": Entry("dro", {"tau": 0.1}, per_row=True),
    "AVA-p": METHODS["AVA-p"],
}


def chosen_methods(plan: Plan, table: dict[str, Entry]) -> dict[str, Entry]:
    return {name: entry for name, entry in table.items() if not plan.methods or name in plan.methods}
