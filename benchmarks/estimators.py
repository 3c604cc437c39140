"""Bias and spread of VAR's in-batch estimates of log Z against the true Z, and the policy that their weights reach.

    python benchmarks/estimators.py [--csv benchmarks/results/estimators.csv] [--plot docs/estimators.png]

A world whose responses can all be written down: 8 prompts, 64 responses each, pi_ref = softmax of normal logits,
rewards normal within a prompt and between prompts, lam = 1, fp64. For each estimator and number of samples B, about a
million draws are weighed as ``var_weights`` weighs them (which is checked on the first of them):

    error of log Z       its estimate, less the true log Z of what it stands for: mean (bias) and standard deviation
    reached              the distribution of y that the weighted draws have in expectation, in total variation from pi*
"""

import argparse
import csv
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from var_kernels import var_weights
from var_kernels.losses import CollapsedWeightsWarning

PROMPTS, RESPONSES, LAM = 8, 64, 1.0
SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
DRAWS = 1 << 20
CHECKED = 4  # batches that go through var_weights itself

# name: (normalizer, reference, y is drawn from, prompts of a batch, what is shown)
ESTIMATORS = {
    "self_normalised": ("self_normalised", "none", "pi_ref", "one", "self_normalised, y ~ pi_ref"),
    "batch, none": ("batch_mean", "none", "pi_ref", "all", "batch_mean without reference, y ~ pi_ref, mixed prompts"),
    "group": ("group", "sum", "uniform", "one", "group with reference, y uniform on the candidates"),
    "cross": ("cross", "sum", "uniform", "all", "cross with reference, y uniform on the candidates"),
    "batch": ("batch_mean", "sum", "uniform", "all", "batch_mean with reference, y uniform, mixed prompts"),
    "group, counted twice": (
        "group",
        "sum",
        "pi_ref",
        "one",
        "group with reference, y ~ pi_ref (pi_ref counted twice)",
    ),
}


class World:
    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.ref_logp = torch.log_softmax(1.5 * randn(PROMPTS, RESPONSES), 1)
        self.reward = randn(PROMPTS, RESPONSES) + 0.7 * randn(PROMPTS, 1)
        score = self.ref_logp + self.reward / LAM
        self.log_z = score.logsumexp(1)
        self.optimum = (score - self.log_z[:, None]).exp()
        self.generator = generator

    def draw(self, law: str, prompt: Tensor) -> Tensor:
        """A response for each prompt of the tensor."""
        table = self.ref_logp.exp() if law == "pi_ref" else torch.full_like(self.ref_logp, 1 / RESPONSES)
        flat = prompt.reshape(-1)
        drawn = torch.empty_like(flat)
        for x in range(PROMPTS):
            here = flat == x
            drawn[here] = torch.multinomial(table[x], int(here.sum()), replacement=True, generator=self.generator)
        return drawn.view(prompt.shape)


def measure(world: World, name: str, size: int) -> dict:
    """n batches of B draws: prompt, response, weight (n, B); log Z estimate and truth."""
    normalizer, reference, law, prompts, _ = ESTIMATORS[name]
    n = DRAWS // size
    if prompts == "one":
        prompt = torch.arange(n).remainder(PROMPTS)[:, None].expand(n, size)
    else:
        prompt = torch.randint(0, PROMPTS, (n, size), generator=world.generator)
    response = world.draw(law, prompt)
    reward, ref = world.reward[prompt, response], world.ref_logp[prompt, response]
    score = reward / LAM + (ref if reference == "sum" else 0.0)
    if normalizer == "cross":
        estimate, weight = _cross(world, prompt, response, score)
    else:
        total = score.logsumexp(1, keepdim=True)
        mean = normalizer in ("batch_mean", "self_normalised")
        estimate = total - math.log(size) if mean else total
        weight = (score - estimate).exp()
    _check(world, normalizer, reference, prompt, response, weight, estimate)
    # A sum over draws is B times a mean; a mean over a uniform law is 1 / RESPONSES of the candidates' own sum.
    if normalizer in ("group", "cross"):
        estimate = estimate - math.log(size)
    if law == "uniform":
        estimate = estimate + math.log(RESPONSES)
    if prompts == "one" or normalizer == "cross":
        truth = world.log_z[prompt][:, : estimate.shape[1]]
    else:
        truth = world.log_z.exp().mean().log()
    error = estimate - truth
    reached = torch.zeros_like(world.optimum).index_put((prompt, response), weight, accumulate=True)
    reached = reached / reached.sum(1, keepdim=True)
    distance = 0.5 * (reached - world.optimum).abs().sum(1).mean()
    return {"estimator": name, "samples": size, "bias": error.mean().item(), "sd": error.std().item(),
            "tv": distance.item()}  # fmt: skip


