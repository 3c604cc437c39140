"""``linear_loss``: any loss of the registry from hidden states, by the passes over the head that its class allows."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.losses.checks import read_rows, times
from var_kernels.losses.pair import implicit_reward
from var_kernels.losses.registry import Loss, find_loss
from var_kernels.losses.sail import draw_preference
from var_kernels.losses.sequences import check_layout, expand_to_tokens, sequence_lengths, sequence_sum
from var_kernels.losses.var import HEAD_OPTIONS
from var_kernels.ops import linear_logprob, linear_token_loss, linear_weighted_nll
from var_kernels.ops.checks import check_are_tensors
from var_kernels.ops.signatures import Engine

_FROM_THE_HEAD = ("token_logp", "entropy")


@overload
def linear_loss(
    name: str,
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    inputs: Mapping[str, Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    item_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    engine: Engine = "auto",
    process_group: dist.ProcessGroup | None = None,
    label_generator: torch.Generator | None = None,
    head_options: Mapping[str, object] | None = None,
    return_logp: Literal[False] = False,
    return_argmax: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def linear_loss(
    name: str,
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    inputs: Mapping[str, Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    item_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    engine: Engine = "auto",
    process_group: dist.ProcessGroup | None = None,
    label_generator: torch.Generator | None = None,
    head_options: Mapping[str, object] | None = None,
    return_logp: bool = False,
    return_argmax: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]: ...


def linear_loss(
    name: str,
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    inputs: Mapping[str, Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    item_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    engine: Engine = "auto",
    process_group: dist.ProcessGroup | None = None,
    label_generator: torch.Generator | None = None,
    head_options: Mapping[str, object] | None = None,
    return_logp: bool = False,
    return_argmax: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """A loss by its name (``var_kernels.LOSSES``), from hidden states and the lm_head, without the [N, V] logits.

        loss = sum over items i of item_weight_i * loss_i        an item: a sequence, a pair of rows, a row of a group

    What is known of the loss decides the passes: class A (its gradient does not depend on the policy) and class B (only
    on the token's own log-prob) take one, 3 GEMMs; C and D take two, 4 GEMMs. Peak extra memory as in
    ``linear_weighted_nll`` and ``linear_logprob``.

    Args:
        name: a key of ``LOSSES``: "dpo", "ipo", "sail_pp", "alol", "grpo", ...
        hidden: (B, T, D) padded, or (N, D) with ``cu_seqlens``; states before the lm_head.
        lm_head_weight: (V, D).  bias: (V,) or None.
        labels: (B, T) or (N,) int64, aligned with hidden; ``ignore_index`` carries no loss. Losses of pairs take
            B = 2P rows: chosen and rejected in turn.
        inputs: what the loss reads besides the policy's log-probs, one value per row (B,) under its name for a single
            sequence ("reward", "ref_logp", "value", "group_ids"; a pair's are split into chosen and rejected here), or
            one per token in the shape of labels ("old_token_logp", "advantage"). Lengths are counted here.
        item_weight: (B,), for pairs (P,), for losses of tokens also the shape of labels; constants; None: 1. Divide by
            the number of items of the global batch for a mean. An item of weight 0 has no part, whatever its log-probs
            are; a row of a group stays among the others.
        cu_seqlens: (B + 1,), packed rows.
        engine: "auto"; "one_pass" and "two_pass" force classes A and B.
        process_group: class D gathers its baseline over these ranks.
        label_generator: for the SAIL losses whose labels are the policy's own: pairs change places as
            ``draw_preference`` says. None: the labels of the data.
        head_options: options of ``linear_logprob`` (softcap, logit_scale, temperature, precision, workspace_mb, ...).
        return_logp, return_argmax: also return detached log-probs in the shape of labels, 0 where ignored or not
            computed, and the most likely ids, -1 there.
        options: the loss's own ("beta", "tau", ...).

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs), or a tuple with what else was asked for.

    Raises:
        ValueError, TypeError: an unknown name or option, a missing input, class C or D with engine="one_pass", and what
            the loss and the head refuse.
    """
    loss = find_loss(name)
    if misplaced := sorted((options.keys() - loss.options.keys()) & HEAD_OPTIONS):
        raise ValueError(
            f"{', '.join(misplaced)} must be in head_options, got as an option of the loss {name!r}; pass "
            f"head_options={{{misplaced[0]!r}: ...}}"
        )
    loss.check_options(options)
    if engine not in ("auto", "one_pass", "two_pass"):
        raise ValueError(
            f"engine must be 'auto', 'one_pass' or 'two_pass', got {engine!r}; leave it out to let it choose"
        )
    if engine == "one_pass" and loss.pass_class in "CD":
        raise ValueError(
            f"engine must be 'auto' or 'two_pass' for {name!r}, got 'one_pass'; a gradient of class "
            f"{loss.pass_class} needs whole sequences before any token's is known"
        )
    if not isinstance(inputs, Mapping | None):
        got = type(inputs).__name__
        raise TypeError(f"inputs must be a mapping from names to tensors, got {got}; {{'reward': reward_B}}")
    if not isinstance(head_options, Mapping | None):
        got = type(head_options).__name__
        raise TypeError(f"head_options must be a mapping from names to values, got {got}; {{'softcap': 30.0}}")
    if label_generator is not None and not loss.policy_labels:
        raise ValueError(
            f"label_generator must be None for {name!r}, whose labels are the data's, got a generator; only losses "
            "registered with policy_labels, such as 'sail_pp', draw theirs"
        )
    if item_weight is not None:
        check_are_tensors(item_weight=item_weight)
    rows = _Rows(loss, dict(inputs or {}), item_weight, hidden, labels, cu_seqlens, ignore_index)
    head: dict[str, Any] = {"ignore_index": ignore_index, **(head_options or {})}
    asked: dict[str, Any] = {"return_logp": return_logp, "return_argmax": return_argmax}
    if loss.pass_class == "A":
        token_weight, constant = rows.token_weight(options, hidden.dtype)
        outputs = linear_weighted_nll(
            hidden, lm_head_weight, labels, token_weight, bias, engine=engine, **asked, **head
        )
        total, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = (total + constant.to(total.dtype), *others)
    elif loss.pass_class == "B":
        token_loss, token_inputs = rows.token_objective(options)
        entropy = "entropy" in loss.tensors
        asked |= {"entropy": entropy, "engine": engine}
        outputs = linear_token_loss(hidden, lm_head_weight, labels, token_loss, token_inputs, bias, **asked, **head)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    else:
        outputs = linear_logprob(hidden, lm_head_weight, labels, bias, return_argmax=return_argmax, **head)
        logp, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        total = rows.total(logp, options, process_group, label_generator)
        outputs = (total, *([logp.detach()] if return_logp else []), *others)
    return outputs[0] if len(outputs) == 1 else outputs


class _Rows:
    """A loss's arguments by their names, from one value per row or token."""

    def __init__(
        self,
        loss: Loss,
        inputs: dict[str, Tensor],
        item_weight: Tensor | None,
        hidden: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        ignore_index: int,
    ) -> None:
        self.loss, self.inputs, self.labels = loss, inputs, labels
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"inputs[{name!r}] must be a tensor, got {type(value).__name__}; use torch.tensor(...)")
        self.item_weight = None if item_weight is None else item_weight.detach()
        self.layout: dict[str, Any] = {"cu_seqlens": cu_seqlens, "ignore_index": ignore_index}
        self.num_rows = check_layout(hidden, labels, cu_seqlens)
        if missing := [name for name in loss.inputs if name not in inputs]:
            raise ValueError(
                f"{loss.name!r} needs inputs {', '.join(map(repr, missing))}, got "
                f"{', '.join(map(repr, inputs)) or 'none'}; one value a row, or a token, under each name"
            )
        known = {name for name, _ in loss.single_names.values()}
        if unknown := sorted(set(inputs) - known):
            reads = ", ".join(map(repr, loss.inputs)) or "none"
            raise ValueError(
                f"inputs of {loss.name!r} must be among {reads}, got {', '.join(map(repr, unknown))}; leave out others"
            )
        if loss.item == "pair" and self.num_rows % 2:
            raise ValueError(
                f"labels must hold pairs, chosen and rejected in turn, got {self.num_rows} rows; drop the one "
                "without a partner"
            )
        self.num_items = num_items = self.num_rows // 2 if loss.item == "pair" else self.num_rows
        of_tokens = loss.item == "token" and item_weight is not None and item_weight.shape == labels.shape
        if item_weight is not None and item_weight.shape != (num_items,) and not of_tokens:
            raise ValueError(
                f"item_weight must be ({num_items},), one per {loss.item if loss.item == 'pair' else 'row'} of "
                f"{loss.name!r}, got {tuple(item_weight.shape)}; weigh items, not what they are made of"
            )

    def token_weight(self, options: dict[str, Any], operand: torch.dtype) -> tuple[Tensor, Tensor]:
        """Class A is linear in the log-probs: minus its slope over the tokens, and its value at 0."""
        given = [operand, *(t.dtype for t in (*self.inputs.values(), self.item_weight) if t is not None)]
        wide = torch.float64 if torch.float64 in given else torch.float32
        with torch.inference_mode(False), torch.enable_grad():
            self.inputs = {name: _savable(t) for name, t in self.inputs.items()}
            self.item_weight = None if self.item_weight is None else _savable(self.item_weight)
            zero_B = torch.zeros(self.num_rows, dtype=wide, device=self.labels.device, requires_grad=True)
            total = self._weighted(self.loss.function(**self._arguments({"policy_logp": zero_B}), **options))
            (slope_B,) = torch.autograd.grad(total, zero_B)
        return expand_to_tokens(-slope_B, self.labels, self.layout["cu_seqlens"]), total.detach()

    def token_objective(self, options: dict[str, Any]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Class B: the function of a chunk's tokens, and what it reads per token."""
        names = [name for name in self.loss.tensors if name not in _FROM_THE_HEAD and name in self.inputs]
        token_inputs = [self._over_tokens(f"inputs[{name!r}]", self.inputs[name]) for name in names]
        if self.item_weight is not None:
            token_inputs.append(self._over_tokens("item_weight", self.item_weight))
        first = ("token_logp", "entropy") if "entropy" in self.loss.tensors else ("token_logp",)

        def token_loss(*values: Tensor) -> Tensor:
            items = self.loss.function(**dict(zip((*first, *names), values, strict=False)), **options)
            return items if self.item_weight is None else times(values[-1], items)

        return token_loss, tuple(token_inputs)

    def total(
        self,
        logp: Tensor,
        options: dict[str, Any],
        process_group: dist.ProcessGroup | None,
        label_generator: torch.Generator | None,
    ) -> Tensor:
        """Classes C and D, from every log-prob."""
        policy = {}
        if self.item_weight is not None and self.loss.item != "group":
            policy["counted"] = counts = self.item_weight != 0
            counts_B = counts.repeat_interleave(2) if self.loss.item == "pair" else counts
            counts = expand_to_tokens(counts_B, self.labels, self.layout["cu_seqlens"])
            logp = logp.where(counts, 0.0)  # -inf times a weight of 0 would be NaN
        policy["token_logp"] = logp
        if not self.loss.reads_tokens:
            policy["policy_logp"] = sequence_sum(logp, self.labels, **self.layout)
        if "kl_baseline" in self.loss.tensors and "kl_baseline" not in self.inputs:
            given = (policy["policy_logp"], self.inputs["ref_logp"], self.item_weight)
            policy["kl_baseline"] = _global_baseline(*given, process_group)
        arguments = self._arguments(policy)
        if label_generator is not None:
            arguments = _relabelled(arguments, {**self.loss.options, **options}["beta"], label_generator)
        return self._weighted(self.loss.function(**arguments, **options))

    def _arguments(self, policy: dict[str, Tensor]) -> dict[str, Tensor]:
        known = {**self.inputs, **policy}
        found = {}
        for name, (single, row) in self.loss.single_names.items():
            if single not in known and single == "lengths":
                known["lengths"] = sequence_lengths(self.labels, **self.layout)
            if single not in known and single == "mask":
                known["mask"] = self.labels != self.layout["ignore_index"]
            if single in known:
                found[name] = known[single] if row is None else known[single][row::2]
        return found

    def _over_tokens(self, name: str, values: Tensor) -> Tensor:
        """A log-prob belongs to its token; other values may be a row's, for each of its tokens."""
        if values.shape == self.labels.shape:
            return values
        of_rows = "token_logp" not in name
        if of_rows and values.shape == (self.num_rows,):
            return expand_to_tokens(values, self.labels, self.layout["cu_seqlens"])
        raise ValueError(
            f"{name} must be {tuple(self.labels.shape)}, one a token{f', or ({self.num_rows},), one a row' * of_rows}, "
            f"got {tuple(values.shape)}; align them with labels"
        )

    def _weighted(self, items: Tensor) -> Tensor:
        if items.shape != (self.num_items,):
            raise ValueError(
                f"the loss {self.loss.name!r} must return one loss an item, shape ({self.num_items},), got "
                f"{tuple(items.shape)}; leave the sum to linear_loss"
            )
        return (items if self.item_weight is None else times(self.item_weight.to(items.dtype), items)).sum()


def _savable(t: Tensor) -> Tensor:
    """The tensor, or a copy where it was made under inference_mode and autograd would not save it."""
    return t.clone() if t.is_inference() else t


def _relabelled(arguments: dict[str, Tensor], beta: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Chosen and rejected of every argument change places where the policy's own label says so."""
    margin_P = implicit_reward(arguments["policy_chosen_logp"], arguments["ref_chosen_logp"], beta=beta)
    margin_P = margin_P - implicit_reward(arguments["policy_rejected_logp"], arguments["ref_rejected_logp"], beta=beta)
    swapped_P = draw_preference(margin_P, generator)
    found = {}
    for name, values_P in arguments.items():
        other = name.replace("chosen", "rejected") if "chosen" in name else name.replace("rejected", "chosen")
        found[name] = torch.where(swapped_P, arguments[other], values_P)
    return found


def _global_baseline(
    policy_logp: Tensor, ref_logp: Tensor, item_weight: Tensor | None, process_group: dist.ProcessGroup | None
) -> Tensor:
    """``kto_baseline`` over the rows of every rank that have weight; 0 where it is NaN: the row that made it so has a
    loss of NaN, and no other needs one."""
    read_rows(learning=("policy_logp", "ref_logp"), policy_logp=policy_logp, ref_logp=ref_logp)
    change_B = policy_logp.detach().double() - ref_logp.double()
    counted_B = torch.ones_like(change_B) if item_weight is None else (item_weight != 0).to(change_B)
    total = torch.stack([(change_B * counted_B).sum(), counted_B.sum()])
    if process_group is not None:
        dist.all_reduce(total, group=process_group)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0).nan_to_num(0.0).to(policy_logp.dtype)
