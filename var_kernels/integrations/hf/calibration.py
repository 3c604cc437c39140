"""The operations that follow a model's lm_head, found once per model by injecting known values after the head.

Config names are no guide: logits_scaling divides in Granite and multiplies in HyperCLOVA X, some models carry a
logit_scale that they do not use, recurrent_gemma and xLSTM name their softcap differently. What the model returns
decides.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.forwards import of_a_library
from var_kernels.integrations.hf.loss_rule import LossRule, fit_loss_rule
from var_kernels.integrations.hf.model import (
    dense_weight,
    find_head,
    inner_model,
    is_adapter,
    is_dtensor,
    is_encoder_decoder,
    vocabulary_size,
)
from var_kernels.integrations.hf.probe import Probe, TrialFailedError, noise, unseen, vector

MASKED = -1e4  # logits below it, whatever the head puts out, are masked ids
# save_pretrained writes these, on the rank that saves: a calibration there alone would wait for the others for ever
_BOOKKEEPING = ("architectures", "dtype", "transformers_version", "use_cache")
_MASK = -3e4  # what we give them: exp of it is 0, and every floating point type holds it


# The term right left that active adapters add to the raw logits, left (B, T, R), a row for each of hidden's, and right
# (V, R); a bias is a column of right, ones in left.
LowRank = tuple[Tensor, Tensor]


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
    low_rank: LowRank | None = None

    @property
    def logit_options(self) -> dict[str, Any]:
        """The keyword arguments by which the ops take the transform, and the adapter where there is one."""
        options = {"logit_scale": self.logit_scale, "softcap": self.softcap}
        return options if self.low_rank is None else {**options, "low_rank": self.low_rank}


@dataclass(frozen=True)
class Transform:
    """logits[..., :vocab] = softcap * tanh(logit_scale * head(h) / softcap) + bias_ratio * vocabulary_bias."""

    logit_scale: float
    softcap: float | None
    vocab: int
    causal: bool  # the hidden state at t does not depend on the tokens after t
    vocabulary_bias: str | None = None  # name of the parameter or buffer that is added; only without softcap
    bias_ratio: float = 1.0
    masked: tuple[int, ...] = ()  # ids that the model never gives any probability
    wide: bool = False  # the model writes at single ids: its placeholder must be V wide

    def logits(self, x: Tensor, inner: nn.Module) -> Tensor:
        """(..., vocab) of the head's output x (..., V); masked ids as if they were none."""
        logits = _apply(x, self.logit_scale, self.softcap)
        if self.vocabulary_bias is not None:
            logits = logits + self.bias_ratio * vector(inner, self.vocabulary_bias).to(x)
        return logits[..., : self.vocab]

    def params(self, head: nn.Linear, inner: nn.Module) -> HeadParams:
        """The head's tensors as they are now: gathered, when asked for within its forward."""
        core = head.base_layer if is_adapter(head) else head
        weight, bias = dense_weight(core), core.bias
        if is_dtensor(weight):
            return self._sharded_params(weight, bias, inner)
        if self.vocabulary_bias is not None:
            added = vector(inner, self.vocabulary_bias).to(weight) * (self.bias_ratio / self.logit_scale)
            bias = added if bias is None else bias + added
        if self.masked:
            ids = torch.tensor(self.masked, device=weight.device)
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            bias = bias.index_fill(0, ids, math.copysign(_MASK, -self.logit_scale))
        if weight.shape[0] != self.vocab:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        factors = getattr(head, "_var_kernels_low_rank", None)
        low_rank = None if factors is None else (factors[0], factors[1][: self.vocab])
        return HeadParams(weight, bias, self.logit_scale, self.softcap, low_rank=low_rank)

    def _sharded_params(self, weight: Any, bias: Any, inner: nn.Module) -> HeadParams:
        """With this rank's rows of the weight and of the bias, and the group of the ranks that share the vocabulary."""
        from torch.distributed.tensor import Shard

        name = type(inner).__name__
        if self.vocabulary_bias is not None or self.masked or weight.shape[0] != self.vocab:
            raise ValueError(
                f"{name}: an lm_head that is sharded over ranks must have no vocabulary bias, masked ids or cut after "
                "it, got one of these; leave lm_head out of the tensor-parallel plan"
            )
        mesh, placements = weight.device_mesh, tuple(weight.placements)
        if mesh.ndim != 1 or placements != (Shard(0),) or (bias is not None and not is_dtensor(bias)):
            raise ValueError(
                f"{name}: inside its own forward the lm_head weight (and its bias) must be a DTensor sharded by the "
                f"vocabulary over one group of ranks, (Shard(dim=0),), got one placed as {placements}; use the plan "
                "'colwise_gather_output', or leave lm_head out of it"
            )
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        return HeadParams(weight, bias, self.logit_scale, self.softcap, mesh.get_group())


