"""Sampling, scoring, and what is estimated from it: reward, win rate, KL to the reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from var_kernels.integrations.hf import sequence_logprobs
from var_kernels.integrations.trainer.online import GenerateSampler

Prompt = str | list[dict]  # plain text, or messages for the tokenizer's chat template
Reward = Callable[[list[Prompt], list[str]], Sequence[float]]


@dataclass(frozen=True)
class Sampling:
    """Settings of the draws: ``batch`` sequences at once, from the softmax of logits / temperature, nothing cut off."""

    batch: int
    max_new_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """N = len(prompts) * k sampled replies, those to one prompt in a row."""

    prompts: list[Prompt]
    k: int
    token_ids: list[list[int]]  # of each reply, with its end token where it ended in time
    texts: list[str]
    ended: list[bool]
    rewards: list[float]


def prompt_ids(tokenizer, prompt: Prompt) -> list[int]:
    """The tokens that generation begins with."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def draw(
    model,
    tokenizer,
    prompts: list[Prompt],
    k: int,
    sampling: Sampling,
    reward: Reward,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Drawn:
    """k replies to each prompt, with their rewards. The global random state is kept."""
    sampler = GenerateSampler.of(model, tokenizer, tokenizer.pad_token_id)
    ids, token_ids, size = [prompt_ids(tokenizer, prompt) for prompt in prompts], [], _prompts_at_once(k, sampling)
    for start in range(0, len(prompts), size):
        settings = {"temperature": sampling.temperature, "max_new_tokens": sampling.max_new_tokens}
        made = sampler(model, ids[start : start + size], n=k, seed=seed * 10_000 + start, **settings)
        token_ids += [reply for replies in made for reply in replies]
        advance()
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    rewards = reward([prompt for prompt in prompts for _ in range(k)], texts)
    ended = [reply[-1] in sampler.end_token_ids for reply in token_ids]
    return Drawn(prompts, k, token_ids, texts, ended, [float(value) for value in rewards])


def draws(prompts: list[Prompt], k: int, sampling: Sampling) -> int:
    """The number of times that ``draw`` calls ``advance``."""
    return -(-len(prompts) // _prompts_at_once(k, sampling))


def _prompts_at_once(k: int, sampling: Sampling) -> int:
    return max(1, sampling.batch // k)


def rewards_of(drawn: Drawn) -> Tensor:
    """(P, k) fp32 rewards, one row per prompt."""
    return torch.tensor(drawn.rewards).view(len(drawn.prompts), drawn.k)


def first(drawn: Drawn, k: int | None) -> Drawn:
    """The first k replies to each prompt; all with None."""
    places = [i for i in range(len(drawn.texts)) if i % drawn.k < (k or drawn.k)]
    columns: Any = (drawn.token_ids, drawn.texts, drawn.ended, drawn.rewards)
    return Drawn(drawn.prompts, min(k or drawn.k, drawn.k), *([column[i] for i in places] for column in columns))


def kl_to_reference(
    policy, reference, tokenizer, drawn: Drawn, sampling: Sampling, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """(P, k) summands of the Monte-Carlo estimate of KL(policy || reference), nats per reply: s_policy - s_ref.

    Unbiased when the policy itself drew the replies. The sampled token ids are scored, not their text encoded again.
    """
    scores = [reply_logps(model, tokenizer, drawn, sampling, advance) for model in (policy, reference)]
    return scores[0] - scores[1]


@torch.no_grad()
def reply_logps(
    model, tokenizer, drawn: Drawn, sampling: Sampling, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """(P, k) log-probs of the replies under the model, nats; the mean of their negatives is its entropy if it drew
    them."""
    model.eval()
    prompts = [ids for prompt in drawn.prompts for ids in [prompt_ids(tokenizer, prompt)] * drawn.k]
    device, parts = model.device, []
    for start in range(0, len(prompts), sampling.batch):
        stop = start + sampling.batch
        pairs = list(zip(prompts[start:stop], drawn.token_ids[start:stop], strict=True))
        ids = [torch.tensor(prompt + reply) for prompt, reply in pairs]
        labels = [torch.tensor([-100] * len(prompt) + reply) for prompt, reply in pairs]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id).to(device),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100).to(device),
        }
        parts.append(sequence_logprobs(model, batch, temperature=sampling.temperature).cpu())
        advance()
    return torch.cat(parts).view(len(drawn.prompts), drawn.k)


def scorings(drawn_prompts: int, k: int, sampling: Sampling) -> int:
    """The number of times that ``kl_to_reference`` calls ``advance``."""
    return 2 * -(-drawn_prompts * k // sampling.batch)


def mean_and_error(values_PK: Tensor) -> tuple[float, float]:
    """Mean, and its standard error with prompts as the unit (replies to one prompt are alike)."""
    per_prompt = values_PK.double().mean(1)
    spread = per_prompt.std() if len(per_prompt) > 1 else torch.tensor(math.nan)
    return per_prompt.mean().item(), (spread / len(per_prompt) ** 0.5).item()


def win_rate(rewards_PK: Tensor, reference_PK: Tensor) -> Tensor:
    """(P, 1) share of a prompt's pairs (reply of the policy, of the reference) that the policy wins, ties by half."""
    gap_PKK = rewards_PK[:, :, None] - reference_PK[:, None, :]
    return ((gap_PKK > 0).float() + 0.5 * (gap_PKK == 0).float()).mean((1, 2)).unsqueeze(1)


def summarise(drawn: Drawn, reference: Drawn, kl_PJ: Tensor) -> dict:
    """The row of the result table that belongs to one policy. gain: over the reference, prompt by prompt. kl_PJ: of the
    first J replies to each prompt."""
    rewards_PK, before_PK = rewards_of(drawn), rewards_of(reference)
    gap_P1 = rewards_PK.mean(1, keepdim=True) - before_PK.mean(1, keepdim=True)
    figures = {
        "reward": rewards_PK,
        "gain": gap_P1,
        "win_rate": win_rate(rewards_PK, before_PK),  # 1/2 for the reference itself
        "kl": kl_PJ,
    }
    row = {}
    for name, values in figures.items():
        row[name], row[f"{name}_error"] = mean_and_error(values)
    return row | {"length": sum(map(len, drawn.token_ids)) / len(drawn.token_ids)}
