"""VARTrainer: transformers.Trainer with the loss computed inside the lm_head and normalised over the global batch."""

import contextlib
import logging
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from var_kernels.integrations.data import (
    EncodedRows,
    Example,
    end_tokens,
)
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.heads import attach_head
from var_kernels.integrations.hf.logprobs import next_labels
from var_kernels.integrations.hf.model import inner_model
from var_kernels.integrations.trainer.argument_checks import (
    check_arguments,
    check_online,
    check_teacher,
    parsed_examples,
    read_items,
)
from var_kernels.integrations.trainer.callbacks import MetricsFile, StepLines, SyncReference
from var_kernels.integrations.trainer.checkpoints import Checkpoints
from var_kernels.integrations.trainer.collator import RowCollator, tables_of
from var_kernels.integrations.trainer.config import AlignConfig, VARConfig
from var_kernels.integrations.trainer.evaluation import Evaluation
from var_kernels.integrations.trainer.loading import load_causal_lm, load_tokenizer
from var_kernels.integrations.trainer.methods import METHODS, HeadResult, Method, loss_in_head
from var_kernels.integrations.trainer.metrics import StepMetrics
from var_kernels.integrations.trainer.model_checks import (
    check_learns,
    check_positions,
    check_trainable,
    check_vocabulary,
    disable_dropout,
    freeze_head,
)
from var_kernels.integrations.trainer.online import OnlineLoop, Sampler
from var_kernels.integrations.trainer.reference import model_fingerprint
from var_kernels.integrations.trainer.reference_policy import ReferencePolicy
from var_kernels.integrations.trainer.reward_effect import check_rewards
from var_kernels.integrations.trainer.rewards import RewardFunction, RewardSum, as_reward_function
from var_kernels.integrations.trainer.sharding import (
    calibrate_first_rank,
    check_layout,
    of_first_rank,
)
from var_kernels.integrations.trainer.step import GlobalBatch
from var_kernels.integrations.trainer.values import new_head

logger = logging.getLogger(__name__)


