"""What is said of the methods, and what this study answers: confirmed, not confirmed, or not testable here."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.study.plan import DPO, VAR

CONFIRMED, REFUTED, OPEN = "confirmed", "not confirmed", "not testable here"
RULE = (
    "A comparison is confirmed if the difference, seed by seed, has the claimed sign on every seed and a paired t-test "
    "(one-sided, 5 %) finds it; the opposite is seen if the same holds with the other sign."
)
_T = (math.nan, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # 95 % of t, by degrees of freedom


@dataclass(frozen=True)
class Line:
    """One comparison: figure of ``first`` less that of ``second``, seed by seed; claimed to be above 0 (or below)."""

    figure: str
    first: str
    second: str
    values: tuple[dict[int, float], dict[int, float]]
    higher: bool = True  # the claimed sign

    @property
    def differences(self) -> list[float]:
        first, second = self.values
        return [first[s] - second[s] for s in sorted(first.keys() & second.keys())]

    @property
    def verdict(self) -> str:
        found = [d if self.higher else -d for d in self.differences]
        if len(found) < 2 or any(math.isnan(d) for d in found):
            return OPEN
        clear = abs(statistics.fmean(found)) > _T[min(len(found) - 1, len(_T) - 1)] * error(found)
        if clear and min(found) > 0:
            return CONFIRMED
        return f"{REFUTED}: the opposite" if clear and max(found) < 0 else REFUTED


@dataclass(frozen=True)
class Claim:
    title: str
    meaning: str  # how it was put to the test
    lines: list[Line]

    @property
    def verdict(self) -> str:
        tested = [line.verdict for line in self.lines if line.verdict != OPEN]
        if not tested:
            return OPEN
        confirmed = sum(verdict == CONFIRMED for verdict in tested)
        if confirmed == len(tested):
            return CONFIRMED
        return f"{CONFIRMED} in part ({confirmed} of {len(tested)} comparisons)" if confirmed else REFUTED


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def all_claims(results: dict, lam: float) -> list[Claim]:
    methods, long = results["methods"], results["long"]
    return [
        _stability(long),
        _diversity(methods, results["reference"]),
        _diversity(long, results["reference"], long_runs=True),
        _sail(methods),
        *_reward_heads(results["heads"]),
        *_estimators(methods),
    ]


def final(table: dict, name: str, figure: str) -> dict[int, float]:
    return {seed: run["final"][figure] for seed, run in table.get(name, {}).items()}


def of_curve(table: dict, name: str, read: Callable[[list[dict]], float]) -> dict[int, float]:
    return {seed: read(run["curve"]) for seed, run in table.get(name, {}).items() if run["curve"]}


def fall(curve: list[dict]) -> float:
    """From the best sampled reward on the way to the last one, points."""
    return max(point["reward"] for point in curve) - curve[-1]["reward"]


def change(figure: str) -> Callable[[list[dict]], float]:
    return lambda curve: curve[-1][figure] - curve[0][figure]


def _stability(long: dict) -> Claim:
    lines = []
    for rival in (DPO, "DPO, beta 0.1"):
        lines += [
            Line("fall of the reward from its best", rival, VAR, _both(long, rival, VAR, fall)),
            Line("KL at the end", rival, VAR, (final(long, rival, "kl"), final(long, VAR, "kl"))),
            Line(
                "change of log pi(chosen), held-out pairs",
                rival,
                VAR,
                _both(long, rival, VAR, change("held_out_chosen")),
                higher=False,
            ),
        ]
    meaning = (
        "Long runs at a constant learning rate. DPO over-fits where its sampled reward falls from its best and VAR's "
        "does not, where it runs away from the reference, or where it takes probability from good answers."
    )
    return Claim("VAR stays stable where DPO over-fits", meaning, lines)


def _both(table: dict, first: str, second: str, read) -> tuple[dict, dict]:
    return of_curve(table, first, read), of_curve(table, second, read)


def _diversity(table: dict, references: dict, long_runs: bool = False) -> Claim:
    lines = []
    for rival in (DPO, "DPO, beta 0.1"):
        for figure, key in (("distinct replies", "distinct"), ("entropy", "entropy")):
            lines.append(Line(figure, VAR, rival, (final(table, VAR, key), final(table, rival, key))))
        lost = tuple(lost_entropy(table, name, references) for name in (VAR, rival))
        lines.append(Line("entropy short of that of pi* at the same reward", VAR, rival, lost, higher=False))
    meaning = (
        "Different replies among those sampled for a prompt, and the entropy of a reply. A policy that has gained no "
        "reward has lost no diversity either, so the third figure is by how much it falls short of pi* at the lambda "
        "that gives the same reward (below 0: it has more)."
    )
    if long_runs:
        meaning += (
            " A policy that breaks down has a high entropy, too: where the KL above runs away, these figures say "
            "nothing for DPO."
        )
    where = ", in long runs" if long_runs else ""
    return Claim(f"VAR keeps more diversity than DPO{where}", meaning, lines)


def lost_entropy(table: dict, name: str, references: dict) -> dict[int, float]:
    """Entropy of pi* of the policy's reward, less the policy's, nats a reply."""
    lost = {}
    for seed, run in table.get(name, {}).items():
        points = sorted((point["reward"], point["entropy"]) for point in references[seed]["optima"])
        points.append((math.inf, points[-1][1]))
        points.insert(0, (-math.inf, points[0][1]))
        lost[seed] = _interpolate(points, run["final"]["reward"]) - run["final"]["entropy"]
    return lost


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(points) if pair[0][0] <= x <= pair[1][0])
    if math.isinf(x0) or math.isinf(x1):
        return y0 if math.isinf(x1) else y1
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0


SAIL = (
    *("SAIL-DP", "SAIL-DP, mixed", "SAIL-PP", "SAIL-PP, baseline"),
    *("SAIL-PR", "SAIL-PR, baseline", "SAIL-PR, k 0.3", "SAIL-PR, k 0"),
)


def _sail(methods: dict) -> Claim:
    lines = [
        Line(figure, name, DPO, (final(methods, name, figure), final(methods, DPO, figure)))
        for name in SAIL
        for figure in ("reward", "objective")
        if name in methods
    ]
    meaning = (
        "The same beta and budget, each at its own best learning rate; k is the weight of the score term, 1 in the "
        "exact gradient; a baseline leaves the expected gradient as it is and takes most of its variance. Pure SAIL-DP "
        "and SAIL-PP take all labels from the policy, so that nothing tells them which answers are good; their "
        "authors' code mixes them with pairs that the data label, as the mixed row does (for PP and PR, whose pairs "
        "are drawn online, no such mixture is run here)."
    )
    return Claim("SAIL is above offline DPO", meaning, lines)


def _reward_heads(heads: dict) -> list[Claim]:
    claims = []
    for name, figure in (("AVA-p", "accuracy"), ("AVA-p", "accuracy_of_sums"), ("AVA-p, contrast 20", "accuracy")):
        if not any(heads.get(name, {}).values()):
            continue
        lines = [
            Line(
                f"pair accuracy, {noise:.0%} of the labels flipped",
                name,
                "Bradley-Terry",
                tuple(
                    {seed: run[key] for seed, run in heads[which].get(noise, {}).items()}
                    for which, key in ((name, figure), ("Bradley-Terry", "accuracy"))
                ),
            )
            for noise in heads[name]
        ]
        reading = "summed over the tokens" if figure == "accuracy_of_sums" else "at the last token"
        meaning = f"Accuracy on held-out pairs with true labels, AVA's reward {reading}; same model, pairs and steps."
        title = f"{name}'s reward ({reading}) ranks pairs better than a Bradley-Terry head"
        claims.append(Claim(title, meaning, lines))
    return claims


def _estimators(methods: dict) -> list[Claim]:
    group, batch = VAR, "VAR, batch, none"
    claims = []
    for title, pairs in (
        (
            "On y ~ pi_ref, log pi_ref in VAR's weights does harm",
            ((group, "VAR, group, sum"), (batch, "VAR, batch, sum")),
        ),
        (
            "On y ~ pi_ref, its mean over the tokens in VAR's weights does harm",
            ((group, "VAR, group, mean"), (batch, "VAR, batch, mean")),
        ),
        ("On y ~ pi_ref, Z of each prompt (self_normalised) is better than Z of the batch", ((group, batch),)),
    ):
        lines = [
            Line("objective", first, second, (final(methods, first, "objective"), final(methods, second, "objective")))
            for first, second in pairs
        ]
        meaning = (
            "The objective is lam log Z - lam KL(policy, pi*), so that a difference is one of distance from pi*. "
            f"{group} has the weights of self_normalised, without a reference term."
        )
        claims.append(Claim(title, meaning, lines))
    return claims
