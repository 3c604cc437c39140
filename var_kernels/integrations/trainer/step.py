"""A micro-batch of a step: its loss inside the lm_head, its numbers for the log, and the stop at a loss that is NaN or
infinite, before it reaches the weights, with the rows to blame.
"""

import functools
import math
import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.distill import HeadInputs, divergence_in_head
from var_kernels.integrations.trainer.methods import Method
from var_kernels.integrations.trainer.row_weights import Rows
from var_kernels.losses import Loss, dro_value_loss, kl_k3, linear_loss, ppo_clipped
from var_kernels.losses.ava import last_value
from var_kernels.losses.sequences import sequence_sum
from var_kernels.losses.weights import PER_PROMPT, warn_if_collapsed
from var_kernels.measure import peak_resident_mb

SHOWN_ROWS = 10


def method_rows(inputs: dict[str, Tensor], method: Method) -> dict[str, Tensor]:
    """The loss's inputs under its own names; values of tokens beside the labels that they belong to."""
    rows: dict[str, Tensor] = {key: inputs[key] for key in ("weight", "ref_logp", "length") if key in inputs}
    for name in (*method.loss.inputs, *({"sampler_weight"} & set(inputs))):
        if name not in inputs and method.head in ("value", "reward"):
            continue  # made inside the head
        # completions of a data set come from the reference: it is the policy that drew them, too
        others = {"group_ids": "group", "old_token_logp": "ref_token_logp", "old_logp": "ref_logp"}
        source = others.get(name, name)
        values = inputs[name if name in inputs else source]
        rows[name] = F.pad(values[:, 1:], (0, 1)) if values.dim() == 2 else values
    return rows


class HeadResult(NamedTuple):
    """loss: the micro-batch's share of it, (). token_logp: of the labels, (B, T), and logp, of the sequences, (B,); 0
    where not computed. hits: the label is the most likely token, (B, T). computed: where the head was computed at all,
    (B, T): one pass leaves out what has no weight. score: what the policy or its reward head makes of each sequence,
    (B,); pairs are judged by it."""

    loss: Tensor
    token_logp: Tensor
    logp: Tensor
    hits: Tensor
    computed: Tensor
    score: Tensor


def loss_in_head(
    method: Method,
    hidden: Tensor,
    head,
    labels: Tensor,
    rows: Rows,
    config,
    *,
    extra_head=None,
    teacher: HeadInputs | None = None,
    process_group=None,
    label_generator=None,
) -> HeadResult:
    """The loss and metrics of a micro-batch, computed inside the head. A method that does not read the policy makes no
    logits, and has zeros for log-probs and hits."""
    loss = method.loss
    inputs = {name: rows[name] for name in loss.inputs if name in rows}
    kept = labels != IGNORE_INDEX
    if not loss.reads_policy:
        score_B = last_value(extra_head(hidden)[0], kept)
        items = loss.function(score_B[0::2], score_B[1::2], **loss.options_of(config))
        total, nothing, score_B = (items * rows["weight"][0::2]).sum(), torch.zeros_like(kept), score_B.detach()
        return HeadResult(total, nothing.to(score_B), torch.zeros_like(score_B), nothing, nothing, score_B)
    name = loss.name
    anchor: Tensor | float = 0.0
    options: Any = loss.options_of(config)
    if method.teacher:
        shared: Any = {"temperature": config.logp_temperature, "workspace_mb": config.workspace_mb}
        shared["vocabulary"] = min(of.lm_head_weight.shape[0] for of in (head, teacher.head))
        divergence_of = functools.partial(divergence_in_head, hidden, head, labels, teacher, **shared)
        weight = rows["weight"].unsqueeze(1).expand_as(labels)
    if method.teacher == "given":
        total, nothing = divergence_of(token_weight=weight, **options), torch.zeros_like(kept)
        zeros = nothing.to(total.dtype)
        return HeadResult(total, zeros, zeros[:, 0], nothing, nothing, zeros[:, 0])
    if method.teacher == "reference":  # ASFT
        name, anchor = "dft", options.pop("kl_coef") * divergence_of(token_weight=weight)
    if method.head == "reward":
        inputs["mu"], inputs["log_sigma"] = extra_head(hidden)
    elif method.head == "value":
        value_B = extra_head(hidden.detach(), _prompt_end(labels))
        inputs["value"] = value_B.detach().nan_to_num()  # a constant there; its own loss, below, tells of what diverged
    total, logp, argmax = linear_loss(
        name,
        hidden,
        head.lm_head_weight,
        labels,
        inputs,
        head.bias,
        item_weight=_item_weight(loss, rows),
        head_options={
            **head.logit_options,
            "workspace_mb": config.workspace_mb,
            "temperature": config.logp_temperature,
        },
        process_group=process_group,
        label_generator=label_generator,
        return_logp=True,
        return_argmax=True,
        **options,
    )
    total = total + anchor
    logp_B = sequence_sum(logp, labels)
    if method.head == "value":
        given = (value_B, logp_B, inputs["ref_logp"], inputs["reward"])
        total = total + (dro_value_loss(*given, tau=config.tau) * rows["weight"]).sum().to(total.dtype)
    score_B = last_value(inputs["mu"], kept) if method.head == "reward" else logp_B
    return HeadResult(total, logp, logp_B, argmax == labels, argmax >= 0, score_B.detach())