def _cross(world: World, prompt: Tensor, response: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """log Z_i = LSE_j a(x_i, y_j), rewards of each response under each prompt; by slices of batches."""
    table = world.ref_logp + world.reward / LAM
    parts = []
    for x, y in zip(prompt.split(64), response.split(64), strict=True):
        parts.append(table[x[:, :, None], y[:, None, :]].logsumexp(2))
    estimate = torch.cat(parts)
    return estimate, (own - estimate).exp()


def _check(world, normalizer, reference, prompt, response, weight, estimate) -> None:
    for batch in range(CHECKED):
        x, y = prompt[batch], response[batch]
        pairs = (x[:, None], y[None, :]) if normalizer == "cross" else (x, y)
        ref = world.ref_logp[pairs] if reference == "sum" else None
        groups = torch.zeros(len(x), dtype=torch.int64) if normalizer in ("group", "self_normalised") else None
        found = var_weights(
            world.reward[pairs], ref, lam=LAM, normalizer=normalizer, reference=reference, group_ids=groups
        )
        torch.testing.assert_close(found.weight, weight[batch])
        torch.testing.assert_close(found.log_z.expand_as(x), estimate[batch].expand_as(x))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9))
    colours = ["#1e8449", "#58b07a", "#2471a3", "#6c3483", "#5dade2", "#c0392b"]
    for (name, (*_, shown)), colour in zip(ESTIMATORS.items(), colours, strict=True):
        line = [row for row in rows if row["estimator"] == name]
        sizes = [row["samples"] for row in line]
        style = {"color": colour, "markersize": 3.5, "linestyle": "--" if "twice" in name or name == "cross" else "-"}
        for axis, key in zip(axes, ("bias", "sd", "tv"), strict=True):
            axis.plot(sizes, [row[key] for row in line], "o", **style, label=shown)
    titles = ("bias of log Z (nats)", "standard deviation of log Z (nats)", "total variation to pi* of what is reached")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlabel="samples B")
        axis.set_xticks(SIZES, [str(size) for size in SIZES], fontsize=7)
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].axhline(0, color="0.4", linewidth=0.8)
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, frameon=False, fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    from tqdm import tqdm

    world, rows = World(), []
    for name in tqdm(ESTIMATORS, unit="estimator"):
        rows += [measure(world, name, size) for size in SIZES]
    print("| estimator | | " + " | ".join(f"B {size}" for size in SIZES) + " |")
    print("|---|---|" + "---|" * len(SIZES))
    for name, (*_, shown) in ESTIMATORS.items():
        line = [row for row in rows if row["estimator"] == name]
        print(f"| {shown} | log Z | " + " | ".join(f"{row['bias']:+.3f} ± {row['sd']:.3f}" for row in line) + " |")
        print("| | TV | " + " | ".join(f"{row['tv']:.3f}" for row in line) + " |")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            file.write(
                f"# {PROMPTS} prompts, {RESPONSES} responses, lam {LAM:g}, {DRAWS} draws; torch {torch.__version__}\n"
            )
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    warnings.simplefilter("ignore", CollapsedWeightsWarning)  # batches of four
    main()
