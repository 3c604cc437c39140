"""VAR: SFT weighted by rewards and a frozen reference (arXiv 2502.11026). The weights are constants: one pass."""

from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, overload

import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Required, Unpack

from var_kernels.losses.checks import TOKEN_REDUCTIONS, TokenReduction, check_choice
from var_kernels.losses.sequences import check_layout, expand_to_tokens, sequence_lengths, sequence_sum
from var_kernels.losses.weights import (
    DEFAULT_NORMALIZER,
    DEFAULT_REFERENCE,
    Normalizer,
    Reference,
    VARWeights,
    check_weight_options,
    token_weights,
    var_weights,
)
from var_kernels.ops import linear_weighted_nll
from var_kernels.ops.checks import check_are_tensors
from var_kernels.ops.signatures import VARHeadKeywords

# what linear_weighted_nll takes from here as it is
HEAD_OPTIONS = VARHeadKeywords.__optional_keys__
_OF_THE_LOSS = (
    *("lam", "normalizer", "reference", "token_reduction", "process_group", "ignore_index", "return_stats"),
)


class VARStats(NamedTuple):
    """With ``return_stats``: the loss (), the weights, and logp (B,), the policy's detached log-probs, nats a sequence.

    logp is NaN for a sequence of weight 0, whose rows were never computed: take nanmean.
    """

    loss: Tensor
    weights: VARWeights
    logp: Tensor


Result = TypeVar("Result", Tensor, VARStats)


class VARKeywords(VARHeadKeywords, total=False):
    """Options that describe the loss; a batch has others."""

    lam: Required[float]
    normalizer: Normalizer
    reference: Reference | None
    token_reduction: TokenReduction
    process_group: dist.ProcessGroup | None
    ignore_index: int


@overload
def weighted_sequence_nll(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    token_reduction: TokenReduction = "sum",
    ignore_index: int = -100,
    return_logp: Literal[False] = False,
    **head_options: Unpack[VARHeadKeywords],
) -> Tensor: ...


@overload
def weighted_sequence_nll(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    token_reduction: TokenReduction = "sum",
    ignore_index: int = -100,
    return_logp: Literal[True],
    **head_options: Unpack[VARHeadKeywords],
) -> tuple[Tensor, Tensor]: ...