def _item_weight(loss: Loss, rows: Rows) -> Tensor:
    """One a pair or a row; of tokens that another engine drew, one a token."""
    if loss.item == "pair":
        return rows["weight"][0::2]
    if "sampler_weight" in rows:
        return rows["weight"].unsqueeze(1) * rows["sampler_weight"]
    return rows["weight"]


def _prompt_end(labels: Tensor) -> Tensor:
    """(B, T) bool, True at the last position of each prompt; labels aligned with hidden: it predicts the first token of
    the completion."""
    kept = labels != IGNORE_INDEX
    return kept & (kept.long().cumsum(1) == 1)


class StepMetrics:
    """Numerators and denominators of one kind of step ("train" or "eval") since the last log.

    Kept as tensors until they are logged: reading them would stall a GPU at every step.
    """

    def __init__(self, trainer, mode: str):
        self.trainer, self.mode = trainer, mode
        self._sums: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0])
        self._clock: float | None = None

    def add(self, key: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        entry = self._sums[key]
        for place, value in enumerate((numerator, denominator)):
            entry[place] = entry[place] + (value.detach().double() if isinstance(value, Tensor) else value)

    def add_batch(self, method, config, rows: dict[str, Tensor], result) -> None:
        """Add the metrics of a micro-batch: rows as its loss reads them, result of ``loss_in_head``."""
        if method.loss.reads_policy:
            # a row that the loss gives no weight costs nothing, and has no log-prob
            tokens = result.computed.sum()
            self.add("token_accuracy", result.hits.sum(), tokens)
            self.add("nll_per_token", -result.logp.sum(), tokens)
            if "clip_low" in method.loss.options:
                self._add_clip_share(config, rows, result)
            if "ref_token_logp" in rows:
                kl = kl_k3(result.token_logp, rows["ref_token_logp"]).where(result.computed, 0.0)
                self.add("kl_k3", kl.sum(), tokens)
        if "ref_logp" in rows:
            computed = result.computed.any(-1)
            change = (result.logp - rows["ref_logp"]).where(computed, 0.0)
            self.add("logp_minus_ref", change.sum(), computed.sum())
            if method.loss.name == "var":
                self.add("kl_to_ref", (change * rows["weight"]).sum(), rows["weight"].sum())
        if method.loss.item == "pair":
            self._add_pairs(method, config, rows, result)

    def _add_clip_share(self, config, rows: dict[str, Tensor], result) -> None:
        """Add the share of clipped tokens, or of clipped sequences where the ratio is theirs."""
        if "old_token_logp" in rows:
            given, counted = (result.token_logp, rows["old_token_logp"]), result.computed
            advantage = rows["advantage"].unsqueeze(1).expand_as(result.hits)
        else:
            length, advantage = rows["length"].clamp(min=1), rows["advantage"]
            given, counted = (result.logp / length, rows["old_logp"] / length), result.computed.any(-1)
        clips: Any = {name: getattr(config, name, None) for name in ("clip_low", "clip_high", "dual_clip")}
        logp, old_logp = (values.to(advantage.dtype) for values in given)
        clipped = ppo_clipped(logp, old_logp, advantage, **clips)
        self.add("clip_share", (clipped & counted).sum(), counted.sum())

    def _add_pairs(self, method, config, rows: dict[str, Tensor], result) -> None:
        score = result.score - (rows["ref_logp"] if method.reference else 0.0)
        of_means = "chosen_lengths" in set(method.loss.tensors) - method.loss.optional_tensors  # SimPO, ORPO
        if of_means or getattr(config, "token_reduction", "") == "mean":
            score = score / rows["length"].clamp(min=1)
        counted = rows["weight"][0::2] != 0
        margin = (score[0::2] - score[1::2]).where(counted, 0.0)
        pairs = counted.sum()
        self.add("pair_accuracy", (margin > 0).sum(), pairs)
        self.add("pair_margin", margin.sum(), pairs)
        if method.loss.reads_policy:
            for name, logp in (("logp_chosen", result.logp[0::2]), ("logp_rejected", result.logp[1::2])):
                self.add(name, logp.where(counted, 0.0).sum(), pairs)

    def merge(self, other: "StepMetrics", scale: float) -> None:
        """Adds what another has gathered; all ranks need the same names, so that 0 adds the names alone."""
        for key, (numerator, denominator) in other._sums.items():
            self.add(key, numerator * scale, denominator * scale)

    def start_clock(self) -> None:
        self._clock = time.monotonic()

    def take(self, prefix: str = "") -> dict[str, float]:
        """Means over ranks and steps since the last call, ``prefix`` before each name. Every rank calls it."""
        if not self._sums:
            return {}
        accelerator = self.trainer.accelerator
        keys = sorted(self._sums)
        table = torch.tensor([[float(x) for x in self._sums[key]] for key in keys], dtype=torch.float64)
        table = accelerator.reduce(table.to(accelerator.device, torch.float32), "sum").cpu().tolist()
        totals = dict(zip(keys, table, strict=True))
        self._sums.clear()
        tokens, _ = totals.pop("tokens", (0.0, 0.0))
        metrics = {
            prefix + key: numerator / denominator for key, (numerator, denominator) in totals.items() if denominator
        }
        if self.mode == "train":
            now = time.monotonic()
            if self._clock is not None:
                metrics["tokens_per_second"] = tokens / max(now - self._clock, 1e-9)
            self._clock = now
            if "ess" in metrics and accelerator.device.type != "cpu":  # on the CPU var_weights has looked already
                self._warn_if_collapsed(metrics)
            metrics["peak_memory_mb"] = peak_memory_mb(accelerator.device)
        return metrics

    def _warn_if_collapsed(self, metrics: dict[str, float]) -> None:
        args = self.trainer.args
        prompts, grouped = args.items_per_step, args.normalizer in PER_PROMPT
        size = round(metrics["ess"] / metrics["ess_share"])
        warn_if_collapsed(metrics["ess"], size, prompts if grouped else 1, lam=args.lam, reference=args.reference)


def peak_memory_mb(device: torch.device) -> float:
    """MiB: the CUDA allocator's peak since training began, or on the CPU the highest resident size of the whole
    process."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_resident_mb()


class NonFiniteLossError(ValueError):
    """The loss of a step is NaN or infinite; no weight has been changed by it."""


def stop_unless_finite(trainer, loss: Tensor, inputs: dict[str, Tensor], result) -> None:
    """Stop every rank if one's micro-batch has such a loss. Trainer alone would go on, with weights of NaN and a logged
    loss of 0.

    Before the backward pass, in which DeepSpeed takes its step. The loss is read on the host, as Trainer itself does at
    every micro-batch.

    Raises:
        NonFiniteLossError: on every rank, with the rows whose log-prob or score is not finite.
    """
    args = trainer.args
    if args.fp16:
        return  # the gradient scaler leaves such a step out
    failed = (~loss.detach().isfinite()).float()
    if args.world_size > 1:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed:
        return
    score_B = result.logp.where(~result.logp.isfinite(), result.score).tolist()
    entries = zip(inputs["row"].tolist(), score_B, strict=True)
    mine = [(loss.item(), len(score_B), [(row, score) for row, score in entries if not math.isfinite(score)])]
    shares = gather_object(mine) if args.world_size > 1 else mine
    raise NonFiniteLossError(_what_failed(trainer.state.global_step + 1, shares, trainer.train_dataset.rows.where))


def _what_failed(step: int, shares: list[tuple], where: list[str]) -> str:
    """shares: of each rank its loss, its number of rows, and (row number, log-prob or score) of those to blame."""
    loss = next(value for value, _, _ in shares if not math.isfinite(value))
    bad = [entry for _, _, entries in shares for entry in entries]
    text = f"step {step}: the loss is {loss}; no weight was changed by it. "
    if not bad:
        return f"{text}Every row's log-prob is finite: the loss itself overflows; see its options"
    if len(bad) == sum(count for _, count, _ in shares):
        return (
            f"{text}No row's log-prob is finite: the weights have diverged, or the model overflows in this dtype; "
            "continue from a checkpoint with a lower learning rate, or train in a wider dtype"
        )
    rows = ", ".join(f"{where[row]} ({score:g})" for row, score in bad[:SHOWN_ROWS])
    more = f" and {len(bad) - SHOWN_ROWS} more" if len(bad) > SHOWN_ROWS else ""
    return (
        f"{text}Log-probs that are not finite: {rows}{more}; -inf: the head forbids a label of the row, nan: the model "
        "overflows on it. Drop these rows, or train in a wider dtype"
    )
