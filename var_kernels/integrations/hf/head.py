"""Running a loss inside the forward of a model's own lm_head, on the hidden states that the model itself feeds it.

``head.forward`` is swapped on the output-embedding module and ``model(**inputs)`` runs as it is, so that everything
hung on the head (accelerate's offloading, FSDP's and DeepSpeed's gathering) still happens around it. Where the model
expects logits (..., V) it gets a placeholder (..., 1) of zeros; the backward of the results first passes through what
the model made of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from var_kernels.integrations.hf.forwards import swapped, swapped_head
from var_kernels.integrations.hf.model import vocabulary_size
from var_kernels.integrations.hf.weights import LowRank, inside_adapter, is_active, is_adapter, is_dtensor, local_rows


@dataclass(frozen=True)
class HeadParams:
    """The map from hidden states to logits: z = softcap * tanh(logit_scale * (W h + bias) / softcap), or no tanh; W h +
    right left where the head carries a LoRA adapter.
    """

    lm_head_weight: Tensor  # (V, D), with a group this rank's rows of it
    bias: Tensor | None  # (V,) likewise
    logit_scale: float
    softcap: float | None
    group: Any = None  # the ranks over which tensor parallelism shards the vocabulary
    low_rank: tuple[Tensor, Tensor] | None = None  # left (B, T, R), a row for each of hidden's, and right (V, R)

    @property
    def logit_options(self) -> dict[str, Any]:
        """The keyword arguments by which the ops take the transform, and the adapter where there is one."""
        options = {"logit_scale": self.logit_scale, "softcap": self.softcap}
        return options if self.low_rank is None else {**options, "low_rank": self.low_rank}


@contextmanager
def head_results(
    inner: nn.Module,
    head: nn.Linear,
    fn: Callable[[Tensor], Any],
    *,
    wide: bool = False,
    sharded: bool = False,
    low_rank: bool = False,
    as_logits: bool = False,
) -> Iterator[list[Tensor]]:
    """Inside the block the head computes ``fn(hidden)`` in place of logits; the yielded list gets its result(s).

    The placeholder is (B, T, 1) zeros, or with ``wide`` (B, T, V) on the meta device, which takes no memory. With
    ``sharded`` fn knows a head whose vocabulary is sharded over ranks, with ``low_rank`` one with a LoRA adapter;
    otherwise these are refused.

    With ``as_logits`` the head returns what fn returns, and may be called several times.

    Pass them on through ``tied``: only then does their backward come after the hooks on the outputs of head and model.
    """
    results: list[Tensor] = []

    def forward(hidden, *_args, adapter_names=None, **_kwargs):
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names must be None, one adapter for all rows, got {len(adapter_names)} names; select one by "
                "set_adapter"
            )
        if is_active(head) and not low_rank:
            raise ValueError(
                f"{type(inner).__name__}: its lm_head must have no active LoRA adapter for this loss, got one; pass "
                "HeadParams.logit_options on to the op (capture(..., low_rank=True)), merge the adapter, or leave the "
                "lm_head out of it"
            )
        if results:
            raise ValueError(
                f"{type(inner).__name__} must call its lm_head once a forward pass, got a second call; use the "
                "model's own loss"
            )
        if is_dtensor(head.weight) and not sharded:
            raise ValueError(
                f"{type(inner).__name__}: the lm_head weight must be whole on each rank for this loss, got a DTensor "
                "(a tensor-parallel head); leave lm_head out of the tensor-parallel plan, or use fused_lm_head, "
                "token_logprobs or sequence_logprobs, which support it"
            )
        hidden, restore = local_rows(hidden)

        def compute(hidden: Tensor, factors: LowRank | None) -> Tensor:
            with swapped(head, "_var_kernels_low_rank", factors):
                output = fn(hidden)
            if as_logits:
                return output
            results.extend(output if isinstance(output, tuple) else (output,))
            # One result of each graph node is enough to make the node wait for the placeholder's gradient.
            nodes = {r.grad_fn: r for r in reversed(results) if r.grad_fn is not None}
            return placeholder(head, hidden, wide, *nodes.values())

        if is_adapter(head):
            return restore(inside_adapter(head, hidden, type(inner).__name__, compute))
        return restore(compute(hidden, None))

    with swapped_head(head, forward):
        yield results


def tied(results: list[Tensor], logits: Tensor | None) -> tuple[Tensor, ...]:
    """The results, unchanged, their backward going first through ``logits`` (what the model made of the placeholder).

    The pre-backward hooks of FSDP and DeepSpeed sit there: they bring back the sharded weight that the results need.
    """
    if isinstance(logits, Tensor) and logits.requires_grad:
        local: Any = logits
        return _Tie.apply(local.to_local() if is_dtensor(logits) else logits, *results)
    return tuple(results)


def placeholder(head: nn.Linear, hidden: Tensor, wide: bool, *results: Tensor, value: float = 0.0) -> Tensor:
    """Make the tensor that a head returns in place of (B, T, V) logits; wide where the model writes at single ids."""
    width, device = (vocabulary_size(head), torch.device("meta")) if wide else (1, hidden.device)
    return Placeholder.apply((*hidden.shape[:-1], width), value, hidden.dtype, device, *results)


class Placeholder(torch.autograd.Function):
    """One value in place of logits. The results are its ancestors in the graph and get a gradient of zero from it."""

    @staticmethod
    def forward(ctx, shape, value, dtype, device, *results):
        ctx.like = [(r.shape, r.dtype, r.device) for r in results]
        return torch.full(shape, value, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx, _grad):
        return None, None, None, None, *_zeros(ctx.like)


class _Tie(torch.autograd.Function):
    """The results unchanged; their backward gives ``logits`` a gradient of zero besides."""

    @staticmethod
    def forward(ctx, logits, *results):
        ctx.set_materialize_grads(False)
        ctx.like = [(logits.shape, logits.dtype, logits.device)]
        outputs = tuple(r.clone() for r in results)  # models add to their loss in place, which a view forbids
        ctx.mark_non_differentiable(*(out for out, r in zip(outputs, results, strict=True) if not r.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return *_zeros(ctx.like), *grads


def _zeros(like):
    return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in like)
