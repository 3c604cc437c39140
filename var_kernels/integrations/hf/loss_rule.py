"""The rule by which a model's own loss reads its labels, found by giving it known logits."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.probe import Probe, TrialFailedError, noise


@dataclass(frozen=True)
class LossRule:
    """The rule by which a model's own loss reads labels, and where it can be replaced."""

    shift: bool  # logits at t are scored against labels[:, t + 1], not labels[:, t]
    replaceable: bool  # forward calls self.loss_function and adds what it returns (an auxiliary loss may come on top)
    masked: bool  # labels that attention_mask hides do not count
    counted: bool  # num_items_in_batch is divided by where it is given; a loss_function says so itself


def fit_loss_rule(probe: Probe, *, vocab: int, masked_ids: Collection[int], wide: bool) -> LossRule:
    """Two draws of logits, and a third pass with loss_function replaced; the last token hidden by an attention_mask
    where the model runs with one.

    Raises:
        ValueError: no rule gives the model's own loss.
    """
    hiding = probe.hiding_last()
    if hiding is not None:
        try:
            return _fit(hiding.running_once(), vocab, masked_ids, wide)
        except TrialFailedError:
            pass
    return _fit(probe.running_once(), vocab, masked_ids, wide)


def _fit(probe: Probe, vocab: int, masked_ids: Collection[int], wide: bool) -> LossRule:
    unmasked = [i for i in range(min(vocab, 4096)) if i not in masked_ids]
    labels = torch.arange(probe.ids.numel(), device=probe.ids.device).view_as(probe.ids) * 5 % len(unmasked)
    labels = torch.tensor(unmasked, device=labels.device)[labels]
    labels[:, 2] = IGNORE_INDEX
    own, nll = [], []
    for seed in (0, 1):
        loss, y, seen, mask = probe.run_loss(labels, noise, seed)
        if seen.shape != y.shape[:-1]:
            probe.refuse(f"it scores labels {tuple(seen.shape)} with logits {tuple(y.shape)}")
        own.append(loss)
        nll.append(_candidates(y, seen, mask))
    # An auxiliary loss does not depend on the logits, so it drops out of the difference between two draws.
    change = own[0] - own[1]
    tolerance = 2e-5 * (1 + max(map(abs, own)))
    fits = [rule for rule in nll[0] if abs(nll[0][rule] - nll[1][rule] - change) <= tolerance]
    if len(fits) != 1:
        probe.refuse(
            "its own loss is not the mean cross-entropy of its logits, neither with shifted nor with unshifted labels"
        )
    shift, masked = fits[0]
    extra = own[0] - nll[0][shift, masked]
    replaced = probe.run_replaced_loss(labels, wide=wide)
    if replaced is not None and abs(replaced - extra) <= tolerance:
        return LossRule(shift, replaceable=True, masked=masked, counted=True)
    if replaced is not None or abs(extra) > tolerance:
        probe.refuse(
            "its own loss has a part besides the cross-entropy that cannot be kept when the cross-entropy is replaced"
        )
    return LossRule(shift, replaceable=False, masked=masked, counted=_reads_count(probe, labels, own[0]))


def _reads_count(probe: Probe, labels: Tensor, mean: float) -> bool:
    """Return whether num_items_in_batch changes the model's own loss, which is ``mean`` without it."""
    try:
        loss, *_ = probe.run_loss(labels, noise, 0, num_items_in_batch=torch.tensor(2, device=labels.device))
    except TrialFailedError:
        return False
    return abs(loss - mean) > 1e-3 * (1 + abs(mean))


def _candidates(logits: Tensor, labels: Tensor, mask: Tensor | None) -> dict[tuple[bool, bool], float]:
    """{(shift, masked): the loss by that rule}; masked only where a mask of the labels' shape hides something."""
    read = {False: labels}
    if mask is not None and mask.shape == labels.shape and not mask.all():
        read[True] = labels.masked_fill(mask == 0, IGNORE_INDEX)
    return {(shift, masked): _mean_nll(logits, read[masked], shift) for shift, masked in product((True, False), read)}


def _mean_nll(logits: Tensor, labels: Tensor, shift: bool) -> float:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX).item()
