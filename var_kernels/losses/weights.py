"""The weights of VAR: the share of the loss that each sequence gets. (B,) tensors only, detached, in log space."""

import importlib
import warnings
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from var_kernels.losses.checks import check_choice, check_constants, check_kind, values_readable
from var_kernels.losses.segments import Groups, group_rows
from var_kernels.ops.backend import triton_obstacle, uses_triton
from var_kernels.ops.checks import is_traced

Normalizer = Literal["batch", "batch_mean", "cross", "group", "self_normalised"]
Reference = Literal["sum", "mean", "none"]
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)
REFERENCES: tuple[str, ...] = get_args(Reference)
PER_PROMPT = ("group", "self_normalised")  # given group_ids, Z is over a prompt's completions
DEFAULT_NORMALIZER: Normalizer = "self_normalised"
DEFAULT_REFERENCE: Reference = "none"  # here, in VARLoss and in VARConfig: docs/var.md
MIN_REWARD_SPREAD = 1e-3  # of r / lam, largest less smallest: below it weights differ by a thousandth at most
MIN_ESS_SHARE = 0.1  # of the way from one-hot (one sequence of each group has all the weight) to uniform


class VARWeights(NamedTuple):
    """weight (B,): the rows of this process. log_z: () where one normaliser serves the batch ("batch", "batch_mean",
    and "self_normalised" without groups), else (B,), that of each row. ess (): effective sample size of the GLOBAL
    batch, in sequences. All fp32 (fp64 for fp64 inputs), without autograd history."""

    weight: Tensor
    log_z: Tensor
    ess: Tensor


class IgnoredRewardsWarning(UserWarning):
    """The rewards of a batch have no effect on its weights, or advantages."""


class CollapsedWeightsWarning(UserWarning):
    """Nearly all of the loss's weight lies on a few sequences of the batch."""