class VARTrainer(Checkpoints, ReferencePolicy, GlobalBatch, Evaluation, Trainer):
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
        DataError: malformed rows, with the place of each. ValueError, TypeError: settings that do not go together, a
            model whose head is not understood. All of it before anything is written. NonFiniteLossError: from
            ``train``, at a loss that is NaN or infinite, before it reaches the weights.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: AlignConfig | None = None,
        train_dataset: Sequence[dict] | Sequence[Example] | None = None,
        eval_dataset: Sequence[dict] | Sequence[Example] | dict[str, Sequence] | None = None,
        processing_class=None,
        *,
        ref_model: PreTrainedModel | str | None = None,
        reward_func: RewardFunction | RewardSum | Sequence[RewardFunction] | None = None,
        sampler: Sampler | None = None,
        peft_config=None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
    ):
        args, reward_func = VARConfig("var_output") if args is None else args, as_reward_function(reward_func)
        check_arguments(args, train_dataset, ref_model, peft_config)
        check_teacher(args, ref_model)
        check_online(args, reward_func, sampler, ref_model)
        # fp32: transformers would keep a checkpoint's bf16, in which small steps of the optimiser round to nothing
        if isinstance(model, str):
            model = load_causal_lm(model)
        if isinstance(ref_model, str):
            ref_model = load_causal_lm(ref_model)
        processing_class = load_tokenizer(processing_class, model)
        self.method = METHODS[args.method]
        self.pad_token_id = next(
            i for i in (processing_class.pad_token_id, processing_class.eos_token_id, 0) if i is not None
        )
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
            self.online = OnlineLoop(
                args, self.method, *prompts, processing_class, self.pad_token_id, sampler, reward_func
            )
            self.online.check_model(model)
            data = [self.online.dataset, self.online.eval_prompts]
        else:
            ends = end_tokens(processing_class, inner_model(model))
            others = (args, self.method, processing_class, reward_func, ends)
            self._reading = others
            data = [None if train_dataset is None else read_items(train_dataset, "train_dataset", *others)]
            if isinstance(eval_dataset, dict):
                named = eval_dataset.items()
                data.append({name: read_items(rows, f"eval_dataset {name}", *others) for name, rows in named})
            else:
                data.append(None if eval_dataset is None else read_items(eval_dataset, "eval_dataset", *others))
            for rows in tables_of(data):
                if self.method.columns is not None:  # made of the training set's statistics
                    rows.columns |= self.method.columns(rows, args, tables_of(data)[0])
                check_positions(model, rows)
            self._check_rewards(args, data)
        if args.disable_dropout:
            disable_dropout(model)
        self._ref_key = ""
        if self.method.reference and args.precompute_ref_log_probs and not args.online:
            self._ref_key = of_first_rank(model_fingerprint(model if ref_model is None else ref_model), args.device)
        if peft_config is not None:
            from peft import get_peft_model

            if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
                model.enable_input_require_grads()  # else no gradient reaches the checkpointed blocks of a frozen base
            model = get_peft_model(model, peft_config)
        self.extra_head = None
        if self.method.head in ("value", "reward"):
            self.extra_head = attach_head(model, new_head(model, self.method.head))
        if not self.method.reads_policy:
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
            callbacks=[MetricsFile(), *(callbacks or [])],
            optimizers=optimizers,
        )
        # With get_batch_samples' item count this keeps every release of Trainer from dividing the loss by the
        # accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.ref_model = ref_model
        self.step_metrics = {mode: StepMetrics(self, mode) for mode in ("train", "eval")}
        self._unscored: list[EncodedRows] = []
        try:
            check_layout(self, ref_model)
            tables = [] if args.online else tables_of(data)
            if ref_model is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                self._unscored = tables  # see create_scheduler
            if self.method.head == "fitted" and not self._unscored:  # before the reference is let go
                self._fit_values(self.model if ref_model is None else ref_model.to(self.accelerator.device), tables)
            self._prepare_reference(tables)
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

    # ---- data --------------------------------------------------------------------------------------------------------

    def _check_rewards(self, args, data: list) -> None:
        """That rewards can have an effect; on an evaluation set, which changes no weight, a warning."""
        if data[0] is not None:
            check_rewards(data[0].rows, args, self.method, "train_dataset")
        for rows in tables_of(data[1:]):
            check_rewards(rows, args, self.method, "eval_dataset", refuse=False)

    # ---- one optimiser step ------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss, times the number of ranks (whose mean the gradients and logs
        take)."""
        mode = "train" if self.model.training else "eval"
        if "micro_batches" not in inputs:
            self._prepare_step([inputs], None, mode)
        rows = _method_rows(inputs, self.method)
        group = dist.group.WORLD if self.args.world_size > 1 and mode == "train" else None
        generator = self._label_generator(inputs) if self.method.policy_labels and mode == "train" else None

        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        teacher = self._teacher_inputs(given)

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
            self._stop_unless_finite(loss, inputs, result)
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

    def create_optimizer(self, *args, **kwargs):
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

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs if self._evaluating else {**logs, **self.step_metrics["train"].take()}, start_time)

    def train(self, *args, **kwargs):
        """See ``transformers.Trainer.train``."""
        self.step_metrics["train"].start_clock()
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        return super().train(*args, **kwargs)


def _method_rows(inputs: dict[str, Tensor], method: Method) -> dict[str, Tensor]:
    """What the loss reads, under its own names; values of tokens beside the labels that they belong to."""
    rows = {key: inputs[key] for key in ("weight", "ref_logp", "length") if key in inputs}
    for name in (*method.loss.inputs, *({"sampler_weight"} & set(inputs))):
        if name not in inputs and method.head in ("value", "reward"):
            continue  # made inside the head
        # completions of a data set come from the reference: it is the policy that drew them, too
        others = {"group_ids": "group", "old_token_logp": "ref_token_logp", "old_logp": "ref_logp"}
        source = others.get(name, name)
        values = inputs[name if name in inputs else source]
        rows[name] = F.pad(values[:, 1:], (0, 1)) if values.dim() == 2 else values
    return rows
