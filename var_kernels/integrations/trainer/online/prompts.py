"""The prompts of online training: each once, as token ids that leave room for a completion."""

import logging
from typing import NamedTuple

from var_kernels.integrations.data import Example, encode_prompts
from var_kernels.integrations.data.forms import Text
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
