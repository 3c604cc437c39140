"""Effective sample size of VAR's weights on real rewards: each reference term, estimator and lam.

    python benchmarks/ess.py REWARDS.jsonl.gz [--csv benchmarks/results/ess.csv] [--plot docs/ess.png]

REWARDS: one JSON object a line with "prompt", "completions" and "rewards". No pretrained model is needed: a byte-level
BPE tokenizer and a small Llama are trained from scratch on most of the prompts, and are the reference for the others.
"""

import argparse
import csv
import gzip
import json
import math
import platform
import random
import statistics
import time
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from var_kernels import var_weights
from var_kernels.integrations.hf import cross_reference_logprobs, fused_lm_head, sequence_logprobs
from var_kernels.losses import CollapsedWeightsWarning, IgnoredRewardsWarning, effective_sample_size

LAMS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
REFERENCES = ("sum", "mean", "none")
BATCH, SHUFFLES, CONTEXT = 32, 20, 1024
CROSS_TOKENS = 200  # cross scores take the first completion of each prompt that is no longer: B^2 forward passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the reference, 2048 tokens each")
    parser.add_argument("--held-out", type=int, default=200, help="prompts that are scored and not trained on")
    parser.add_argument("--cross-batches", type=int, default=3, help=f"batches of {BATCH} x {BATCH} cross scores")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    opener = gzip.open if args.rewards.suffix == ".gz" else open
    with opener(args.rewards, "rt", encoding="utf-8") as lines:
        data = [json.loads(line) for line in lines]
    random.shuffle(data)
    held_out, training = data[: args.held_out], data[args.held_out :]

    tokenizer = train_tokenizer(training)
    model = train_model([tokenize(tokenizer, row) for row in training], args.steps)
    scored = score(model, [tokenize(tokenizer, row) for row in held_out], [row["rewards"] for row in held_out])
    describe(scored)
    table = [*batch_rows(scored), *group_rows(scored), *cross_rows(model, scored, args.cross_batches)]
    print_table(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    if args.plot:
        plot(table, args.plot)


# -- the reference policy --------------------------------------------------------------------------------------------


def train_tokenizer(rows, vocab_size: int = 4096) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>", "<answer>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator((text for row in rows for text in (row["prompt"], *row["completions"])), trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, row) -> tuple[list[int], list[list[int]]]:
    """Prompt ids, and the ids of each completion with the end token; a prompt of half the context at most."""
    end, answer = tokenizer.token_to_id("<end>"), tokenizer.token_to_id("<answer>")
    prompt = [end, *tokenizer.encode(row["prompt"]).ids[-CONTEXT // 2 :], answer]
    completions = [[*tokenizer.encode(text).ids, end] for text in row["completions"]]
    return prompt, [ids[: CONTEXT - len(prompt)] for ids in completions]


def train_model(rows, steps: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=False, use_cache=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    documents = [prompt + ids for prompt, completions in rows for ids in completions]
    random.shuffle(documents)
    stream = torch.tensor([token for ids in documents for token in ids])
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    start = time.perf_counter()
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (2,))]
        with fused_lm_head(model):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{steps}, loss {loss.item():.2f} nats a token, {seconds:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def score(model, rows, rewards):
    """Tensors over all held-out completions, and their ids for the cross scores."""
    prompts = [prompt for prompt, completions in rows for _ in completions]
    completions = [ids for _, several in rows for ids in several]
    logp = torch.zeros(len(completions))
    by_length = sorted(range(len(completions)), key=lambda i: len(prompts[i]) + len(completions[i]))
    for start in range(0, len(by_length), 8):
        chosen = by_length[start : start + 8]
        longest = max(len(prompts[i]) + len(completions[i]) for i in chosen)
        input_ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
        for row, i in enumerate(chosen):
            ids = torch.tensor(prompts[i] + completions[i])
            input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
            labels[row, len(prompts[i]) : len(ids)] = ids[len(prompts[i]) :]
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        logp[chosen] = sequence_logprobs(model, batch).float()
    return {
        "logp": logp,
        "rewards": torch.tensor([value for several in rewards for value in several]),
        "lengths": torch.tensor([len(ids) for ids in completions]),
        "group": torch.tensor([g for g, (_, several) in enumerate(rows) for _ in several]),
        "prompts": prompts,
        "completions": completions,
    }


def describe(scored) -> None:
    logp, lengths, rewards = scored["logp"], scored["lengths"], scored["rewards"]
    whole = sum(ids[-1] == 0 for ids in scored["completions"]) / len(lengths)
    nll = -logp.sum() / lengths.sum()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{len(logp)} held-out completions: {nll:.2f} nats a token, {whole:.1%} whole in the context")
    print(f"summed log-prob: mean {logp.mean():.0f}, standard deviation {logp.std():.0f} nats")
    print(f"per-token mean: standard deviation {(logp / lengths).std():.2f} nats; rewards: {rewards.std():.2f}")


# -- the weights -----------------------------------------------------------------------------------------------------


def ess_of(scored, rows, lam: float, reference: str, ref_logp=None) -> tuple[float, float]:
    """ESS and median weight of one batch; ref_logp (B, B) for the cross estimator."""
    weights = var_weights(
        scored["rewards"][rows],
        scored["logp"][rows] if ref_logp is None else ref_logp,
        lam=lam,
        normalizer="batch" if ref_logp is None else "cross",
        reference=reference,
        lengths=scored["lengths"][rows],
    )
    return effective_sample_size(weights.weight.double()).item(), weights.weight.median().item()


def summary(normalizer: str, size: int, reference: str, lam: float, batches) -> dict:
    ess = sorted(value for value, _ in batches)
    return {
        "normalizer": normalizer,
        "size": size,
        "reference": reference,
        "lam": lam,
        "ess_median": round(statistics.median(ess), 2),
        "ess_p20": round(ess[len(ess) // 5], 2),
        "ess_p80": round(ess[len(ess) * 4 // 5], 2),
        "median_weight": round(statistics.median(weight for _, weight in batches), 4),
        "batches": len(ess),
    }


def batch_rows(scored) -> list[dict]:
    """Shuffled batches of completions to mixed prompts."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(scored["logp"]), generator=generator) for _ in range(SHUFFLES)]
    batches = [rows for order in orders for rows in order.split(BATCH) if len(rows) == BATCH]
    return [
        summary("batch", BATCH, reference, lam, [ess_of(scored, rows, lam, reference) for rows in batches])
        for reference in REFERENCES
        for lam in LAMS
    ]


def group_rows(scored) -> list[dict]:
    """One group a prompt: all its completions."""
    groups = [(scored["group"] == g).nonzero().flatten() for g in scored["group"].unique()]
    return [
        summary("group", len(groups[0]), reference, lam, [ess_of(scored, rows, lam, reference) for rows in groups])
        for reference in REFERENCES
        for lam in LAMS
    ]


def cross_rows(model, scored, count: int) -> list[dict]:
    """Batches of one short completion each to different prompts, every completion scored under every prompt."""
    short = [(scored["group"] == g) & (scored["lengths"] <= CROSS_TOKENS) for g in scored["group"].unique()]
    first = torch.tensor([fits.nonzero()[0].item() for fits in short if fits.any()])
    batches = [rows for rows in first.split(BATCH) if len(rows) == BATCH][:count]
    results = {(reference, lam): [] for reference in ("sum", "mean") for lam in LAMS}
    for rows in batches:
        prompts, completions = ([scored[name][i] for i in rows] for name in ("prompts", "completions"))
        with torch.no_grad():
            ref_logp = cross_reference_logprobs(model, prompts, completions).float()
        for reference, lam in results:
            results[reference, lam].append(ess_of(scored, rows, lam, reference, ref_logp))
    return [summary("cross", BATCH, *key, values) for key, values in results.items() if values]


# -- what comes out --------------------------------------------------------------------------------------------------


def print_table(table) -> None:
    print("\n| estimator | reference | " + " | ".join(f"lam {lam:g}" for lam in LAMS) + " |")
    print("|---|---|" + "---|" * len(LAMS))
    for normalizer, reference in dict.fromkeys((row["normalizer"], row["reference"]) for row in table):
        chosen = [row for row in table if (row["normalizer"], row["reference"]) == (normalizer, reference)]
        cells = " | ".join(f"{row['ess_median']:.1f}" for row in chosen)
        print(f"| {normalizer} (of {chosen[0]['size']}) | {reference} | {cells} |")


def plot(table, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    colours = {"sum": "#c0392b", "mean": "#2471a3", "none": "#1e8449"}
    names = {"sum": "summed log-prob", "mean": "per-token mean", "none": "no reference term"}
    for axis, normalizer in zip(axes, ("batch", "group"), strict=True):
        rows = [row for row in table if row["normalizer"] == normalizer]
        size = rows[0]["size"]
        for reference in REFERENCES:
            line = [row for row in rows if row["reference"] == reference]
            lams = [row["lam"] for row in line]
            low, high = ([row[name] for row in line] for name in ("ess_p20", "ess_p80"))
            axis.fill_between(lams, low, high, color=colours[reference], alpha=0.15, linewidth=0)
            axis.plot(lams, [row["ess_median"] for row in line], "o-", color=colours[reference], markersize=4,
                      label=names[reference])  # fmt: skip
        axis.axhline(1 + 0.1 * (size - 1), color="0.4", linewidth=0.8, linestyle=":")
        axis.text(LAMS[-1], 1 + 0.1 * (size - 1), "warned below ", fontsize=8, color="0.4", ha="right", va="bottom")
        axis.set(xscale="log", xlabel="lam (reward units, rewards in [0, 1])", ylim=(0, size * 1.05))
        axis.set_title(
            {"batch": f"batch of {size}, mixed prompts", "group": f"{size} completions of one prompt"}[normalizer]
        )
    axes[0].set_ylabel("effective sample size (sequences)")
    axes[0].legend(frameon=False, fontsize=9, loc="center right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    warnings.simplefilter("ignore", CollapsedWeightsWarning)  # what is measured here
    warnings.simplefilter("ignore", IgnoredRewardsWarning)  # prompts whose eight rewards are equal
    main()
