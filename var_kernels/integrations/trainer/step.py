"""One optimiser step: its micro-batches, and each row's share of the loss of the global batch."""

import hashlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from var_kernels.integrations.trainer.collator import first_items


class GlobalBatch:
    """Mixin in front of transformers.Trainer."""

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimiser step, each row with its share of the loss of the global batch."""
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
            self.step_metrics[mode].add(key, value, 1.0)
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
