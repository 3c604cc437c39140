"""Forward passes over rows of data, shared by the ranks: log-probs of completions, or what else a visit reads."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from var_kernels.integrations.data import DataError, EncodedRows, Problem
from var_kernels.integrations.hf import token_logprobs
from var_kernels.integrations.hf.forwards import evaluating
from var_kernels.integrations.trainer.collator import model_inputs
from var_kernels.integrations.trainer.progress import progress_bar


@torch.no_grad()
def score_rows(
    trainer, model: nn.Module, rows: EncodedRows, whose: str, remedy: str, wanted: Sequence[int] | None = None
) -> Tensor:
    """(tokens,) fp32 log-probs of the completions' tokens under ``model``, 0 in the prompts; NaN in rows that are not
    ``wanted`` (None: all are).

    Raises:
        DataError: rows whose log-prob is not finite; it names the model by ``whose``, and the ``remedy``.
    """
    start = 0.0 if wanted is None else math.nan
    logp = torch.full((len(rows.token_ids),), start, device=trainer.accelerator.device)

    def score(batch: dict[str, Tensor], members: list[int]) -> None:
        scored = score_batch(trainer, model, batch).float()[: len(members)]
        for row, values in zip(members, scored, strict=True):
            logp[rows.offset[row] : rows.offset[row + 1]] = values[: rows.length(row)]

    over_rows(trainer, model, rows, score, "reference log-probs", wanted)
    logp = trainer.accelerator.reduce(logp, "sum").cpu()
    sums = rows.row_sums(logp).tolist()
    bad = [row for row in (range(len(rows)) if wanted is None else wanted) if not math.isfinite(sums[row])]
    if bad:
        reason = f"the {whose}'s log-prob must be finite, got"
        raise DataError([Problem(rows.where[row], f"{reason} {sums[row]}") for row in bad], remedy=remedy)
    return logp


def over_rows(
    trainer,
    model: nn.Module,
    rows: EncodedRows,
    visit: Callable[[dict[str, Tensor], list[int]], None],
    title: str,
    wanted: Sequence[int] | None = None,
) -> None:
    """``visit(model_inputs, row numbers)`` for this rank's share of the rows, or of the ``wanted`` ones, in batches of
    rows of like length, with the model in eval mode.

    Every rank makes as many visits, the last perhaps of a row that is none of its own (no row numbers): a forward pass
    of sharded weights is a collective.
    """
    args, accelerator = trainer.args, trainer.accelerator
    members = range(len(rows)) if wanted is None else wanted
    order = sorted(members, key=rows.length, reverse=True)  # out of memory, if at all, at the first batch
    size = args.per_device_eval_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    ranks = accelerator.num_processes
    own = batches[accelerator.process_index :: ranks]
    own += [[]] * (-(-len(batches) // ranks) - len(own))
    tokens = [sum(rows.length(row) for row in batch) for batch in own]
    with evaluating(model), progress_bar(args, title, sum(tokens), "token") as advance:
        for batch, count in zip(own, tokens, strict=True):
            visit(model_inputs(rows, batch or order[-1:], trainer.pad_token_id, accelerator.device), batch)
            advance(count)


def score_batch(trainer, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) fp32 log-probs of a collated batch's labels, computed as the training step computes them (same
    autocast)."""
    device = trainer.accelerator.device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad(), trainer.accelerator.autocast():
        options = {"temperature": trainer.args.logp_temperature, "workspace_mb": trainer.args.workspace_mb}
        return token_logprobs(model, inputs, **options)
