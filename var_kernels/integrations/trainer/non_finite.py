"""The stop at a loss that is NaN or infinite, before it reaches the weights, with the rows to blame."""

import math

import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor

SHOWN_ROWS = 10


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