# Model -> (its fingerprint then, what was found of it)
_findings: WeakKeyDictionary[nn.Module, tuple[tuple, dict[Any, Any]]] = WeakKeyDictionary()


def calibrate(model: nn.Module, inputs: Mapping[str, Any] | None = None, *, encoder_decoder: bool = False) -> Transform:
    """The transform between the lm_head and the logits, cached per model until its config changes.

    Three forward passes of eight tokens, without gradients, in eval mode, with the random state untouched. Known values
    leave the head in place of its output; {scale, softcap, slice, vocabulary bias, masked ids} is solved for from what
    the model returns, and verified on a second draw; the third pass shows that the model runs on a (B, T, 1)
    placeholder. Under distributed training every rank must call it.

    Args:
        model: an HF causal LM, plain or wrapped.
        inputs: keyword arguments that the model runs on, taken (their first row, where rows can be told) in place of
            the eight tokens by a model that wants more than these: pictures, boxes.
        encoder_decoder: whether the caller can handle one, whose labels are not shifted.

    Raises:
        TrialFailedError: a ValueError; the model runs neither on tokens alone nor on ``inputs``.
        ValueError: what follows the head is not in this family (several streams, other positions ...).
    """
    inner = inner_model(model)
    if is_encoder_decoder(inner) and not encoder_decoder:
        raise ValueError(
            f"model must be a decoder alone here, got the encoder-decoder {type(inner).__name__}; use fused_lm_head, "
            "token_logprobs or sequence_logprobs, which support it"
        )
    found = _found(inner)
    if "transform" not in found:
        found["transform"] = _try(inner, inputs, lambda given: _calibrate_transform(Probe(model, inner, given)))
    return found["transform"]


def adopt_transform(model: nn.Module, transform: Transform) -> None:
    """Take over what another rank's ``calibrate`` found of the same model, in place of a calibration here."""
    _found(inner_model(model))["transform"] = transform


def calibrate_loss(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, encoder_decoder: bool = False
) -> LossRule:
    """Find whether the model's own loss shifts its labels and can be replaced by its loss_function; cached likewise.

    Raises:
        ValueError: the model's loss is neither the shifted nor the plain mean cross-entropy of its logits, plus what
            does not depend on them (an MoE auxiliary loss): smoothed labels, a z-loss, other label shapes.
    """
    inner = inner_model(model)
    transform = calibrate(model, inputs, encoder_decoder=encoder_decoder)
    found = _found(inner)
    if "loss" not in found:
        options: Any = {"vocab": transform.vocab, "masked_ids": transform.masked, "wide": transform.wide}
        found["loss"] = _try(inner, inputs, lambda given: fit_loss_rule(Probe(model, inner, given), **options))
    return found["loss"]


def is_causal(model: nn.Module, inputs: Mapping[str, Any], *, encoder_decoder: bool = False) -> bool:
    """Return whether hidden states do not depend on later tokens, for tokens alone or for inputs like these
    (token_type_ids mark a prefix to PaliGemma). The latter is tried once per model and set of names.
    """
    if calibrate(model, inputs, encoder_decoder=encoder_decoder).causal:
        return True
    names = frozenset(name for name, value in inputs.items() if value is not None)
    if names <= {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "use_cache"}:
        return False
    inner = inner_model(model)
    found, key = _found(inner), ("causal", names)
    if key not in found:
        with unseen(inner):
            probe = Probe(model, inner, inputs)
            found[key] = _unchanged_before(probe, *(probe.run(noise, seed)[2] for seed in (0, 1)))
    return found[key]