def weighted_sequence_nll(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    token_reduction: TokenReduction = "sum",
    ignore_index: int = -100,
    return_logp: bool = False,
    **head_options: Unpack[VARHeadKeywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """L = -sum_i w_i s_i ("sum"), or -sum_i w_i s_i / len_i ("mean"), for weights that are known beforehand.

    The second half of ``var_loss``. Call it by itself under gradient accumulation: ``var_weights`` once over the whole
    step's rewards, then this on each micro-batch with its rows of the weights; the losses of the micro-batches add up
    to the step's.

    Args:
        hidden, lm_head_weight, labels, bias, cu_seqlens, token_reduction, ignore_index, head_options: see ``var_loss``.
        sample_weight: (B,) floating point, any sign; taken as a constant.
        return_logp: also return (B,) detached log-probs of the sequences, nats; NaN where the weight is 0 (never
            computed).

    Returns:
        A scalar, nats, fp32 (fp64 for fp64 inputs); with ``return_logp`` the pair (loss, logp).
    """
    _check_loss_options(token_reduction, head_options)
    num_sequences = check_layout(hidden, labels, cu_seqlens)
    check_are_tensors(sample_weight=sample_weight)
    if sample_weight.shape != (num_sequences,):
        raise ValueError(
            f"sample_weight must be ({num_sequences},), one per sequence, got {tuple(sample_weight.shape)}; "
            "take this micro-batch's rows of the weights"
        )
    weight_B = sample_weight.detach().to(labels.device)
    if token_reduction == "mean":
        weight_B = weight_B / sequence_lengths(labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index).clamp(min=1)
    token_weight = expand_to_tokens(weight_B, labels, cu_seqlens)
    head = (hidden, lm_head_weight, bias)
    return _token_weighted_nll(
        head, labels, token_weight, weight_B, cu_seqlens, ignore_index, return_logp, head_options
    )


def _token_weighted_nll(
    head: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    token_weight: Tensor,
    weight_B: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    return_logp: bool,
    head_options: VARHeadKeywords,
) -> Any:
    """The loss of weights that are spread over the tokens already; head: hidden, lm_head_weight, bias."""
    hidden, lm_head_weight, bias = head
    result = linear_weighted_nll(
        hidden,
        lm_head_weight,
        labels,
        token_weight,
        bias,
        ignore_index=ignore_index,
        return_logp=return_logp,
        **head_options,
    )
    if not return_logp:
        return result
    loss, token_logp = result
    logp_B = sequence_sum(token_logp, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    return loss, logp_B.masked_fill(weight_B == 0, float("nan"))


@overload
def var_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    group_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[VARKeywords],
) -> Tensor: ...


@overload
def var_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    group_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[VARKeywords],
) -> VARStats: ...


def var_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lam: float,
    normalizer: Normalizer = DEFAULT_NORMALIZER,
    reference: Reference | None = None,
    lengths: Tensor | None = None,
    group_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_reduction: TokenReduction = "sum",
    process_group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    return_stats: bool = False,
    **head_options: Unpack[VARHeadKeywords],
) -> Tensor | VARStats:
    """Variational alignment by re-weighting: SFT on each response with the weight that the aligned policy gives it.

        pi*(y|x) = pi_ref(y|x) exp(r(x,y) / lam) / Z(x)
        L = -sum_i w_i s_i,   s_i = sum_t log pi(y_it | x_i, y_i<t)     token_reduction="sum"; "mean" has s_i / len_i
        w = var_weights(rewards, ref_logp, ...), constant in the policy

    One pass (6NDV FLOP), gradients made in the forward. Never materialised: the logits, (rows) x V; peak memory above
    inputs and gradients is ``workspace_mb``, see ``linear_weighted_nll``. The loss is a sum over sequences: its scale
    is the sum of the weights (1 for "batch", B for "batch_mean" and "self_normalised", number of groups for "group").

    Args:
        hidden: (B, T, D) padded, or (N, D) packed with cu_seqlens; the states before the lm_head.
        lm_head_weight: (V, D). bias: (V,).
        labels: (B, T), or (N,): int64, ALIGNED with hidden (label of the next token, already shifted); ignore_index
            carries no loss.
        rewards: (B,) floating point ((B, B) possible for "cross").
        ref_logp: (B,) summed reference log-probs, or one per token in the shape of labels; for "cross" (B, B). Nats.
        lam, normalizer, reference, group_ids: see ``var_weights``.
        lengths: (B,) tokens of each response for reference="mean"; counted from labels when None. A response of none
            gets weight 0 and has no part in Z, whatever the reference term.
        cu_seqlens: (B + 1,) int32, from 0 to N: where the packed sequences begin and end.
        token_reduction: "sum" reaches pi*; "mean" reaches pi* / len (short responses gain), as length-normalised SFT
            would.
        process_group: Z spans the global batch, and the loss is this rank's share times the number of ranks, so that
            the MEAN over ranks, of losses and of gradients, is that of the global batch: what DDP, FSDP and ZeRO
            compute. Do not scale again.
        return_stats: return VARStats(loss, weights, logp) in place of the loss.
        head_options: logit_scale, softcap, temperature, label_smoothing, z_loss, workspace_mb, precision, engine: see
            ``linear_weighted_nll``.

    Returns:
        A scalar, nats, fp32 (fp64 for fp64 inputs), or VARStats.

    Raises:
        TypeError, ValueError: as ``var_weights`` and ``linear_weighted_nll``; layouts that do not belong together.

    Source: arXiv 2502.11026 (objective and weighting); estimators of Z(x) and who needs which: docs/var.md.
    """
    _check_loss_options(token_reduction, head_options)
    num_sequences = check_layout(hidden, labels, cu_seqlens)
    if not isinstance(rewards, Tensor) or rewards.dim() == 0 or rewards.shape[0] != num_sequences:
        got = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(
            f"rewards must be ({num_sequences},), one per sequence of labels {tuple(labels.shape)}, got {got}; "
            "flatten prompts x completions and say which is whose with group_ids"
        )
    if lengths is not None:
        check_are_tensors(lengths=lengths)
    estimator: dict[str, Any] = {"lam": lam, "normalizer": normalizer, "reference": reference, "group_ids": group_ids}
    layout: dict[str, Any] = {"cu_seqlens": cu_seqlens, "ignore_index": ignore_index}
    by_kernel = None
    if token_reduction == "sum" and process_group is None:
        by_kernel = token_weights(rewards, ref_logp, labels, lengths=lengths, **estimator, **layout)
    if by_kernel is not None:
        weights, token_weight = by_kernel
        head = (hidden, lm_head_weight, bias)
        result = _token_weighted_nll(
            head, labels, token_weight, weights.weight, cu_seqlens, ignore_index, return_stats, head_options
        )
    else:
        of_tokens = isinstance(ref_logp, Tensor) and ref_logp.shape == labels.shape != rewards.shape
        if ref_logp is not None and of_tokens and normalizer != "cross":
            ref_logp = sequence_sum(ref_logp, labels, **layout)
        if lengths is None:
            lengths = sequence_lengths(labels, **layout)
        lengths = lengths.to(rewards.device)
        weights = var_weights(rewards, ref_logp, lengths=lengths, process_group=process_group, **estimator)
        options: Any = {"token_reduction": token_reduction, "return_logp": return_stats, **layout, **head_options}
        result = weighted_sequence_nll(hidden, lm_head_weight, labels, weights.weight, bias, **options)
    ranks = 1 if process_group is None else dist.get_world_size(process_group)
    if return_stats:
        return VARStats(result[0] * ranks, weights, result[1])
    return result * ranks


