"""What is measured on an iteration's completions."""

import statistics
from itertools import pairwise

from var_kernels.integrations.trainer.online.buffer import Drawn


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
