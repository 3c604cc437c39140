"""The iterations of online training: draw, score, keep, hand to the trainer. One iteration is an epoch of Trainer's."""

import hashlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from var_kernels.integrations.data import DataError, EncodedRows, Example, end_tokens
from var_kernels.integrations.hf.model import inner_model
from var_kernels.integrations.trainer.checks import check_positions
from var_kernels.integrations.trainer.config import draws_pairs, say_temperatures
from var_kernels.integrations.trainer.loading import pad_token
from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.integrations.trainer.online.buffer import Buffer, Drawn, Iteration
from var_kernels.integrations.trainer.online.draws import (
    FixedLengthItems,
    Prompt,
    encode_drawn,
    label_pairs,
    measures,
    prompts_of,
    sampler_logps,
    truncated_weights,
)
from var_kernels.integrations.trainer.online.sampler import (
    GenerateSampler,
    Sampler,
    Samples,
    check_completions,
    without_padding,
)
from var_kernels.integrations.trainer.progress import progress_bar
from var_kernels.integrations.trainer.ranks import check_same_rows, in_shares, together
from var_kernels.integrations.trainer.reference import hash_tensors
from var_kernels.integrations.trainer.reward_effect import check_rewards
from var_kernels.integrations.trainer.rewards import RewardFunction, apply_reward_function
from var_kernels.integrations.trainer.scoring import score_rows

logger = logging.getLogger(__name__)
BUFFER = "buffer"
_OVERFLOWS = "the model overflows on its own completions; lower the learning rate"


