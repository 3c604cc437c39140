"""What a trainer is given: arguments that do not go together, and rows of the wrong form, refused before anything is
written.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from var_kernels.integrations.data import DataError, Example, Problem, encode_examples, merge_prompts, parse_row
from var_kernels.integrations.data.encode import rewards_of
from var_kernels.integrations.trainer.collator import Items
from var_kernels.integrations.trainer.config import AlignConfig
from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.integrations.trainer.online.settings import draws_pairs
from var_kernels.integrations.trainer.rewards import apply_reward_function

logger = logging.getLogger(__name__)


def check_arguments(args: AlignConfig, train_dataset, ref_model, peft_config) -> None:
    if not isinstance(args, AlignConfig):
        raise TypeError(f"args: expected a VARConfig or a method_config(...), got {type(args).__name__}")
    if isinstance(train_dataset, str | os.PathLike):
        raise TypeError(
            f"train_dataset: expected rows, got the name {str(train_dataset)!r}; load_examples(name) reads it"
        )
    if args.sync_ref_model and peft_config is not None:
        raise ValueError(
            "sync_ref_model: with peft_config the reference is the model without its adapter, which does not move; "
            "drop one"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"the launcher started {launched} processes, but transformers finds no accelerator and would have each "
            "train alone on all of the data, into one folder; pass use_cpu=True (--use-cpu) to train on CPUs together"
        )
    if args.device.type == "mps":
        raise ValueError(
            "Apple's mps has no float64, in which the weights of a batch and the metrics are summed; pass use_cpu=True "
            "(--use-cpu)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run torch.nn.DataParallel, which splits a batch's normaliser: "
            f"start one process per GPU (torchrun --nproc-per-node {args.n_gpu} ...), or set CUDA_VISIBLE_DEVICES=0"
        )


def check_teacher(args: AlignConfig, ref_model) -> None:
    if METHODS[args.method].teacher != "given":
        return
    if ref_model is None:
        raise ValueError(
            f"ref_model: method {args.method!r} needs a teacher, got none; pass ref_model=MODEL (--teacher NAME)"
        )
    if args.sync_ref_model:
        raise ValueError(f"sync_ref_model must be False for method {args.method!r}: its teacher does not move")


def check_online(args: AlignConfig, reward_func, sampler, ref_model) -> None:
    if not args.online:
        if sampler is not None:
            raise ValueError("sampler: draws completions for online training; pass online=True in the settings with it")
        if draws_pairs(args.method):
            logger.warning(
                "%s on the responses of a data set: its score term is that of responses drawn by the policy "
                "(online=True draws them)", args.method,
            )  # fmt: skip
        return
    if args.importance_cap is not None and sampler is None:
        raise ValueError(
            f"importance_cap must be None without a sampler, got {args.importance_cap}; the model's own generate draws "
            "from the policy itself"
        )
    if ref_model is not None and args.refresh_reference and METHODS[args.method].reference:
        raise ValueError(
            "ref_model: online with refresh_reference=True the reference is the policy at each iteration's start; pass "
            "refresh_reference=False with a reference of your own"
        )
    if reward_func is None and not (METHODS[args.method].policy_labels or METHODS[args.method].teacher == "given"):
        raise ValueError(
            f"reward_func: online, method {args.method!r} needs the reward of completions that are in no data set: "
            "pass a reward function (--reward module:function) or a reward model (--reward-model PATH); only sail_pp "
            "learns without, from the policy's own labels"
        )


def parsed_examples(rows, name: str, need_rewards: str) -> list[Example]:
    if isinstance(rows, Sequence) and rows and isinstance(rows[0], Example):
        parsed = list(rows)
        if need_rewards not in ("optional", "prompt"):
            lacking = [ex for ex in parsed if ex.rewards is None and not (need_rewards == "unless_pair" and ex.is_pair)]
            parsed += [
                Problem(
                    ex.where[0],
                    "rewards missing: this method needs rewards, in the data or from a reward function"
                    + ("; pairs without rewards are for method 'dpo' and its kin" if ex.is_pair else ""),
                )
                for ex in lacking
            ]
    else:
        parsed = [parse_row(row, f"{name} row {i + 1}", need_rewards) for i, row in enumerate(rows)]
    problems = [item for item in parsed if isinstance(item, Problem)]
    if problems:
        raise DataError(problems, remedy="mend or leave out these rows")
    if not parsed:
        raise DataError([Problem(name, "holds no rows")], remedy="there is nothing to train on")
    return parsed


def read_items(rows, name: str, args, method, tokenizer, reward_function, end_token_ids: Sequence[int]) -> Items:
    """Rows of data, or what ``load_examples`` returned, as the method's items: checked, scored by the reward function
    if there is one, and tokenised.

    Raises:
        DataError, ValueError: rows that the method, the tokenizer or the reward function cannot use.
    """
    examples = parsed_examples(rows, name, "optional" if reward_function is not None else method.need_rewards)
    if reward_function is not None:
        examples = [replace(example, rewards=None) for example in examples]
    examples = merge_prompts(examples)
    table = encode_examples(examples, tokenizer, args.max_length, end_token_ids)
    if reward_function is not None:
        table.reward = rewards_of(apply_reward_function(reward_function, examples, args, table.completion_ids))
    return Items(table, method.items(table, args))