def var_weights(
    rewards: Tensor,
    ref_logp: Tensor | None = None,
    *,
    lam: float,
    normalizer: Normalizer = DEFAULT_NORMALIZER,
    reference: Reference | None = None,
    lengths: Tensor | None = None,
    group_ids: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> VARWeights:
    """Weights w_i of the VAR loss L = -sum_i w_i log pi(y_i|x_i), with Z(x) estimated inside the batch.

        a_i = ref_i + r_i / lam,     ref_i = sr_i ("sum") | sr_i / len_i ("mean") | 0 ("none")

        normalizer         log Z                                    w_i                    sum of w
        "batch"            LSE_j a_j                                exp(a_i - log Z)       1
        "batch_mean"       LSE_j a_j - log B                        exp(a_i - log Z)       B
        "group"            LSE of a over the rows of i's group      exp(a_i - log Z_i)     number of groups
        "cross"            LSE_j a_ij, a_ij: y_j under prompt x_i   exp(a_ii - log Z_i)    between 0 and B
        "self_normalised"  log mean_k exp(r_k / lam) over the       exp(r_i/lam - log Z)   K per group (or B)
                           group, or over the batch

    The default, "self_normalised" without a reference term, is right for responses drawn from pi_ref, keeps lam in
    charge on free text, and needs nothing but rewards (group_ids, where prompts have several responses). A reference
    term ("sum") is right for enumerated candidates, wrong for responses drawn from pi_ref. Responses drawn from a known
    mu: pass sr - log mu. More: docs/var.md.

    Args:
        rewards: (B,) floating point, reward units; also (B, B) for "cross": entry ij is the reward of y_j as an answer
            to x_i.
        ref_logp: (B,) floating point: sr, the sequence's summed log-prob under the reference policy, nats
            (``sequence_sum`` makes it from tokens). For "cross" (B, B): entry ij is log pi_ref(y_j|x_i). Needed by
            "sum" and "mean"; unused with reference="none" said by name, and refused with reference=None.
        lam: > 0, in reward units: small follows the reward, large stays with the reference.
        normalizer: the estimator of Z(x), from the table.
        reference: "sum" | "mean" | "none". None means "none", the only one that "self_normalised" has.
        lengths: (B,) integers: tokens that carry loss, needed for "mean". A row of length 0 (prompt truncated, filler)
            gets weight 0 and has no part in Z.
        group_ids: (B,) integers, any values: rows with equal ids answer the same prompt. Needed for "group", optional
            for "self_normalised", unused elsewhere.
        process_group: Z, groups and ess then span all its ranks (equal group_ids on two ranks are one group; the local
            B may differ and may be 0). Each rank gets its own rows' weights. "cross" needs (B, B_global) matrices,
            columns in rank order.

    Returns:
        VARWeights(weight, log_z, ess), fp32 (fp64 if rewards or ref_logp is fp64), arithmetic in fp64, detached.
        ess = (sum w)^2 / sum w^2; with groups, ess / number of groups is the harmonic mean of the groups' own.

    Raises:
        TypeError, ValueError: a combination that lacks an argument, shapes, dtypes, devices; NaN or infinity in CPU
            tensors. Values on CUDA, and in a compiled graph, are not read (that would stall the device, or break the
            graph): NaN there comes out as NaN weights. With a process group every rank raises on bad values; one host
            sync is needed to learn the local batch sizes.

    Warns:
        CollapsedWeightsWarning: see ``warn_if_collapsed``.
        IgnoredRewardsWarning: no reward of the (global) batch can move a weight, see ``warn_if_rewards_ignored``. By
            itself for CPU tensors only, for the same reason; on CUDA a batch of one row is named.

    Source: arXiv 2502.11026 for the weighting pi_ref exp(r/lam)/Z. The estimators of Z are derived (docs/var.md), and
    none is claimed to be the paper's.
    """
    term = check_weight_options(lam, normalizer, reference, ref_logp)
    check_batch(rewards, ref_logp, normalizer, term, lengths, group_ids, process_group)
    ref_logp = None if term == "none" or ref_logp is None else ref_logp.detach()
    problem = bad_values(rewards, ref_logp, lengths)
    if problem and process_group is None:
        raise ValueError(problem)
    dtype = _result_dtype(rewards, ref_logp)
    grouped = normalizer in PER_PROMPT and group_ids is not None
    kernels = weights_kernel(rewards, normalizer, group_ids) if process_group is None else None
    rewards = rewards.detach() if kernels else rewards.detach().double()
    if problem:  # as NaN it reaches every rank and all raise below; raising here would leave the others waiting
        rewards = torch.full_like(rewards, float("nan"))

    mean = normalizer in ("batch_mean", "self_normalised")
    compared = {"lengths": lengths, "group_ids": group_ids if grouped else None}
    num_groups = 1
    num_kept: int | Tensor
    compared_rewards: Tensor | None = rewards
    if kernels:
        options = {"lam": lam, "mean": mean, "reference": term, "dtype": dtype}
        weight_B, log_z, ess, _ = kernels.var_weights(rewards, ref_logp, lengths=lengths, **options)
        weight_G, num_kept = weight_B, len(weight_B)
        if values_readable(weight_B) and lengths is not None:
            num_kept = (lengths > 0).sum()
    elif normalizer == "cross":
        weight_B, log_z, num_kept = _cross_weights(rewards, ref_logp, lam, term, lengths, process_group)
        (weight_G,), _ = _gather([weight_B], process_group)  # (B_global,)
        if process_group is not None:
            compared_rewards = None  # other ranks' rows may be the ones that tell
    else:
        score_B = _scores(rewards, ref_logp, lam, term, lengths)
        if lengths is not None:
            score_B = score_B.masked_fill(lengths == 0, -torch.inf)
        # Without a reference's term the scores are the rewards.
        ids = [group_ids] if grouped and group_ids is not None else []
        (score_G, *columns), own = _gather([score_B, *ids, *([] if term == "none" else [rewards])], process_group)
        ids_G = columns[0] if grouped else None
        compared_rewards = score_G * lam if term == "none" else columns[-1]
        groups = None if ids_G is None else group_rows(ids_G)
        weight_G, log_z = _normalise(score_G, groups, mean=mean)  # (B_global,)
        weight_B, log_z = weight_G[own], log_z[own] if grouped else log_z
        kept_G = score_G > -torch.inf
        num_kept = kept_G.sum()
        if ids_G is not None and values_readable(kept_G):
            num_groups = ids_G[kept_G].unique().numel()
        compared = {"lengths": kept_G.long(), "group_ids": ids_G}
    if not kernels:
        ess = effective_sample_size(weight_G)

    if values_readable(weight_G):
        if weight_G.isnan().any():
            elsewhere = "rewards or ref_logp of another rank must be finite; see the message of that rank"
            overflow = f"rewards / lam must be finite, overflows at lam={lam}; raise lam, or scale the rewards down"
            raise ValueError(problem or (overflow if process_group is None else elsewhere))
        if process_group is None or dist.get_rank(process_group) == 0:
            if compared_rewards is not None:
                warn_if_rewards_ignored(compared_rewards, lam=lam, **compared)
            warn_if_collapsed(ess, int(num_kept), num_groups, lam=lam, normalizer=normalizer, reference=term)
    elif process_group is None:
        warn_if_alone(rewards)
    return VARWeights(weight_B.to(dtype), log_z.to(dtype), ess.to(dtype))


def token_weights(
    rewards: Tensor,
    ref_logp: Tensor | None,
    labels: Tensor,
    *,
    lam: float,
    normalizer: str,
    reference: str | None,
    lengths: Tensor | None,
    group_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> tuple[VARWeights, Tensor] | None:
    """``var_weights`` from log-probs per token (or sums), and each token's weight: the shape of labels.

    From tokens to tokens in one launch; lengths are counted from labels when None. None for a call that the kernel does
    not support: sum, weigh and expand then.
    """
    reference = check_weight_options(lam, normalizer, reference, ref_logp)
    kernels = weights_kernel(rewards, normalizer, group_ids, labels)
    if kernels is None:
        return None
    read = None if reference == "none" or ref_logp is None else ref_logp.detach()
    per_token = read is not None and read.shape == labels.shape != rewards.shape
    # Stand-ins of the right form for what the kernel makes itself.
    sums = read.new_empty(rewards.shape[0]) if read is not None and per_token else ref_logp
    lengths = None if lengths is None else lengths.to(rewards.device)
    counted = labels.new_empty(rewards.shape[0]) if lengths is None else lengths
    check_batch(rewards, sums, normalizer, reference, counted, group_ids, None)
    problem = bad_values(rewards, None if per_token else read, lengths)
    if problem:
        raise ValueError(problem)
    weight_B, log_z, ess, token_weight = kernels.var_weights(
        rewards.detach(),
        read,
        lam=lam,
        mean=normalizer in ("batch_mean", "self_normalised"),
        reference=reference,
        lengths=lengths,
        labels=labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        dtype=_result_dtype(rewards, read),
    )
    warn_if_alone(rewards)
    return VARWeights(weight_B, log_z, ess), token_weight


def weights_kernel(
    rewards: Tensor, normalizer: str, group_ids: Tensor | None, labels: Tensor | None = None
) -> ModuleType | None:
    """The Triton module where one launch gives the weights: Z over the batch, and a batch that one program holds."""
    grouped = normalizer in PER_PROMPT and group_ids is not None
    device, num_rows = rewards.device, rewards.shape[0]
    if grouped or normalizer == "cross" or is_traced(rewards):
        return None
    if triton_obstacle(device, torch.float32) or not uses_triton(device):
        return None
    kernels = importlib.import_module("var_kernels.kernels.weights_triton")
    if labels is None:
        return kernels if 0 < num_rows <= kernels.MAX_SEQUENCES else None
    holds = 0 < num_rows <= kernels.TOKEN_SEQUENCES and labels.numel() <= kernels.MAX_TOKENS
    return kernels if holds and device == labels.device else None


def _result_dtype(rewards: Tensor, ref_logp: Tensor | None) -> torch.dtype:
    fp64 = torch.float64 in (rewards.dtype, None if ref_logp is None else ref_logp.dtype)
    return torch.float64 if fp64 else torch.float32


def effective_sample_size(sample_weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of (B,) weights >= 0: (), in sequences, 1 (one has all) to B (uniform); 0 where all are 0."""
    check_kind("sample_weight", sample_weight, "floating-point", "(B,)", "use torch.tensor(...), or .float()")
    largest = sample_weight.max().clamp(min=torch.finfo(sample_weight.dtype).tiny)
    scaled = sample_weight / largest  # squares of small weights would underflow
    return scaled.sum().square() / scaled.square().sum().clamp(min=1.0)


# By the reference term. lam divides the rewards alone: against summed log-probs it is no help.
_MORE_WEIGHTS = {
    "none": "Raise lam.",
    "mean": "Raise lam, or take reference='none' (another target: docs/var.md).",
    "sum": "Take reference='mean' or 'none' (another target: docs/var.md), or raise lam where sums lie close together.",
}


def warn_if_collapsed(ess: Tensor | float, num_sequences: int, num_groups: int = 1, **options: Any) -> bool:
    """Warn (CollapsedWeightsWarning) of weights less than a tenth of the way from one-hot to uniform; True if it did.

        share = (ess - num_groups) / (num_sequences - num_groups) < 0.1

    so below 4.1 of 32 in one batch, 1.7 of 8 completions in a group, 1.1 of 2 in a pair. A batch of one row a group has
    nothing to collapse and is not warned about. Reads ``ess`` on the host: for a CUDA tensor call it where metrics are
    logged, not every step. The text holds whole numbers only, so Python's default filter shows a lasting collapse once
    or a few times, not at every step.

    Args:
        ess: () effective sample size in sequences; num_sequences: rows of the global batch that carry loss; num_groups:
            groups among them (1 for a batch normaliser); options: what to name in the message (lam, normalizer,
            reference).
    """
    ess = float(ess)
    if num_sequences <= num_groups or (ess - num_groups) / (num_sequences - num_groups) >= MIN_ESS_SHARE:
        return False
    chosen = ", ".join(f"{name}={value!r}" for name, value in options.items())
    groups = "1 group" if num_groups == 1 else f"{num_groups} groups"
    warnings.warn(
        f"VAR weights have collapsed: effective sample size about {ess:.0f} of {num_sequences} sequences in "
        f"{groups}{f' ({chosen})' if chosen else ''}. The rest of the batch is hardly trained on. "
        f"{_MORE_WEIGHTS.get(options.get('reference', 'sum'), _MORE_WEIGHTS['sum'])}",
        CollapsedWeightsWarning,
        stacklevel=3,
    )
    return True


def _scores(rewards: Tensor, ref_logp: Any, lam: float, reference: str, lengths: Any) -> Tensor:
    """a = ref + r / lam, (B,) or (B, B_global): the last dimension is the response."""
    score = rewards / lam
    if reference == "sum":
        score = score + ref_logp.double()
    elif reference == "mean":
        score = score + ref_logp.double() / lengths.clamp(min=1)
    return score


def _normalise(score_B: Tensor, groups: Groups | None, *, mean: bool) -> tuple[Tensor, Tensor]:
    """exp(a - log Z) and log Z: the sum, or the mean, of exp(a) over the batch () or over each row's group (B,)."""
    if groups is None:
        return _exp_over_sum(score_B, score_B, mean=mean)
    top_B = groups.max(score_B)
    top_B = top_B.masked_fill(top_B == -torch.inf, 0.0)
    exp_B = (score_B - top_B).exp()
    total_B = groups.sum(exp_B)
    if mean:
        total_B = total_B / groups.sum((score_B > -torch.inf).to(score_B.dtype)).clamp(min=1)
    return (exp_B / total_B).masked_fill(score_B == -torch.inf, 0.0), top_B + total_B.log()


def _cross_weights(
    rewards: Tensor,
    ref_logp: Tensor | None,
    lam: float,
    reference: str,
    lengths: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(a_ii - LSE_j a_ij) (B,), log Z_i (B,), number of rows kept (). Row i's own response: column own.start + i."""
    kept_B = torch.ones(rewards.shape[0], dtype=torch.int64, device=rewards.device) if lengths is None else lengths
    columns, own = _gather([kept_B, rewards] if rewards.dim() == 1 else [kept_B], process_group)
    lengths_G = columns[0]
    rewards = columns[1] if len(columns) == 2 else rewards  # (B_global,), the same for every prompt, or (B, B_global)
    score = _scores(rewards, ref_logp, lam, reference, lengths_G).expand(kept_B.shape[0], -1)
    if score.shape[1] != lengths_G.shape[0]:
        raise ValueError(
            f"ref_logp must be (B, B_global) = ({kept_B.shape[0]}, {lengths_G.shape[0]}) for normalizer='cross', got "
            f"{tuple(score.shape)}; score the responses of every rank under the local prompts"
        )
    score = score.masked_fill(lengths_G == 0, -torch.inf)
    weight_B, log_z_B = _exp_over_sum(score[:, own].diagonal(), score)
    return weight_B, log_z_B, (lengths_G > 0).sum()


def _exp_over_sum(score: Tensor, table: Tensor, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """exp(score) / S and log S, S the sum (or mean) of exp(table) along its last dimension; -inf means left out."""
    # the maximum is taken off before the sum is: a weight formed as exp(score - log Z) loses digits as |log Z| grows
    top = table.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = (table - top).exp().sum(-1)
    if mean:
        total = total / (table > -torch.inf).sum(-1).clamp(min=1)
    top = top.squeeze(-1)
    weight = ((score - top).exp() / total).masked_fill(score == -torch.inf, 0.0)
    return weight, top + total.log()


def _gather(columns: list[Tensor], process_group: dist.ProcessGroup | None) -> tuple[list[Tensor], slice]:
    """Each (B,) column of every rank, one behind the other, and where this rank's rows are. B may differ by rank."""
    num_rows = columns[0].shape[0]
    if process_group is None:
        return columns, slice(0, num_rows)
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    sizes = [columns[0].new_empty(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, columns[0].new_tensor([num_rows], dtype=torch.int64), group=process_group)
    counts = torch.cat(sizes).tolist()
    if not any(counts):
        raise ValueError(
            "rewards must hold at least one sequence on some rank of process_group, got none; skip the step everywhere"
        )
    gathered = []
    for column in columns:
        padded = column.new_zeros(max(counts))
        padded[:num_rows] = column
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=process_group)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, counts, strict=True)]))
    start = sum(counts[:rank])
    return gathered, slice(start, start + num_rows)


# ---- checks: metadata everywhere, values on the CPU only -------------------------------------------------------------


def check_weight_options(lam: float, normalizer: str, reference: str | None, ref_logp: Tensor | None = None) -> str:
    """Refuse options that are wrong by themselves; returns the reference term with None resolved."""
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        raise TypeError(f"lam must be a Python number > 0, got {type(lam).__name__}; pass lam=float(...)")
    if not lam > 0:
        raise ValueError(f"lam must be > 0 (reward units), got {lam}; negate the rewards to minimise them")
    check_choice("normalizer", normalizer, NORMALIZERS)
    if reference is not None:
        check_choice("reference", reference, REFERENCES)
    elif ref_logp is not None:
        remedy = "normalizer='group' or 'batch' with " if normalizer == "self_normalised" else ""
        raise ValueError(
            f"reference must be given with ref_logp, got None, which is {DEFAULT_REFERENCE!r} and reads none; "
            f"leave ref_logp out, or weigh by it: {remedy}reference='mean' or 'sum'"
        )
    if normalizer == "self_normalised" and reference in ("sum", "mean"):
        raise ValueError(
            f"reference must be 'none' for normalizer='self_normalised', got {reference!r}; drop it, or take "
            "normalizer='group' or 'batch' to weigh by the reference as well"
        )
    return reference or DEFAULT_REFERENCE


def check_batch(
    rewards: Tensor,
    ref_logp: Tensor | None,
    normalizer: str,
    reference: str,
    lengths: Tensor | None,
    group_ids: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> None:
    """Refuse missing arguments and wrong dtypes, shapes and devices."""
    cross = normalizer == "cross"
    check_kind("rewards", rewards, "floating-point", "(B,)", "use torch.tensor(...), or rewards.float()")
    if rewards.dim() != 1 and not (cross and rewards.dim() == 2):
        remedy = "flatten prompts x completions and say which is whose with group_ids"
        allowed = "(B,) or (B, B)" if cross else "(B,), one per sequence"
        raise ValueError(f"rewards must be {allowed}, got shape {tuple(rewards.shape)}; {remedy}")
    rows = rewards.shape[0]
    if rows == 0 and process_group is None:
        raise ValueError("rewards must hold at least one sequence, got an empty batch; skip the step")
    # over several ranks the columns of "cross" are known only after a collective, and are checked there
    pairwise = (rows, rows if process_group is None else None)
    if cross and rewards.dim() == 2:
        _check_like("rewards", rewards, pairwise, rewards)
    if reference != "none":
        if ref_logp is None:
            wanted = "(B, B) scores" if cross else "(B,) sequence sums"
            raise ValueError(f"ref_logp must be given for reference={reference!r}; pass {wanted}, or reference='none'")
        check_kind("ref_logp", ref_logp, "floating-point", "(B,)", "use torch.tensor(...), or ref_logp.float()")
        _check_like("ref_logp", ref_logp, pairwise if cross else (rows,), rewards)
    if reference == "mean" and lengths is None:
        raise ValueError(
            "lengths must be given for reference='mean', which divides by them; pass the token counts (B,)"
        )
    if normalizer == "group" and group_ids is None:
        raise ValueError("group_ids must be given for normalizer='group'; pass (B,) ids, equal for the same prompt")
    for name, values in (("lengths", lengths), ("group_ids", group_ids)):
        if values is not None:
            check_kind(name, values, "integer", "(B,)", "use .long()")
            _check_like(name, values, (rows,), rewards)


def bad_values(rewards: Tensor, ref_logp: Tensor | None, lengths: Tensor | None) -> str | None:
    """The message for NaN, infinities and negative lengths on the CPU; None where all is well or unread."""
    if not values_readable(rewards):
        return None
    try:
        check_constants(rewards=rewards, **({} if ref_logp is None else {"ref_logp": ref_logp}))
    except ValueError as error:
        return str(error)
    if lengths is not None and (lengths < 0).any():
        return f"lengths must be >= 0, got {int(lengths.min())}; count the labels that carry loss (sequence_lengths)"
    return None


def warn_if_rewards_ignored(
    rewards: Tensor, *, lam: float = 1.0, lengths: Tensor | None = None, group_ids: Tensor | None = None
) -> bool:
    """Warn (IgnoredRewardsWarning) where no reward of the batch can move a weight, plain SFT; True if it did.

    Z is taken over the batch, or over each group: a sequence that is alone there has the weight 1 whatever its reward,
    and so have sequences of equal rewards, or of rewards that differ by less than a thousandth of lam. Not warned about
    where that is so in some of the groups only. Reads values on the host: for CUDA tensors, where ``var_weights`` sees
    no more than the number of rows, call it where metrics are logged.

    Args:
        rewards: (B,), or (B, B) for "cross"; lam: as given to ``var_weights``; lengths, group_ids: (B,), likewise.
    """
    reward = rewards.detach().double()
    kept = torch.ones_like(reward, dtype=torch.bool) if lengths is None else (lengths > 0).expand_as(reward)
    high, low = reward.masked_fill(~kept, -torch.inf), (-reward).masked_fill(~kept, -torch.inf)
    if group_ids is None:
        size, spread = kept.sum(-1), high.amax(-1) + low.amax(-1)
    else:
        groups = group_rows(group_ids)
        size, spread = groups.sum(kept.double()), groups.max(high) + groups.max(low)
    if not kept.any() or (spread >= MIN_REWARD_SPREAD * lam).any():
        return False
    place = "the batch" if group_ids is None else "every group"
    alone = bool((size <= 1).all())
    if alone:
        reason = f"{place} has one sequence, whose weight does not depend on its reward"
    elif (spread <= 0).all():
        reason = f"they are equal within {place}"
    else:
        reason = f"within {place} they differ by less than {MIN_REWARD_SPREAD:g} lam, lam={lam:g}"
    if not alone:
        remedy = "give rewards that tell the sequences apart" + ("" if lam == 1.0 else ", or lower lam")
    elif group_ids is None:
        remedy = "weigh the sequences of the whole optimiser step together"
    else:
        remedy = "give several completions a prompt, or compare sequences of different prompts: no group_ids"
    _warn_ignored(reason, remedy)
    return True


def warn_if_alone(rewards: Tensor) -> None:
    """Check a batch whose values are not read, by metadata alone; a compiled graph cannot warn."""
    if not (values_readable(rewards) or torch.compiler.is_compiling()) and rewards.shape[0] == 1:
        _warn_ignored(
            "the batch has one sequence, whose weight does not depend on its reward",
            "weigh the sequences of the whole optimiser step together",
        )


def warn_if_advantages_vanish(deviation: Tensor, reward_B: Tensor, compared: str) -> None:
    """Warn (IgnoredRewardsWarning) where every advantage is 0 up to rounding; read on the CPU only.

    deviation: of the rewards from the mean that they are compared with, any shape; compared: over what it was taken.
    """
    if not (values_readable(deviation) and values_readable(reward_B)) or not reward_B.numel():
        return
    if deviation.abs().max() <= 1e-9 * reward_B.abs().max():
        warnings.warn(
            f"rewards have no effect on this batch: each is alone in its {compared} or equal to the others there, and "
            "its advantage is 0; give several completions with different rewards.",
            IgnoredRewardsWarning,
            stacklevel=3,
        )


def _warn_ignored(reason: str, remedy: str) -> None:
    warnings.warn(
        f"rewards have no effect on this batch: {reason}. Its loss is that of equal rewards, which without a reference "
        f"term is plain SFT; {remedy} (docs/var.md).",
        IgnoredRewardsWarning,
        stacklevel=4,
    )


def _check_like(name: str, values: Tensor, shape: tuple[int | None, ...], rewards: Tensor) -> None:
    """Shape (None: any size) and the device of rewards."""
    fits = values.dim() == len(shape) and all(
        want in (None, got) for got, want in zip(values.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("B_global" if size is None else str(size) for size in shape)
        remedy = "sum tokens with sequence_sum first" if values.dim() > len(shape) else "pass one row per sequence"
        raise ValueError(
            f"{name} must be ({wanted}) beside rewards {tuple(rewards.shape)}, got {tuple(values.shape)}; {remedy}"
        )
    if values.device != rewards.device:
        raise ValueError(f"{name} must be on {rewards.device} like rewards, got {values.device}; move it there")