class OnlineLoop(TrainerCallback):
    """Fills the training set at the start of every iteration, from the buffer on disk where it is there already.

    What is drawn depends on the seed, the iteration, the batch of prompts and the policy alone, so a run that was
    killed draws the same again.

    Args:
        args: the settings of the run.
        prompts, eval_prompts: examples, of which the prompts are read. tokenizer: of the policy.
        sampler: None: ``GenerateSampler``. reward_function: None where the policy itself labels.

    Raises:
        DataError: prompts that cannot be tokenised, or have no token.
    """

    def __init__(
        self,
        args,
        prompts: list[Example],
        eval_prompts: list[Example] | None,
        tokenizer,
        sampler: Sampler | None,
        reward_function: RewardFunction | None,
    ):
        self.args, self.method, self.tokenizer = args, METHODS[args.method], tokenizer
        self.pad_token_id, self.sampler, self.reward_function = pad_token(tokenizer), sampler, reward_function
        self.prompts = prompts_of(prompts, tokenizer, args, reward_function)
        self.eval_prompts = eval_prompts and prompts_of(eval_prompts, tokenizer, args, reward_function)
        check_same_rows(_hash_of(self.prompts), "train_dataset")
        check_same_rows(_hash_of(self.eval_prompts or []), "eval_dataset")
        self.buffer = Buffer(Path(args.output_dir) / BUFFER)
        self.expected_items, self.rows_an_item = self._count_items()
        self.steps = args.steps_per_iteration or -(-self.expected_items // args.items_per_step)
        self.dataset = FixedLengthItems(self.steps * args.items_per_step)
        self.trainer: Any = None

    def check_model(self, model) -> None:
        prompts = [*self.prompts, *(self.eval_prompts or [])]
        longest = max(len(prompt.ids) for prompt in prompts) + self.args.max_new_tokens
        rows: Any = SimpleNamespace(offset=torch.tensor([0, longest]))
        check_positions(model, rows)

    def bind(self, trainer) -> None:
        self.trainer = trainer
        say_temperatures(self.args, getattr(inner_model(trainer.model), "generation_config", None))
        if self.sampler is None:
            self.sampler = GenerateSampler.of(trainer.model, self.tokenizer, self.pad_token_id)

    @property
    def reads_initial_model(self) -> bool:
        """True where the model that training began with is needed beside the policy."""
        return self.args.keep_initial_model or bool(self.method.reference and not self.args.refresh_reference)

    # ---- an iteration ------------------------------------------------------------------------------------------------

    def on_epoch_begin(self, args, state, control, **kwargs):
        iteration, steps_done = divmod(state.global_step, self.steps)
        stored = self._stored(iteration, steps_done)
        if stored is None:
            stored = self._make(iteration)
        rows = self._rows(iteration, stored)
        try:
            items = self.method.items(rows, self.args)
        except ValueError as error:
            raise ValueError(
                f"iteration {iteration}: {error}. What was drawn is in {self.buffer.path(iteration)}; more "
                "generations_per_prompt, or a reward that tells more apart"
            ) from error
        if steps_done == 0:
            check_rewards(rows, self.args, self.method, f"iteration {iteration}", refuse=False)
        self.dataset.fill(rows, items, self._generator("order", iteration))
        if steps_done == 0:  # a run that resumes in its middle has logged them
            for name, value in {**stored.metrics, "item_share": len(items) / self.expected_items}.items():
                self.trainer.step_metrics["train"].add(name, value, 1.0)

    def _rows(self, iteration: int, stored: Iteration) -> EncodedRows:
        rows = encode_drawn(stored.drawn, pairs=draws_pairs(self.args.method))
        rows.columns, rows.token_columns = dict(stored.columns), dict(stored.token_columns)
        if draws_pairs(self.args.method) and not self.method.loss.policy_labels:
            label_pairs(rows, self.args.label_by, self._generator("label", iteration))
        if self.method.columns is not None:
            rows.columns |= self.method.columns(rows, self.args, rows)
        return rows

    def _stored(self, iteration: int, steps_done: int) -> Iteration | None:
        """The iteration as an earlier run left it: as it is in its middle, at its start if this policy drew it."""
        settings = self._settings(iteration)
        policy = None if steps_done else self._policy()
        found = [self.buffer.read(iteration) if self.trainer.accelerator.is_main_process else None]
        if self.trainer.accelerator.num_processes > 1:
            broadcast_object_list(found)
        (stored,) = found
        if stored is not None:
            for name, value in (("logp_temperature", 1.0), ("importance_cap", None)):
                stored.settings.setdefault(name, value)  # of a buffer from before there was this setting
        if steps_done:
            if stored is None:
                raise FileNotFoundError(
                    f"{self.buffer.path(iteration)} (and the .safetensors beside it) must be whole, since the run "
                    f"resumes after {steps_done} steps on it, got a missing or damaged file; resume from a checkpoint "
                    f"of a step that is a multiple of {self.steps}, or start anew"
                )
            for name, value in settings.items():
                if stored.settings.get(name) != value:
                    raise ValueError(
                        f"{name} must be {stored.settings.get(name)}, with which iteration {iteration} was drawn, to "
                        f"resume in its middle, got {value}; a new value can begin with an iteration"
                    )
            return stored
        if stored is not None and (stored.settings != settings or stored.policy != policy):
            logger.warning("%s was drawn by another policy or with other settings: drawn anew",
                           self.buffer.path(iteration))  # fmt: skip
            return None
        if stored is not None:
            logger.info("iteration %d is taken from %s", iteration, self.buffer.path(iteration))
        return stored

    def _make(self, iteration: int) -> Iteration:
        settings, policy = self._settings(iteration), self._policy()
        prompts = self._prompts_of(iteration)
        began = time.monotonic()
        count = self.args.generations_per_prompt
        mine = together(lambda: self._draw(prompts, count, f"iteration {iteration}", "sample", iteration))
        sampling_seconds = time.monotonic() - began
        began = time.monotonic()
        drawn = _in_order(in_shares(lambda: self._score(mine, prompts, f"iteration {iteration}, ")))
        scoring_seconds = time.monotonic() - began
        stored = Iteration(settings, policy, drawn)
        self._add_log_probs(stored)
        stored.metrics |= measures(drawn, self._end_token_ids)
        stored.metrics |= {"sampling_seconds": sampling_seconds, "scoring_seconds": scoring_seconds}
        if self.trainer.accelerator.is_main_process:
            self.buffer.write(iteration, stored)
        self.trainer.accelerator.wait_for_everyone()
        return stored

    def _draw(self, prompts: list[Prompt], count: int, title: str, *place) -> list[tuple[int, Drawn]]:
        """``count`` completions of each prompt of this rank's share: every so many batches, of prompts of like length.
        place: what the seeds depend on, beside the batch."""
        result = []
        for number, members in self._batches(prompts, count, f"{title}: sampling"):
            chunk = [prompts[member] for member in members]
            made, logps = self._sample([prompt.ids for prompt in chunk], count, (*place, number))
            for at, (member, prompt) in enumerate(zip(members, chunk, strict=True)):
                texts = [self._text(prompt.text, ids) for ids in made[at]]
                known = (prompt.where, prompt.ids, made[at], None if logps is None else logps[at])
                result.append((member, Drawn(prompt.text, texts, None, *known)))
        return result

    def _batches(self, prompts: list[Prompt], count: int, title: str):
        """(number, places in prompts): the same batches whatever the number of ranks, this rank's share of them."""
        accelerator = self.trainer.accelerator
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids), reverse=True)
        size = max(1, self.args.sampling_batch_size // count)
        batches = list(enumerate(order[start : start + size] for start in range(0, len(order), size)))
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        total = sum(len(members) for _, members in mine)
        with progress_bar(self.args, title, total, "prompt") as advance:
            for number, members in mine:
                yield number, members
                advance(len(members))

    def _sample(self, prompt_ids: list[list[int]], count: int, place: tuple) -> Samples:
        args, trainer = self.args, self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer.accelerator.autocast():  # the policy in the precision in which it is trained
            made = self.sampler(
                model,
                prompt_ids,
                n=count,
                temperature=args.sampling_temperature,
                max_new_tokens=args.max_new_tokens,
                seed=seed_of(args.seed, *place),
            )
        vocabulary = model.get_input_embeddings().weight.shape[0]
        made, logps = check_completions(made, prompt_ids, count, args.max_new_tokens, vocabulary)
        fillers = {*self._end_token_ids, self.pad_token_id}
        kept = [[without_padding(ids, self._end_token_ids, fillers) for ids in completions] for completions in made]
        if logps is not None:
            pairs = (zip(*both, strict=True) for both in zip(kept, logps, strict=True))
            logps = [[values[: len(ids)] for ids, values in pair] for pair in pairs]
        return Samples(kept, logps)

    def _text(self, prompt, ids: list[int]):
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def _score(self, mine: list[tuple[int, Drawn]], prompts: list[Prompt], place: str) -> list[tuple[int, Drawn]]:
        if self.reward_function is None:
            return mine
        examples = [
            Example(drawn.prompt, drawn.completions, None,
                    [f"{place}{drawn.where}, sample {number + 1}" for number in range(len(drawn.completions))],
                    columns=[prompts[member].columns] * len(drawn.completions))
            for member, drawn in mine
        ]  # fmt: skip
        completion_ids = [ids for _, drawn in mine for ids in drawn.completion_ids]
        try:
            scored = apply_reward_function(self.reward_function, examples, self.args, completion_ids.__getitem__)
        except DataError as error:
            remedy = "mend the reward function and resume, which draws the same completions again"
            raise DataError(error.problems, remedy=remedy) from error
        return [
            (place, replace(drawn, rewards=example.rewards))
            for (place, drawn), example in zip(mine, scored, strict=True)
        ]

    @property
    def _end_token_ids(self) -> tuple[int, ...]:
        return getattr(self.sampler, "end_token_ids", None) or end_tokens(
            self.tokenizer, inner_model(self.trainer.model)
        )

    def evaluate(self, examples: list[Example] | None = None) -> dict[str, float]:
        """Measures of one completion of every evaluation prompt, or of those of ``examples``, the draws' seeds the same
        at each call."""
        given = examples is not None
        made_of = (self.tokenizer, self.args, self.reward_function)
        eval_prompts = prompts_of(examples, *made_of) if given else self.eval_prompts
        if not eval_prompts:
            raise ValueError("eval_dataset must hold prompts to evaluate on, got none; pass an evaluation set")

        def work():
            return self._score(self._draw(eval_prompts, 1, "evaluation", "eval"), eval_prompts, "")

        return measures(_in_order(in_shares(work)), self._end_token_ids)

    def _add_log_probs(self, stored: Iteration) -> None:
        """Under the policy as it is, and under the reference. Every rank calls it."""
        trainer, reads = self.trainer, self.method.loss.inputs
        rows = encode_drawn(stored.drawn, pairs=False)
        refresh = self.args.refresh_reference
        now = initial = None
        drawn_by = {"old_token_logp", "old_logp"} & set(reads)  # the policy as it is
        cap, by_policy = self.args.importance_cap, self.method.reference and refresh
        if drawn_by or by_policy or self.args.keep_initial_model or cap is not None:
            now = score_rows(trainer, trainer.accelerator.unwrap_model(trainer.model), rows, "policy", _OVERFLOWS)
        if self.reads_initial_model:
            model = trainer.model if trainer.ref_model is None else trainer.ref_model
            with trainer.reference_policy.applied(model):
                initial = score_rows(trainer, model, rows, "initial model", _OVERFLOWS)
        if "old_token_logp" in drawn_by:
            stored.token_columns["old_token_logp"] = now
        if now is not None and (drawn := sampler_logps(stored.drawn, rows)) is not None:
            stored.metrics["sampler_logp_gap"] = (now - drawn).abs().nanmean().item()
            if cap is not None:
                stored.token_columns["sampler_weight"] = truncated_weights(now, drawn, cap)
        elif cap is not None:
            raise ValueError(
                "importance_cap: the sampler must return log-probs of its draws, got none; return Samples with logps"
            )
        if "old_logp" in drawn_by:
            stored.columns["old_logp"] = rows.row_sums(now)
        if self.method.reference:
            ref = now if refresh else initial
            if "ref_token_logp" in reads:
                stored.token_columns["ref_token_logp"] = ref.clone()
            if ref is not None:
                stored.columns["ref_logp"] = rows.row_sums(ref)
        if now is not None and initial is not None:
            stored.metrics["sample_kl"] = rows.row_sums(now - initial).mean().item()

    # ---- what it depends on ------------------------------------------------------------------------------------------

    def _prompts_of(self, iteration: int) -> list[Prompt]:
        """The next prompts_per_iteration of an endless row of permutations of the prompts."""
        size, count = len(self.prompts), self.args.prompts_per_iteration
        chosen = []
        for position in range(iteration * count, (iteration + 1) * count):
            turn, place = divmod(position, size)
            if not chosen or place == 0:
                order = torch.randperm(size, generator=self._generator("prompts", turn)).tolist()
            chosen.append(self.prompts[order[place]])
        return chosen

    def _generator(self, *place) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.args.seed, *place))

    def _settings(self, iteration: int) -> dict:
        args = self.args
        names = ("method", "seed", "generations_per_prompt", "sampling_temperature", "max_new_tokens",
                 "sampling_batch_size", "prompts_per_iteration", "refresh_reference", "logp_temperature",
                 "importance_cap")  # fmt: skip
        settings = {name: getattr(args, name) for name in names}
        return {
            **settings,
            "steps_per_iteration": self.steps,
            "prompts": _hash_of(self._prompts_of(iteration)),
        }

    def _policy(self) -> str:
        """Hash of the weights that training moves."""
        named = self.trainer.model.named_parameters()
        return hash_tensors((name, weight.detach()) for name, weight in named if weight.requires_grad)

    def _count_items(self) -> tuple[int, int]:
        """Items of an iteration in which no two completions of a prompt have the same reward, and rows of an item."""
        count = self.args.generations_per_prompt
        drawn = [
            Drawn("", [""] * count, [float(number) for number in range(count)], "", [0], [[0]] * count)
            for _ in range(self.args.prompts_per_iteration)
        ]
        items = self.method.items(encode_drawn(drawn, pairs=draws_pairs(self.args.method)), self.args)
        return len(items), max(map(len, items))


def _hash_of(prompts: list[Prompt]) -> str:
    known = [(prompt.ids, prompt.columns) for prompt in prompts]
    return hashlib.sha256(repr((known,)).encode()).hexdigest()


def _in_order(shares: list[tuple[int, Drawn]]) -> list[Drawn]:
    return [entry for _, entry in sorted(shares, key=lambda item: item[0])]


def seed_of(*place) -> int:
    """56 bits, apart for every place: what is drawn for two places has nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:7], "big")
