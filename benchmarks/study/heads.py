"""AVA-p's reward head against a Bradley-Terry head: the same model, pairs, batches and steps; only the loss differs."""

import itertools
import random

import torch
from torch import Tensor

from benchmarks.small_world import MAX_LENGTH
from benchmarks.study.measure import Texts
from benchmarks.study.plan import HEADS
from benchmarks.study.world_runs import Context, noisy_pairs, read_rows
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.heads import RewardHead, attach_head
from var_kernels.integrations.hf.model import next_labels
from var_kernels.losses import linear_loss
from var_kernels.losses.ava import bradley_terry_loss, last_value

_EVERY = 6  # held-out pairs a prompt


def reward_head(context: Context, seed: int, name: str, rate: float, noise: float) -> dict:
    """Accuracy on held-out pairs with clean labels, of the reward at the last token and of the sum over tokens."""
    plan, folder = context.plan, context.reference_folder(seed)
    model, tokenizer = context.load(folder)
    pairs = noisy_pairs(read_rows(folder / "train.jsonl"), noise, seed)
    clean = noisy_pairs(read_rows(folder / "held_out.jsonl"), 0.0, seed, _EVERY)
    train, test = (Texts(rows, tokenizer, MAX_LENGTH) for rows in (pairs, clean))
    head = attach_head(model, RewardHead(model.config.hidden_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, plan.head_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    model.train()
    for picked in itertools.islice(_batches(len(pairs), plan.head_pairs, seed), plan.head_steps):
        loss = _loss(
            model, head, train.batch([row for pair in picked for row in (2 * pair, 2 * pair + 1)], model.device), name
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    last, total = _rewards(model, head, test)
    return {
        "accuracy": _accuracy(last),
        "accuracy_of_sums": _accuracy(total),
        "training_pairs": len(pairs),
        "test_pairs": len(clean),
    }


def _loss(model, head, batch: dict[str, Tensor], name: str) -> Tensor:
    options = HEADS[name]

    def in_head(hidden: Tensor, lm_head) -> Tensor:
        labels = next_labels(batch["labels"], hidden)
        mu, log_sigma = head(hidden)
        if options is None:
            last_B = last_value(mu, labels != -100)
            return bradley_terry_loss(last_B[0::2], last_B[1::2]).mean()
        pairs = len(labels) // 2
        total = linear_loss(
            "ava_p", hidden, lm_head.lm_head_weight, labels, {"mu": mu, "log_sigma": log_sigma}, lm_head.bias,
            item_weight=torch.full((pairs,), 1 / pairs, device=hidden.device),
            head_options=lm_head.logit_options, **options,
        )  # fmt: skip
        return total[0] if isinstance(total, tuple) else total

    (loss,), _ = capture(model, in_head, {key: batch[key] for key in ("input_ids", "attention_mask")})
    return loss


@torch.no_grad()
def _rewards(model, head, texts: Texts) -> tuple[Tensor, Tensor]:
    """(rows,) mu at the last token of each completion, and the sum of mu over its tokens."""
    model.eval()
    last, total = [], []
    for start in range(0, len(texts), 256):
        batch = texts.batch(range(start, min(start + 256, len(texts))), model.device)

        def in_head(hidden: Tensor, lm_head, batch=batch) -> tuple[Tensor, Tensor]:
            kept = next_labels(batch["labels"], hidden) != -100
            mu, _ = head(hidden)
            return last_value(mu, kept), mu.where(kept, 0.0).sum(-1)

        (of_last, of_sum), _ = capture(model, in_head, {key: batch[key] for key in ("input_ids", "attention_mask")})
        last.append(of_last.cpu())
        total.append(of_sum.cpu())
    return torch.cat(last), torch.cat(total)


def _accuracy(rewards: Tensor) -> float:
    margin = rewards[0::2] - rewards[1::2]
    return ((margin.sign() + 1) / 2).mean().item()


def _batches(count: int, size: int, seed: int):
    """Numbers of pairs, every pair once before any comes again."""
    order, draw = [], random.Random(seed)
    while True:
        while len(order) < size:
            order += draw.sample(range(count), count)
        yield order[:size]
        order = order[size:]