class VARLoss(nn.Module, Generic[Result]):
    """``var_loss`` with its options fixed at construction, where they are checked.

        loss_fn = VARLoss(lam=0.5)
        loss = loss_fn(hidden, lm_head.weight, labels, rewards, group_ids=group_ids)

    Args: the keyword options of ``var_loss``, of which it keeps those that describe the loss (lam, normalizer,
    reference, token_reduction, process_group, ignore_index, return_stats and the head's). What belongs to a batch
    (lengths, group_ids, cu_seqlens) is given to the call.
    """

    @overload
    def __init__(
        self: "VARLoss[Tensor]", *, return_stats: Literal[False] = False, **options: Unpack[VARKeywords]
    ) -> None: ...

    @overload
    def __init__(self: "VARLoss[VARStats]", *, return_stats: Literal[True], **options: Unpack[VARKeywords]) -> None: ...

    def __init__(
        self,
        *,
        lam: float,
        normalizer: Normalizer = DEFAULT_NORMALIZER,
        reference: Reference | None = None,
        token_reduction: TokenReduction = "sum",
        process_group: dist.ProcessGroup | None = None,
        ignore_index: int = -100,
        return_stats: bool = False,
        **head_options: Unpack[VARHeadKeywords],
    ) -> None:
        super().__init__()
        _check_loss_options(token_reduction, head_options)
        self.lam = lam
        self.normalizer = normalizer
        check_weight_options(lam, normalizer, reference)
        self.reference = reference
        self.token_reduction = token_reduction
        self.process_group = process_group
        self.ignore_index = ignore_index
        self.return_stats = return_stats
        self.head_options = head_options

    def forward(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        labels: Tensor,
        rewards: Tensor,
        ref_logp: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        group_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Result:
        """See ``var_loss``: the same arguments, shapes and result."""
        options: Any = {name: getattr(self, name) for name in _OF_THE_LOSS} | self.head_options
        of_batch: Any = {"lengths": lengths, "group_ids": group_ids, "cu_seqlens": cu_seqlens}
        return var_loss(hidden, lm_head_weight, labels, rewards, ref_logp, bias, **of_batch, **options)

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any
        __call__ = forward

    def extra_repr(self) -> str:
        reference = self.reference or DEFAULT_REFERENCE
        options = {"lam": self.lam, "normalizer": self.normalizer, "reference": reference, **self.head_options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _check_loss_options(token_reduction: str, head_options: VARHeadKeywords) -> None:
    check_choice("token_reduction", token_reduction, TOKEN_REDUCTIONS)
    unknown = sorted(set(head_options) - HEAD_OPTIONS)
    if unknown:
        raise TypeError(
            f"options of the head must be among {', '.join(sorted(HEAD_OPTIONS))}, got {', '.join(unknown)}; leave out "
            "others"
        )