def keeps_sequences_apart(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether the hidden states of a sequence are independent of those before it in the same row, where
    ``inputs`` mark the boundaries (position_ids, cu_seq_lens_q ..., with or without an attention_mask (B, T)). Tried
    once per model and set of names; False where the model needs more than tokens.
    """
    inner = inner_model(model)
    names = frozenset(name for name, value in inputs.items() if value is not None)
    attention = getattr(inner.config.get_text_config(), "_attn_implementation", None)
    found, key = _found(inner), ("apart", attention, names)
    if key not in found:
        with unseen(inner):
            probe = Probe(model, inner)
            try:
                first, second = (probe.run_packed(noise, seed, names) for seed in (0, 1))
                found[key] = _agree(first, second, first)
            except TrialFailedError:
                found[key] = False
    return found[key]


def _found(inner: nn.Module) -> dict[Any, Any]:
    """The findings about a model, which are empty again after a change of its fingerprint."""
    key = fingerprint(inner)
    if inner not in _findings or _findings[inner][0] != key:
        _findings[inner] = (key, {})
    return _findings[inner][1]


def _try(inner: nn.Module, inputs: Mapping[str, Any] | None, compute: Callable) -> Any:
    """``compute(None)``: on a few tokens. Where the model does not run on these, with its hooks; then on ``inputs``."""
    try:
        with unseen(inner):
            return compute(None)
    except TrialFailedError:
        with unseen(inner, hooks=True):
            try:
                return compute(None)
            except TrialFailedError:
                if inputs is None:
                    raise
                return compute(inputs)


def fingerprint(inner: nn.Module) -> tuple:
    """Every number that the transform or the loss could come from, and the loss; a change of any calibrates again."""
    head = find_head(inner)
    numbers: list[Any] = [
        vocabulary_size(head),
        id(getattr(getattr(inner, "loss_function", None), "__func__", getattr(inner, "loss_function", None))),
    ]
    for module in (inner, head):
        numbers += [key for key, hook in module._forward_hooks.items() if not of_a_library(hook)]
    configs = [inner.config, *(value for value in vars(inner.config).values() if hasattr(value, "model_type"))]
    for config in configs:
        numbers += [
            (name, value)
            for name, value in vars(config).items()
            if name not in _BOOKKEEPING
            and not (name.startswith("output_") and isinstance(value, bool))  # attentions, router logits ...
            and not name.endswith("_token_id")  # Trainer sets them to the tokenizer's
            and (isinstance(value, (int, float)) or value is None)
        ]
    for module in (inner, getattr(inner, inner.base_model_prefix, inner)):
        numbers += [(name, value) for name, value in vars(module).items() if isinstance(value, float)]
    return tuple(numbers)


# ---- the transform ---------------------------------------------------------------------------------------------------


def _calibrate_transform(probe: Probe) -> Transform:
    names = probe.vocabulary_vectors()
    generator = torch.Generator().manual_seed(2)
    draw: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    marks = {n: torch.randn(probe.vocab, **draw).mul(3) for n in names}
    with probe.replaced(marks):
        x1, y1, _ = probe.run(_ladder, seed=0)
    vocab = y1.shape[-1]
    added1 = y1.reshape(-1, vocab)[-1]  # what comes out where the head puts out 0
    masked = (y1 < MASKED).flatten(0, -2).all(0)
    scale, softcap = _solve(probe, x1, y1 - added1, masked)
    bias, ratio = _source(probe, marks, added1, masked, softcap)
    with probe.scalars_after_head() as scalars:
        x2, y2, hidden2 = probe.run(noise, seed=1)
    added2 = torch.zeros_like(added1)
    if bias is not None:
        added2 = ratio * vector(probe.inner, bias)[:vocab].to(added1)
    for x, y, added in ((x1, y1, added1), (x2, y2, added2)):
        expected = _apply(x[..., :vocab], scale, softcap) + added
        worst = (y - expected)[..., ~masked].abs().amax().item()
        if not worst <= 1e-4 * (1.0 + expected[..., ~masked].abs().amax().item()):
            probe.refuse(
                f"its logits differ by up to {worst:.3g} from every scale and softcap of the head's output (an "
                "operation that is not understood follows the head)"
            )
    if scalars:
        probe.refuse(
            f"a parameter or buffer of one element follows its head: {', '.join(sorted(scalars))}. It may change, and "
            "its gradient would be lost"
        )
    wide, hidden3 = probe.run_placeholder()
    if is_encoder_decoder(probe.inner):
        _check_decoder_inputs(probe)
    return Transform(
        probe.known_number(scale),
        None if softcap is None else probe.known_number(softcap),
        vocab,
        _unchanged_before(probe, hidden2, hidden3),  # the first run's marks may have changed a norm of V elements
        bias,
        ratio,
        tuple(masked.nonzero().flatten().tolist()),
        wide,
    )


def _ladder(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """First row: 2^-6, 2^-5 ... 2^17 over the vocabulary, then again; last row 0; the other rows moderate noise."""
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    rows = x.view(-1, shape[-1])
    rows[-1] = 0
    rows[0] = 2.0 ** (torch.arange(shape[-1], device="cpu") % 24 - 6).double()
    return x


def _apply(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    return scale * x if softcap is None else softcap * torch.tanh(scale * x / softcap)


def _solve(probe: Probe, x: Tensor, y: Tensor, masked: Tensor) -> tuple[float, float | None]:
    """Scale and softcap K from f(a) and f(2a), f(x) = K tanh(s x / K): tanh(2u) = 2 tanh(u) / (1 + tanh(u)^2) gives
    K^2 = f(a)^2 / (2 f(a)/f(2a) - 1), best conditioned where the bend 2 f(a)/f(2a) - 1 = tanh(u)^2 is about 0.3.
    """
    vocab = y.shape[-1]
    rungs = min(vocab, 24)
    starts = [s for s in range(0, vocab - rungs + 1, rungs) if not masked[s : s + rungs].any()]
    if not starts or x.numel() == x.shape[-1]:
        probe.refuse("it masks ids all over its vocabulary, or runs on one position alone")
    here = slice(starts[0], starts[0] + rungs)
    x_v, y_v = x.reshape(-1, x.shape[-1])[0, here], y.reshape(-1, vocab)[0, here]
    if not bool(torch.isfinite(y_v).all()) or bool((y_v == 0).any()) or bool((y_v * y_v[0] < 0).any()):
        probe.refuse("its logits are not a scale or softcap of the head's output")
    bend = 2 * y_v[:-1] / y_v[1:] - 1
    at = int((bend - 0.3).abs().argmin())
    if bend[at] < 0.02:
        return (y_v[-1] / x_v[-1]).item(), None
    softcap = (y_v[at].square() / bend[at]).sqrt().item()
    ratio = y_v[at].item() / softcap
    if not abs(ratio) < 1:
        probe.refuse("its logits are not a scale or softcap of the head's output")
    return softcap * math.atanh(ratio) / x_v[at].item(), softcap


def _source(
    probe: Probe, marks: Mapping[str, Tensor], added: Tensor, masked: Tensor, softcap: float | None
) -> tuple[str | None, float]:
    """(name, ratio) with ``added`` = ratio * the marked vector of that name; (None, 1) where nothing is added."""
    added = added[~masked]
    if not added.any():
        if masked.any() and softcap is not None:
            probe.refuse("it masks ids after a softcap")
        return None, 1.0
    for name, mark in marks.items():
        mark = mark.to(added)[: len(masked)][~masked]
        ratio = ((added @ mark) / (mark @ mark)).item()
        if softcap is None and (added - ratio * mark).abs().amax() <= 1e-4 * added.abs().amax():
            return name, probe.known_number(ratio)
    return probe.refuse(
        "its logits are not a scale or softcap of the head's output: something is added that is no vocabulary bias of "
        "its own (or one that follows a softcap)"
    )


def _unchanged_before(probe: Probe, hidden1: Tensor, hidden2: Tensor) -> bool:
    """Return whether two runs that differ in their last token agree on all positions before it."""
    last = probe.last_token()
    return _agree(hidden1[..., :last, :], hidden2[..., :last, :], hidden1)


def _agree(one: Tensor, other: Tensor, like: Tensor) -> bool:
    """Return whether two runs gave the same hidden states, up to the rounding of values as large as ``like``."""
    worst = (one - other).abs().amax().item() if one.numel() else 0.0
    # An expert's GEMM over all its tokens rounds each differently as they change: 1e-6 seen in fp32.
    return worst <= max(2e-5, 4 * torch.finfo(like.dtype).eps) * like.abs().amax().item()


def _check_decoder_inputs(probe: Probe) -> None:
    labels = torch.tensor([probe.plain[-1 - i % len(probe.plain)] for i in range(5)], device=probe.ids.device)
    labels = labels.expand(len(probe.ids), -1).contiguous()
    labels[:, -2:] = IGNORE_INDEX
    try:
        own = probe.run_decoder(noise, labels, prepared=False)
    except TrialFailedError:
        return  # it makes none: decoder_input_ids must be given
    ours = probe.run_decoder(noise, labels, prepared=True)
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-4, atol=1e-5 * own.abs().amax().item()):
        probe.refuse("it makes its decoder_input_ids from labels in a way that is not understood")
