"""VARTrainer: transformers.Trainer with the loss computed inside the lm_head and normalised over the global batch."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.data import EncodedRows, Example, end_tokens
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.forwards import swapped
from var_kernels.integrations.hf.heads import attach_head, load_head
from var_kernels.integrations.hf.model import inner_model, next_labels
from var_kernels.integrations.trainer.checks import (
    check_arguments,
    check_drops,
    check_learns,
    check_online,
    check_positions,
    check_steps,
    check_teacher,
    check_trainable,
    check_vocabulary,
    disable_dropout,
    freeze_head,
)
from var_kernels.integrations.trainer.collator import (
    Items,
    RowCollator,
    first_items,
    parsed_examples,
    read_items,
    tables_of,
)
from var_kernels.integrations.trainer.config import AlignConfig, VARConfig
from var_kernels.integrations.trainer.loading import load_causal_lm, load_tokenizer, pad_token
from var_kernels.integrations.trainer.methods import METHODS, Method
from var_kernels.integrations.trainer.online import OnlineLoop, Sampler
from var_kernels.integrations.trainer.online.loop import seed_of
from var_kernels.integrations.trainer.ranks import of_first_rank
from var_kernels.integrations.trainer.record import MetricsFile, StepLines, write_model_card
from var_kernels.integrations.trainer.reference import ReferencePolicy, SyncReference, model_fingerprint
from var_kernels.integrations.trainer.reward_effect import check_rewards
from var_kernels.integrations.trainer.reward_model import judge_pairs
from var_kernels.integrations.trainer.rewards import RewardFunction, RewardSum, as_reward_function
from var_kernels.integrations.trainer.sharding import (
    calibrate_first_rank,
    check_layout,
    whole_when_saved,
)
from var_kernels.integrations.trainer.step import (
    HeadResult,
    StepMetrics,
    loss_in_head,
    method_rows,
    stop_unless_finite,
)
from var_kernels.integrations.trainer.value_head import new_head

logger = logging.getLogger(__name__)
_REF_MODEL_DIR = "ref_model"


class VARTrainer(Trainer):
    """Aligns a causal LM by VAR, or by any other method of the registry, on rows with rewards or pairs.

    The loss of an optimiser step is that of its global batch, over all ranks and gradient-accumulation steps:

        var          sum_i w_i nll_i / sum_i w_i     w = var_weights(...), nll_i = -log pi(y_i | x_i)
        sft, dft     sum over tokens / number of tokens
        pairs        mean over pairs of the loss: dpo, ipo, sail_dp, ...
        prompts      mean over prompts of the sum over their completions: exo, lire, ppo, grpo, ...
        others       mean over completions: alol, dro, kto, ...

    Logged besides Trainer's own: the table of docs/training.md, "What is logged".

    Args:
        model: a causal LM, or its name or path (loaded in fp32, whatever the checkpoint's dtype is; an adapter that
            was saved there is merged into its base).
        args: a ``VARConfig``, or another method's settings (``method_config("ipo")``). A batch size counts items:
            completions, or pairs, or prompts with all their completions where the method compares those.
        train_dataset, eval_dataset: rows in a form of docs/data.md (dicts, a datasets.Dataset), or what
            ``load_examples`` returns. eval_dataset may be several by name, ``{"short": rows, "long": rows}``.
        processing_class: the tokenizer, or its name or path; by default the model's own.
        ref_model: the reference policy; by default the model as it is given, and with PEFT the model without its
            adapter. Of method "distill" the teacher, with the student's tokenizer.
        reward_func: ``f(prompts, completions, **columns) -> floats``, replaces the rewards in the data (docs/data.md,
            "Reward functions"). A ``RewardModel`` is one. Several: a list, their sum, or a ``RewardSum`` with weights.
        sampler: with ``online=True``: what draws completions; by default the model's own ``generate``.
        peft_config: train this PEFT adapter in place of the whole model.

    Raises:
        DataError: malformed rows, with the place of each, before anything is written.
        ValueError, TypeError: settings that do not go together, a model whose head is not understood; as early.
        NonFiniteLossError: from ``train``, at a loss that is NaN or infinite, before it reaches the weights.
    """

    loss_is_scaled_for_ga = True

    method: Method
    pad_token_id: int
    online: OnlineLoop | None  # where completions are drawn and not read
    extra_head: nn.Module | None  # beside the lm_head: a value, or AVA's reward
    step_metrics: dict[str, StepMetrics]  # of "train" and "eval", since the last log
    reference_policy: ReferencePolicy
    _reading: tuple[AlignConfig, Method, Any, Any, tuple[int, ...]]  # what turns rows into items
    _statistics: EncodedRows | None = None  # the rows that the method's columns are made of
    _evaluating = False

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: AlignConfig | None = None,
        train_dataset: Sequence[dict] | Sequence[Example] | None = None,
        eval_dataset: Sequence[dict] | Sequence[Example] | dict[str, Sequence] | None = None,
        processing_class: Any = None,
        *,
        ref_model: PreTrainedModel | str | None = None,
        reward_func: RewardFunction | RewardSum | Sequence[RewardFunction] | None = None,
        sampler: Sampler | None = None,
        peft_config: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
    ) -> None:
        args = VARConfig("var_output") if args is None else args
        reward_function: Any = as_reward_function(reward_func)
        check_arguments(args, train_dataset, ref_model, peft_config)
        check_teacher(args, ref_model)
        check_online(args, reward_function, sampler, ref_model)
        # fp32: transformers would keep a checkpoint's bf16, in which small steps of the optimiser round to nothing
        if isinstance(model, str):
            model = load_causal_lm(model)
        if isinstance(ref_model, str):
            ref_model = load_causal_lm(ref_model)
        processing_class = load_tokenizer(processing_class, model)
        self.method = METHODS[args.method]
        self.pad_token_id = pad_token(processing_class)
        check_trainable(model)
        check_vocabulary(model, processing_class)
        if ref_model is not None:
            check_vocabulary(ref_model, processing_class, "ref_model")
        for given in (model, ref_model):  # a head that is not understood is refused here
            if given is not None:
                calibrate_first_rank(given, args.device, args.process_index)
        self.online = None
        if args.online:
            named = (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
            prompts = [None if rows is None else parsed_examples(rows, name, "prompt") for name, rows in named]
            self.online = OnlineLoop(args, prompts[0], prompts[1], processing_class, sampler, reward_function)
            self.online.check_model(model)
            data: list[Any] = [self.online.dataset, self.online.eval_prompts]
        else:
            ends = end_tokens(processing_class, inner_model(model))
            self._reading = (args, self.method, processing_class, reward_function, ends)
            data = [None if train_dataset is None else self._read(model, train_dataset, "train_dataset")]
            if isinstance(eval_dataset, dict):
                sets = eval_dataset.items()
                data.append({name: self._read(model, rows, f"eval_dataset {name}") for name, rows in sets})
            else:
                data.append(None if eval_dataset is None else self._read(model, eval_dataset, "eval_dataset"))
        if train_dataset is not None:
            check_drops(args, len(data[0]))
        if args.disable_dropout:
            disable_dropout(model)
        fingerprint = ""
        if self.method.reference and args.precompute_ref_log_probs and not args.online:
            fingerprint = of_first_rank(model_fingerprint(model if ref_model is None else ref_model), args.device)
        if peft_config is not None:
            from peft import get_peft_model

            if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
                model.enable_input_require_grads()  # else no gradient reaches the checkpointed blocks of a frozen base
            model = get_peft_model(model, peft_config)
        self.extra_head = None
        if self.method.head in ("value", "reward"):
            self.extra_head = attach_head(model, new_head(model, self.method.head))
        if not self.method.loss.reads_policy:
            freeze_head(model)
        if train_dataset is not None:
            check_learns(model)
        existed = os.path.exists(args.output_dir)
        super().__init__(
            model=model,
            args=args,
            data_collator=RowCollator(self.pad_token_id),
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=processing_class,
            callbacks=[MetricsFile(args.method), *(callbacks or [])],
            optimizers=optimizers,
        )
        # With get_batch_samples' item count this keeps every release of Trainer from dividing the loss by the
        # accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.reference_policy = ReferencePolicy(self, ref_model, fingerprint)
        self.step_metrics = {mode: StepMetrics(self, mode) for mode in ("train", "eval")}
        try:
            fp32_kept = self.is_fsdp_enabled or self.is_deepspeed_enabled  # for the optimiser
            if train_dataset is not None and optimizers[0] is None and not fp32_kept:
                check_steps(model, args)
            check_layout(self, ref_model)
            self.reference_policy.prepare([] if args.online else tables_of(data))
        except BaseException:
            # Only an empty folder goes, and every rank tries.
            if not existed:
                with contextlib.suppress(OSError):
                    os.rmdir(args.output_dir)
            raise
        self.add_callback(StepLines(self))
        if args.sync_ref_model:
            self.add_callback(SyncReference(self))
        if self.online is not None:
            self.online.bind(self)
            self.add_callback(self.online)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, while it is a model of its own in memory."""
        return self.reference_policy.model

    def _read(self, model: nn.Module, dataset: Any, name: str) -> Items:
        """The rows of a set as items. Rewards without effect are refused; of an evaluation set, which changes no
        weight, they are warned of."""
        items = read_items(dataset, name, *self._reading, self._statistics)
        if self._statistics is None:
            self._statistics = items.rows
        check_positions(model, items.rows)
        check_rewards(items.rows, *self._reading[:2], name, refuse=name == "train_dataset")
        return items

    # ---- one optimiser step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimiser step, each row with its share of the loss of the global batch."""
        if self.state.global_step >= self.state.max_steps > 0:  # a finished run that is resumed: Trainer looks too late
            self.control.should_training_stop = True
            return [], torch.tensor(0)
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        group = dist.group.WORLD if self.args.world_size > 1 else None
        last = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if batches and group is not None and last:
            batches[-1] = self._without_fillers(batches[-1])
        if batches:
            self._prepare_step(batches, group, "train")
        return batches, num_items if num_items is not None else torch.tensor(0)

    def _without_fillers(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """accelerate fills the last batches of an epoch, rank by rank, with items that were in it before. How many it
        says too (``_own_items``), but not in an epoch that is resumed."""
        size = int(batch["item"][-1]) + 1
        remainder = len(self.train_dataset) % (size * self.args.world_size)
        own = remainder - self.args.process_index * size
        return first_items(batch, own) if remainder > 0 and own < size else batch

    def _prepare_step(self, batches: list[dict[str, Tensor]], group, mode: str) -> None:
        for batch in batches:
            batch["length"] = batch["labels"][:, 1:].ne(IGNORE_INDEX).sum(-1)
            if self.method.reference and "ref_logp" not in batch:
                self.reference_policy.score_step(batch)
            elif self.method.reference and batch["ref_logp"].isnan().any():
                raise RuntimeError(
                    "max_steps: the reference scored the rows of that many steps alone, and this batch holds others: "
                    "max_steps, the batch size or torch's seed changed since the trainer was made; make it anew, or "
                    "pass precompute_ref_log_probs=False"
                )
        keys = [key for key in ("length", "group", "reward", "ref_logp", "value") if key in batches[0]]
        sizes = [0 if "stand_in" in batch else len(batch["length"]) for batch in batches]
        device = self.accelerator.device
        step: dict[Any, Tensor] = {
            key: torch.cat([batch[key][:size] for batch, size in zip(batches, sizes, strict=True)]).to(device)
            for key in keys
        }
        added, metrics = self.method.prepare(step, self.args, group)
        for key, values in added.items():
            for batch, part in zip(batches, values.split(sizes), strict=True):
                missing = len(batch["length"]) - len(part)
                batch[key] = F.pad(part, (0, missing)) if missing else part
        for number, batch in enumerate(batches):
            batch["micro_batches"], batch["micro_batch"] = torch.tensor(len(batches)), torch.tensor(number)
        for key, value in metrics.items():
            self.step_metrics[mode].add(key, value.sum(), value.numel())
        if "reward" in step:
            self.step_metrics[mode].add("reward_mean", step["reward"].nansum(), (~step["reward"].isnan()).sum())
            if self.args.method == "var":
                self.step_metrics[mode].add(
                    "weighted_reward", (step["reward"] * added["weight"]).sum(), added["weight"].sum()
                )

    def _label_generator(self, inputs: dict[str, Tensor]) -> torch.Generator:
        """The random stream of the policy's labels: one for each micro-batch of each rank, the same after a resume."""
        place = (self.args.seed, self.state.global_step, self.args.process_index, int(inputs["micro_batch"]))
        return torch.Generator(inputs["labels"].device).manual_seed(seed_of(*place))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of ranks (whose mean the gradients and logs
        take)."""
        mode = "train" if self.model.training else "eval"
        if "micro_batches" not in inputs:
            self._prepare_step([inputs], None, mode)
        rows = method_rows(inputs, self.method)
        group = dist.group.WORLD if self.args.world_size > 1 and mode == "train" else None
        generator = self._label_generator(inputs) if self.method.loss.policy_labels and mode == "train" else None

        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        teacher = self.reference_policy.teacher_inputs(given) if self.method.teacher else None

        def in_head(hidden: Tensor, head):
            labels = next_labels(inputs["labels"], hidden)
            # a device_map may put the head elsewhere
            here = {key: value.to(hidden.device) for key, value in rows.items()}
            return loss_in_head(
                self.method, hidden, head, labels, here, self.args,
                extra_head=self.extra_head, teacher=teacher, process_group=group, label_generator=generator,
            )  # fmt: skip

        result, outputs = capture(model, in_head, given, low_rank=True)
        world_size = self.args.world_size if mode == "train" else 1
        result = HeadResult(result[0], *(values.to(rows["weight"].device) for values in result[1:]))
        self.step_metrics[mode].add("tokens", inputs["attention_mask"].sum(), 0.0)
        self.step_metrics[mode].add_batch(self.method, self.args, rows, result)
        shares = inputs["micro_batches"].to(result.loss.device)
        loss = result.loss * world_size + self._auxiliary_loss(outputs) / shares
        if mode == "train":
            stop_unless_finite(self, loss, inputs, result)
        return (loss, outputs) if return_outputs else loss

    def _auxiliary_loss(self, outputs) -> Tensor | float:
        """A mixture of experts' balancing loss, where its config asks for router outputs."""
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is None:
            return 0.0
        config = self.accelerator.unwrap_model(self.model).config
        return getattr(config, "router_aux_loss_coef", 0.0) * aux_loss

    def _get_train_sampler(self, train_dataset=None):
        if self.args.online:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # in the order of the iteration
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The head beside the lm_head starts from nothing, so it has a learning rate of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.method.head in ("value", "reward"):
            own = {id(parameter) for parameter in self.extra_head.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            parameters = [parameter for parameter in self.extra_head.parameters() if parameter.requires_grad]
            optimizer.add_param_group(
                {"params": parameters, "lr": self.args.head_learning_rate, "weight_decay": self.args.weight_decay}
            )
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer comes by here when accelerate has sharded the weights and before it loads a checkpoint into them: the
        moment for a policy that is its own reference to score the data."""
        self.reference_policy.score_waiting(self.accelerator._models)
        return super().create_scheduler(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs if self._evaluating else {**logs, **self.step_metrics["train"].take()}, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``."""
        self.step_metrics["train"].start_clock()
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        return super().train(*args, **kwargs)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See ``transformers.Trainer.evaluate``; eval_dataset: None, the name of a set that the trainer was given, or
        rows as it takes them, which are scored by the reference now. Online: measures of fresh completions of the
        evaluation prompts, or of these."""
        with swapped(self, "_evaluating", True):  # the training's metrics wait for its own next log
            if self.online is None or isinstance(eval_dataset, dict):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            examples = None
            if eval_dataset is not None:
                examples = parsed_examples(eval_dataset, "eval_dataset", "prompt")
            found = self.online.evaluate(examples)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """See ``transformers.Trainer``; eval_dataset: as ``evaluate``'s."""
        return super().get_eval_dataloader(self._items_of(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """See ``transformers.Trainer``; test_dataset: as ``evaluate``'s."""
        return super().get_test_dataloader(self._items_of(test_dataset))

    def _items_of(self, dataset: Any):
        """An evaluation set as the trainer holds it; new rows are read and scored."""
        if dataset is None or isinstance(dataset, Items):
            return dataset
        if isinstance(dataset, str):
            if not isinstance(self.eval_dataset, dict) or dataset not in self.eval_dataset:
                names = ", ".join(self.eval_dataset) if isinstance(self.eval_dataset, dict) else "none has a name"
                raise ValueError(
                    f"eval_dataset must be the name of a set that the trainer was given ({names}), or rows, got "
                    f"{dataset!r}; load_examples(path) reads a file"
                )
            return dataset
        iterable = hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
        if isinstance(dataset, bytes | os.PathLike) or not iterable:
            raise TypeError(
                "eval_dataset must be None, a name, or rows in a form of docs/data.md, got "
                f"{type(dataset).__name__}; load_examples(path) reads a file"
            )
        items = self._read(self.model, dataset, "eval_dataset")
        self.reference_policy.score_new_rows(items.rows)
        return items

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """See ``transformers.Trainer``. Its metrics hold those of the rows too, so that ``metric_for_best_model`` may
        name one; the loss is the mean over items of the batches' losses."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.method.head == "reward" and self.method.loss.item != "pair":
            correct, pairs = judge_pairs(self, dataloader.dataset.rows)
            self.step_metrics["eval"].add("pair_accuracy", correct, pairs)
        output.metrics.update(self.step_metrics["eval"].take(f"{metric_key_prefix}_"))
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Counts the loss of a batch by itself. Trainer gets None: it would gather a copy of the loss for each row, and
        ranks have different numbers of these."""
        inputs = self._prepare_inputs(inputs)
        own, counted = self._own_items(inputs), self.step_metrics["eval"]
        self.step_metrics["eval"] = StepMetrics(self, "eval")
        with torch.no_grad():
            loss = self.compute_loss(model, first_items(inputs, own) if own else inputs).detach()
        made, self.step_metrics["eval"] = self.step_metrics["eval"], counted
        made.add("loss", loss * own, own)
        counted.merge(made, 1.0 if own else 0.0)  # a forward pass of sharded weights is a collective
        return None, None, None

    def _own_items(self, batch) -> int:
        """Items of this rank's batch, without those that accelerate has filled the last one up with."""
        size, state = int(batch["item"][-1]) + 1, self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(size, max(0, state.remainder - self.args.process_index * size))

    # ---- checkpoints and the model's card ----------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        # before the rest: a checkpoint is complete once Trainer has written its state
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.sync_ref_model and self.args.should_save:
            self.ref_model.save_pretrained(folder / _REF_MODEL_DIR)
        if self.is_fsdp_enabled and self.args.should_save:  # with weights in parts Trainer leaves the tokenizer out
            self.processing_class.save_pretrained(folder)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See ``transformers.Trainer.save_model``; under FSDP it saves the whole model, also where checkpoints are in
        parts."""
        whole = self.is_fsdp_enabled and not _internal_call
        with whole_when_saved(self) if whole else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)
        # not in _save, which the first rank alone calls before transformers 5.19: a sharded head is gathered by all
        if self.extra_head is not None:
            self.extra_head.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            # under FSDP it is among the model's own weights
            if self.method.head in ("value", "reward") and not self.is_fsdp_enabled:
                self.extra_head.load_state_dict(load_head(resume_from_checkpoint).state_dict())
            if self.args.sync_ref_model:
                moved = AutoModelForCausalLM.from_pretrained(Path(resume_from_checkpoint) / _REF_MODEL_DIR)
                self.ref_model.load_state_dict(moved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _reading(checkpoint):
            # Trainer would begin with a new optimizer and schedule, in silence; DeepSpeed has them in files of its own
            held = os.listdir(checkpoint) if checkpoint is not None and not self.is_deepspeed_enabled else None
            for part in ("optimizer", "scheduler") if held is not None else ():
                if not any(name.startswith(part) for name in held):
                    raise FileNotFoundError(
                        f"it holds no {part}, so a run cannot go on from it (save_only_model leaves it out); begin a "
                        "new one from its weights"
                    )
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Without the second names of tied weights among the missing: a checkpoint holds them once."""
        tensors = self.model.state_dict(keep_vars=True)
        found = {id(tensor) for name, tensor in tensors.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(tensors.get(name)) not in found]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """README.md in output_dir: what was trained on what, the settings, the last metrics."""
        if self.is_world_process_zero():
            write_model_card(self)


@contextlib.contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """Name the checkpoint in whatever is raised where its files are cut short, or are those of another model."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"checkpoint must be whole, and of this model and these settings, got {checkpoint}; give those that "
            f"it was saved with or, if its files are cut short, delete it and resume from the one before: {reason:.300}"
        ) from error
