"""Prompts to draw for, and what was drawn: as rows of training data, its measures, its importance weights."""

import logging
import math
import statistics
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from var_kernels.integrations.data import EncodedRows, Example, encode_prompts
from var_kernels.integrations.data.forms import Text
from var_kernels.integrations.trainer.collator import Items
from var_kernels.integrations.trainer.online.buffer import Drawn
from var_kernels.integrations.trainer.rewards import RewardFunction, columns_of

logger = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """A prompt that completions are drawn for."""

    text: Text
    where: str
    ids: list[int]  # leave room for the completion
    columns: dict  # of its row, those that the reward function reads


def prompts_of(examples: list[Example], tokenizer, args, reward_function: RewardFunction | None = None) -> list[Prompt]:
    """Each prompt once, or once with each value of the columns that the reward function reads."""
    once: dict[tuple, tuple] = {}
    for example in examples:
        columns = columns_of(example, reward_function)
        once.setdefault((example.prompt_key, repr(columns)), (example, columns))
    kept = list(once.values())
    room = args.max_length - args.max_new_tokens
    ids, cut = encode_prompts([example for example, _ in kept], tokenizer, room)
    if cut:
        logger.warning(
            "%d of %d prompts were cut to their last %d tokens (max_length - max_new_tokens), begin tokens among them",
            *(cut, len(ids), room),
        )
    return [Prompt(ex.prompt, ex.where[0], own, columns) for (ex, columns), own in zip(kept, ids, strict=True)]


class FixedLengthItems(Items):
    """A training set of as many items as an iteration's steps take, whatever number was drawn: all of them in a new
    order, again and again. Trainer counts its steps before anything is drawn."""

    def __init__(self, length: int):
        super().__init__(None, [])
        self.length = length

    def __len__(self) -> int:
        return self.length

    def fill(self, rows: EncodedRows, items: list[list[int]], generator: torch.Generator) -> None:
        places: list[int] = []
        while len(places) < self.length:
            places += torch.randperm(len(items), generator=generator).tolist()
        self.rows, self.items = rows, [items[place] for place in places[: self.length]]


def encode_drawn(drawn: list[Drawn], *, pairs: bool) -> EncodedRows:
    """The token ids as they were drawn: a text may be tokenised otherwise. pairs: two completions are (chosen,
    rejected)."""
    rewards = None
    if drawn[0].rewards is not None:
        rewards = torch.tensor([reward for entry in drawn for reward in entry.rewards], dtype=torch.float32)
    return EncodedRows.of(
        [(entry.prompt_ids, ids) for entry in drawn for ids in entry.completion_ids],
        [len(entry.completion_ids) for entry in drawn],
        reward=rewards,
        is_pair=[pairs] * len(drawn),
        where=[f"{entry.where}, sample {number + 1}" for entry in drawn for number in range(len(entry.completions))],
    )


def label_pairs(rows: EncodedRows, label_by: str, generator: torch.Generator) -> None:
    """Chosen first in every pair of ``rows.groups``: the label drawn from sigmoid(r_1 - r_2), or the higher reward
    (a tie is drawn)."""
    first, second = (rows.reward[[group[place] for group in rows.groups]].double() for place in (0, 1))
    chance = (first - second).sigmoid()
    if label_by == "higher":
        chance = torch.where(first == second, chance, (first > second).double())
    chosen = torch.rand(chance.shape, generator=generator, dtype=chance.dtype) < chance
    rows.groups = [group if keep else group[::-1] for group, keep in zip(rows.groups, chosen.tolist(), strict=True)]


def measures(drawn: list[Drawn], end_token_ids: tuple[int, ...]) -> dict[str, float]:
    """sample_reward_mean, _std (over all), _best (mean over prompts of the best), completion_length (tokens),
    unended_share (no end token within max_new_tokens), unique_share (different texts of a prompt, of all), distinct_2
    (different pairs of neighbouring tokens, of all). _best and unique_share: of several completions of a prompt."""
    ids = [completion for entry in drawn for completion in entry.completion_ids]
    pairs = [pair for completion in ids for pair in pairwise(completion)]
    result = {
        "completion_length": statistics.fmean(map(len, ids)),
        "unended_share": statistics.fmean(completion[-1] not in end_token_ids for completion in ids),
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 1.0,
    }
    several = len(drawn[0].completions) > 1
    if several:
        result["unique_share"] = statistics.fmean(
            len(set(map(repr, e.completions))) / len(e.completions) for e in drawn
        )
    if drawn[0].rewards is not None:
        rewards = [reward for entry in drawn for reward in entry.rewards]
        result["sample_reward_mean"] = statistics.fmean(rewards)
        result["sample_reward_std"] = statistics.pstdev(rewards)
        if several:
            result["sample_reward_best"] = statistics.fmean(max(entry.rewards) for entry in drawn)
    return result


def sampler_logps(drawn: list[Drawn], rows: EncodedRows) -> Tensor | None:
    """(tokens,) fp32 beside ``rows.token_ids``: the sampler's log-probs of completions, NaN on prompts; None where it
    gave none."""
    if any(entry.completion_logps is None for entry in drawn):
        return None
    found = torch.full(rows.token_ids.shape, math.nan)
    values = (logps for entry in drawn for logps in entry.completion_logps)
    for row, logps in enumerate(values):
        first = int(rows.offset[row] + rows.prompt_length[row])
        found[first : first + len(logps)] = torch.tensor(logps)
    return found


def truncated_weights(policy_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """(tokens,) min(exp(lp - lp_sampler), cap), 1 on prompts: truncated importance sampling.

    Source: arXiv 1802.01561 (V-trace), for samplers of another engine as TRL and verl have it.
    """
    return (policy_logp - sampler_logp).clamp(max=math.log(cap)).exp().nan_to_num(nan=1.0)
