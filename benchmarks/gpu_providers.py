"""The sides of the comparison: each takes hidden, weight, labels and token weights and gives a scalar loss.

Other libraries are called as their published versions want it: liger-kernel 0.8.5, cut-cross-entropy 25.1.1,
quack-kernels 0.6.5, trl 1.16.0, torch 2.13.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu_timing import MIB
from var_kernels import linear_logprob, linear_weighted_nll

IGNORED = -100


@dataclass(frozen=True)
class Provider:
    """loss(hidden, weight, labels, token_weight): a scalar, or None where only scoring is offered.
    score(hidden, weight, labels) -> anything, run without gradients.

    gemms: of the forward and backward, which its method cannot do without. weighted: whether tokens can be weighted;
    the others sum plain losses. module: must import; None: ours, or torch's own.
    """

    loss: Callable | None
    score: Callable | None
    gemms: int
    weighted: bool = True
    module: str | None = None
    frozen: bool = False

    @property
    def other(self) -> bool:
        return self.module is not None


def plain(hidden, weight, labels, token_weight):
    """As transformers computes it: all logits, upcast."""
    nll = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none", ignore_index=IGNORED)
    return (nll * token_weight).sum()


def plain_score(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none", ignore_index=IGNORED)


@functools.cache
def _compiled(function, backend):
    return torch.compile(function, dynamic=False, backend=backend)


def _by_compiler(function):
    def run(hidden, *others):
        # A dry run need not wait for C++.
        return _compiled(function, "inductor" if hidden.is_cuda else "aot_eager")(hidden, *others)

    return run


@functools.lru_cache(maxsize=4)
def _active(labels) -> int:
    """Read from the device once, by the run that warms up."""
    return int((labels != IGNORED).sum())


def _given(hidden, weight, labels, precision="fp32", workspace_mb=None, num_active=False, **options):
    """Keyword options of ours. workspace_mb: MiB, or a function of the weight."""
    if num_active:
        options["num_active"] = _active(labels)
    workspace_mb = workspace_mb(weight) if callable(workspace_mb) else workspace_mb
    return {"precision": precision, "workspace_mb": workspace_mb, **options}


def _weighted_nll(engine, **options):
    def loss(*tensors):
        return linear_weighted_nll(*tensors, engine=engine, **_given(*tensors[:3], **options))

    return loss


def _logprob(**options):
    def loss(hidden, weight, labels, token_weight):
        return -(
            linear_logprob(hidden, weight, labels, **_given(hidden, weight, labels, **options)) * token_weight
        ).sum()

    return loss


def _score(**options):
    def score(*tensors):
        return linear_logprob(*tensors, **_given(*tensors, **options))

    return score


def _dweight_and(extra_bytes: float) -> Callable:
    """MiB of an fp32 dW, which one pass adds up in more than one chunk, and so many bytes."""
    return lambda weight: (4 * weight.numel() + extra_bytes) / MIB


def _liger(chunk_mem_const=1, accum_dtype=None):
    def call(hidden, weight, labels, _=None):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(
            hidden,
            weight,
            labels,
            reduction="sum",
            ignore_index=IGNORED,
            accum_dtype=accum_dtype,
            chunk_mem_const=chunk_mem_const,
        )

    return Provider(call, call, 3, weighted=False, module="liger_kernel.transformers.functional")


def _liger_per_token(hidden, weight, labels, token_weight):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    nll = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORED)
    return (nll * token_weight).sum()


def _liger_scaled_score(hidden, weight, labels):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, IGNORED)


def _liger_scaled(hidden, weight, labels, token_weight):
    return (_liger_scaled_score(hidden, weight, labels) * token_weight).sum()


def _cce(**options):
    def score(hidden, weight, labels):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="none", **options)

    def loss(hidden, weight, labels, token_weight):
        return (score(hidden, weight, labels) * token_weight).sum()

    return Provider(loss, score, 4, module="cut_cross_entropy")


def _trl_score(hidden, weight, labels):
    # The function under TRL's add_fused_lm_head, with that function's chunk and selection of rows.
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    kept = labels != IGNORED
    logp = ChunkedLogProbFunction.apply(hidden[kept], weight, None, labels[kept], 1.0, 32768, None, 1.0, ())[0]
    return logp.new_zeros(labels.shape).masked_scatter(kept, logp)


def _trl(hidden, weight, labels, token_weight):
    return -(_trl_score(hidden, weight, labels) * token_weight).sum()


def _quack(hidden, weight, labels, _=None):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    # tuned=False: no search over kernels where the scaled-exp pipeline does not apply.
    return chunked_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="sum", tuned=False)


def _torch_own(policy):
    def call(hidden, weight, labels, _=None):
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=IGNORED, options=options)

    return Provider(call, call, 3, weighted=False, module="torch")


LIGER_SCALED = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
# The memory of the bars: 512 and 256 MB of tiles, and 1.1 GB beside the fp32 dW; MB of 10^6 bytes.
OURS = {
    "ours, one pass": Provider(_weighted_nll("one_pass"), _score(), 3),
    "ours, one pass, 1.1 GB": Provider(_weighted_nll("one_pass", workspace_mb=_dweight_and(1.1e9)), None, 3),
    "ours, any gradient": Provider(_logprob(), _score(), 4),
    "ours, any gradient, 512 MB": Provider(_logprob(workspace_mb=512e6 / MIB), _score(workspace_mb=512e6 / MIB), 4),
    "ours, any gradient, 256 MB": Provider(_logprob(workspace_mb=256e6 / MIB), None, 4),
    "ours, frozen head": Provider(_logprob(), None, 2, frozen=True),
    "ours, with entropy": Provider(None, _score(return_entropy=True), 1),
    "ours, fused forward": Provider(None, _score(workspace_mb=0), 1),
    "ours, fused forward, with entropy": Provider(None, _score(return_entropy=True, workspace_mb=0), 1),
    "ours, one pass, num_active": Provider(_weighted_nll("one_pass", num_active=True), _score(num_active=True), 3),
    "ours, any gradient, 512 MB, num_active": Provider(_logprob(workspace_mb=512e6 / MIB, num_active=True), None, 4),
    "ours, one pass, fast": Provider(_weighted_nll("one_pass", precision="fast"), _score(precision="fast"), 3),
    "ours, frozen head, fast": Provider(_logprob(precision="fast"), None, 2, frozen=True),
    "ours, any gradient, 512 MB, fast": Provider(_logprob(workspace_mb=512e6 / MIB, precision="fast"), None, 4),
    "ours, two passes, 512 MB": Provider(_weighted_nll("two_pass", workspace_mb=512e6 / MIB), None, 4),
}
# Of ours, the rows that no bar is about.
LATER = tuple(name for name in OURS if name.endswith(("fast", "two passes, 512 MB")))
# The few that users choose between.
PEERS = {
    "plain": Provider(plain, plain_score, 3),
    "liger, factor 16": _liger(16),
    "quack": Provider(_quack, _quack, 3, weighted=False, module="quack.linear_cross_entropy"),
    "cce": _cce(),
    "liger": _liger(),
    "trl": Provider(_trl, _trl_score, 4, module="trl.kernels.chunked_logprob"),
    "liger, scaled": Provider(_liger_scaled, _liger_scaled_score, 4, module=LIGER_SCALED),
    "torch.compile": Provider(_by_compiler(plain), _by_compiler(plain_score), 3, module="torch"),
}
# In each group the most telling first: a call that is cut short has them.
PROVIDERS = {
    **OURS,
    **PEERS,
    "liger, factor 16, fp32 sums": _liger(16, torch.float32),
    "liger, fp32 sums": _liger(1, torch.float32),
    "liger, per token": Provider(_liger_per_token, None, 4, module="liger_kernel.transformers.functional"),
    "cce, exact": _cce(filter_eps=None),
    "F.linear_cross_entropy": _torch_own("auto"),
    "F.linear_cross_entropy, accurate": _torch_own("accurate"),
}
# Where many shapes are measured.
FEW = ("ours, one pass", "ours, any gradient, 512 MB", "plain", "liger, factor 16", "cce", "quack", "torch.compile")


def obstacle(name: str, on_cpu: bool) -> str | None:
    """Why a provider cannot run here at all, or None."""
    provider = PROVIDERS[name]
    if name.startswith("F.linear") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "torch has no chunked linear_cross_entropy"
    if provider.other:
        try:
            importlib.import_module(provider.module)
        except Exception as error:  # some fail with a TypeError or a missing symbol
            return f"does not import: {type(error).__name__}: {error}".replace("\n", " ")
    if on_cpu and ("fused forward" in name or (provider.other and provider.module != "torch")):
        return "needs a GPU" + (", imports" if provider.other else "")
    return None
