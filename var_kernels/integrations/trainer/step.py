"""One optimiser step: its micro-batches, and each row's share of the loss of the global batch."""

import hashlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from var_kernels.integrations.trainer.collator import first_items

SHOWN_ROWS = 10


class NonFiniteLossError(ValueError):
    """The loss of a step is NaN or infinite; no weight has been changed by it."""


class GlobalBatch:
    """Mixin in front of transformers.Trainer."""

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
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
        """accelerate fills the last batches of an epoch, rank by rank, with items that were in it before."""
        size = int(batch["item"][-1]) + 1
        remainder = len(self.train_dataset) % (size * self.args.world_size)
        own = remainder - self.args.process_index * size
        return first_items(batch, own) if remainder > 0 and own < size else batch

    def _prepare_step(self, batches: list[dict[str, Tensor]], group, mode: str) -> None:
        for batch in batches:
            batch["length"] = batch["labels"][:, 1:].ne(-100).sum(-1)
            if self.method.reference and "ref_logp" not in batch:
                self._attach_reference(batch)
            elif self.method.reference and batch["ref_logp"].isnan().any():
                raise RuntimeError(
                    "max_steps: the reference scored the rows of that many steps alone, and this batch holds others: "
                    "max_steps, the batch size or torch's seed changed since the trainer was made; make it anew, or "
                    "pass precompute_ref_log_probs=False"
                )
        keys = [key for key in ("length", "group", "reward", "ref_logp", "value") if key in batches[0]]
        sizes = [0 if "stand_in" in batch else len(batch["length"]) for batch in batches]
        device = self.accelerator.device
        step = {
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
        """Where the policy labels pairs: a stream for each micro-batch of each rank, the same after a resume."""
        place = (self.args.seed, self.state.global_step, self.args.process_index, int(inputs["micro_batch"]))
        digest = hashlib.sha256(repr(place).encode()).digest()
        return torch.Generator(inputs["labels"].device).manual_seed(int.from_bytes(digest[:7], "big"))

    def _stop_unless_finite(self, loss: Tensor, inputs: dict[str, Tensor], result) -> None:
        """On every rank if on one. Trainer alone would go on, with weights of NaN and a logged loss of 0.

        Before the backward pass, in which DeepSpeed takes its step. The loss is read on the host, as Trainer itself
        does at every micro-batch.
        """
        if self.args.fp16:
            return  # the gradient scaler leaves such a step out
        failed = (~loss.detach().isfinite()).float()
        if self.args.world_size > 1:
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed:
            return
        score_B = result.logp.where(~result.logp.isfinite(), result.score).tolist()
        entries = zip(inputs["row"].tolist(), score_B, strict=True)
        mine = [(loss.item(), len(score_B), [(row, score) for row, score in entries if not math.isfinite(score)])]
        shares = gather_object(mine) if self.args.world_size > 1 else mine
        raise NonFiniteLossError(_what_failed(self.state.global_step + 1, shares, self.train_dataset.rows.where))


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
