"""Sampling, scoring, and what is estimated from it: reward, win rate, KL to the reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from var_kernels.cli.demo.world import Score, Task, score
from var_kernels.integrations.hf import sequence_logprobs

MAX_NEW_TOKENS = 48
_CHUNK = 512  # sequences at once


@dataclass(frozen=True)
class Drawn:
    """N = len(tasks) * k sampled replies, those to one task in a row."""

    tasks: list[Task]
    k: int
    token_ids: list[list[int]]  # of each reply, with its end-of-sequence token where it ended in time
    texts: list[str]
    scores: list[Score]


@torch.no_grad()
def draw(
    model,
    tokenizer,
    tasks: list[Task],
    k: int,
    seed: int,
    advance: Callable[[], None] | None = None,
    max_new_tokens: int | None = None,
) -> Drawn:
    """k replies to each task, sampled at temperature 1 from the whole vocabulary. The global random state is kept.

    max_new_tokens: None: ``MAX_NEW_TOKENS``.
    """
    model.eval()
    prompts = [task.prompt for task in tasks for _ in range(k)]
    device, token_ids = model.device, []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), _CHUNK):
            inputs = tokenizer(prompts[start : start + _CHUNK], return_tensors="pt", padding=True, padding_side="left")
            replies = model.generate(
                input_ids=inputs.input_ids.to(device),
                attention_mask=inputs.attention_mask.to(device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )[:, inputs.input_ids.shape[1] :]
            token_ids += [_until_end(row, tokenizer.eos_token_id) for row in replies.tolist()]
            if advance is not None:
                advance()
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    scores = [score(task, text) for task, text in zip((task for task in tasks for _ in range(k)), texts, strict=True)]
    return Drawn(tasks, k, token_ids, texts, scores)


def chunks(tasks: list[Task], k: int) -> int:
    """How often ``draw`` calls ``advance``."""
    return -(-len(tasks) * k // _CHUNK)


def _until_end(token_ids: list[int], eos: int) -> list[int]:
    return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids


def rewards_of(drawn: Drawn) -> Tensor:
    """(P, k) fp32 rewards in points, one row per task."""
    return torch.tensor([score.reward for score in drawn.scores]).view(len(drawn.tasks), drawn.k)


def kl_to_reference(policy, reference, tokenizer, drawn: Drawn) -> Tensor:
    """(P, k) summands of the Monte-Carlo estimate of KL(policy || reference), nats per reply: s_policy - s_ref.

    Unbiased when the policy itself drew the replies. The sampled token ids are scored, not their text encoded again.
    """
    return reply_logps(policy, tokenizer, drawn) - reply_logps(reference, tokenizer, drawn)


@torch.no_grad()
def reply_logps(model, tokenizer, drawn: Drawn) -> Tensor:
    """(P, k) log-probs of the replies under the model, nats; the mean of their negatives is its entropy if it drew
    them."""
    model.eval()
    prompts = [tokenizer(task.prompt).input_ids for task in drawn.tasks for _ in range(drawn.k)]
    device, parts = model.device, []
    for start in range(0, len(prompts), _CHUNK):
        pairs = list(zip(prompts[start : start + _CHUNK], drawn.token_ids[start : start + _CHUNK], strict=True))
        ids = [torch.tensor(prompt + reply) for prompt, reply in pairs]
        labels = [torch.tensor([-100] * len(prompt) + reply) for prompt, reply in pairs]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id).to(device),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100).to(device),
        }
        parts.append(sequence_logprobs(model, batch).cpu())
    return torch.cat(parts).view(len(drawn.tasks), drawn.k)


def mean_and_error(values_PK: Tensor) -> tuple[float, float]:
    """Mean, and its standard error with prompts as the unit (replies to one prompt are alike)."""
    per_prompt = values_PK.double().mean(1)
    spread = per_prompt.std() if len(per_prompt) > 1 else torch.tensor(math.nan)
    return per_prompt.mean().item(), (spread / len(per_prompt) ** 0.5).item()


def win_rate(rewards_PK: Tensor, reference_PK: Tensor) -> Tensor:
    """(P, 1) share of a prompt's pairs (reply of the policy, of the reference) that the policy wins, ties by half."""
    gap_PKK = rewards_PK[:, :, None] - reference_PK[:, None, :]
    return ((gap_PKK > 0).float() + 0.5 * (gap_PKK == 0).float()).mean((1, 2)).unsqueeze(1)


def summarise(drawn: Drawn, reference: Drawn, kl_PK: Tensor) -> dict:
    """The row of the result table that belongs to one policy."""
    reward, reward_error = mean_and_error(rewards_of(drawn))
    win, win_error = mean_and_error(win_rate(rewards_of(drawn), rewards_of(reference)))  # 1/2 for the reference itself
    kl, kl_error = mean_and_error(kl_PK)
    shares = {
        name: sum(getattr(score, name) for score in drawn.scores) / len(drawn.scores)
        for name in ("right", "friendly", "rude", "too_long")
    }
    perfect = sum(score.reward == 2 for score in drawn.scores) / len(drawn.scores)
    return {
        "reward": reward,
        "reward_error": reward_error,
        "win_rate": win,
        "win_rate_error": win_error,
        "kl": kl,
        "kl_error": kl_error,
        **shares,
        "perfect": perfect,
    }
