"""What a model does after its lm_head, found once per model by feeding it known values in place of the head's output.

Config names are no guide: logits_scaling divides in Granite and multiplies in HyperCLOVA X, some models carry a
logit_scale that they do not use, recurrent_gemma and xLSTM name their softcap differently. What the model returns
decides.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels.integrations.hf.head import (
    HeadParams,
    Placeholder,
    find_head,
    inner_model,
    logits_of,
    swapped,
    swapped_head,
    without_cache,
)

_TOKENS = 8
_IGNORE_INDEX = -100


@dataclass(frozen=True)
class Transform:
    """logits[..., :vocab] = softcap * tanh(logit_scale * head(h) / softcap), of the head's first ``vocab`` outputs."""

    logit_scale: float
    softcap: float | None
    vocab: int
    causal: bool  # the hidden state at t does not depend on the tokens after t

    def params(self, head: nn.Linear) -> HeadParams:
        """The head's tensors as they are now: gathered, when asked for within its forward."""
        weight, bias = head.weight, head.bias
        if weight.shape[0] != self.vocab:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return HeadParams(weight, bias, self.logit_scale, self.softcap)


@dataclass(frozen=True)
class LossRule:
    """How the model's own loss reads labels, and where it can be replaced."""

    shift: bool  # logits at t are scored against labels[:, t + 1], not labels[:, t]
    replaceable: bool  # forward calls self.loss_function and adds what it returns (an auxiliary loss may come on top)


_transforms: WeakKeyDictionary = WeakKeyDictionary()
_loss_rules: WeakKeyDictionary = WeakKeyDictionary()


def calibrate(model: nn.Module) -> Transform:
    """The transform between the lm_head and the logits, cached per model until its config changes.

    Three forward passes of eight tokens, without gradients, in eval mode, with the random state untouched. Known values
    leave the head in place of its output; {scale, softcap, slice} is solved for from what the model returns, and
    verified on a second draw; the third pass shows that the model runs on a (B, T, 1) placeholder. Under distributed
    training every rank must call it.

    Raises:
        ValueError: what follows the head is not in this family (a vocabulary bias, masked ids, several streams ...).
    """
    inner = inner_model(model)
    return _cached(_transforms, inner, lambda: _calibrate_transform(_Probe(model, inner)))


def calibrate_loss(model: nn.Module) -> LossRule:
    """Whether the model's own loss shifts its labels, and can be replaced by its loss_function; cached likewise.

    Raises:
        ValueError: the model's loss is neither the shifted nor the plain mean cross-entropy of its logits, plus what
            does not depend on them (an MoE auxiliary loss): smoothed labels, a z-loss, other label shapes.
    """
    inner = inner_model(model)
    return _cached(_loss_rules, inner, lambda: _calibrate_loss(_Probe(model, inner), calibrate(model)))


def _cached(cache: WeakKeyDictionary, inner: nn.Module, compute: Callable[[], Any]) -> Any:
    key = _fingerprint(inner)
    if inner not in cache or cache[inner][0] != key:
        cache[inner] = (key, compute())
    return cache[inner][1]


def _fingerprint(inner: nn.Module) -> tuple:
    """Every number that the transform or the loss could come from; a change of any calibrates again."""
    numbers = [find_head(inner).out_features]
    configs = [inner.config, *(value for value in vars(inner.config).values() if hasattr(value, "model_type"))]
    for config in configs:
        numbers += [
            (name, value) for name, value in vars(config).items() if isinstance(value, (int, float)) or value is None
        ]
    for module in (inner, getattr(inner, inner.base_model_prefix, inner)):
        numbers += [(name, value) for name, value in vars(module).items() if isinstance(value, float)]
    return tuple(numbers)


# ---- the transform ---------------------------------------------------------------------------------------------------


def _calibrate_transform(probe: "_Probe") -> Transform:
    x1, y1, hidden1 = probe.run(_ladder, seed=0)
    scale, softcap = _solve(probe, x1, y1)
    x2, y2, hidden2 = probe.run(_noise, seed=1)
    vocab = y2.shape[-1]
    for x, y in ((x1, y1), (x2, y2)):
        expected = _apply(x[..., :vocab], scale, softcap)
        worst = (y - expected).abs().amax().item()
        if not worst <= 1e-4 * (1.0 + expected.abs().amax().item()):
            probe.refuse(
                f"its logits differ by up to {worst:.3g} from every scale and softcap of the head's output (a "
                "vocabulary bias, masked ids or another operation follows the head)"
            )
    leak = (hidden1 - hidden2)[..., :-1, :].abs().amax().item()
    causal = leak <= max(2e-6, 4 * torch.finfo(hidden1.dtype).eps) * hidden1.abs().amax().item()
    probe.run_placeholder()
    return Transform(probe.known_number(scale), None if softcap is None else probe.known_number(softcap), vocab, causal)


def _ladder(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """First row: 2^-6, 2^-5 ... 2^17 over the vocabulary, then again; the other rows moderate noise."""
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x.view(-1, shape[-1])[0] = 2.0 ** (torch.arange(shape[-1]) % 24 - 6).double()
    return x


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = x.view(-1, shape[-1])
    rows *= torch.tensor([0.1, 1.0, 8.0, 30.0], dtype=torch.float64).repeat(len(rows))[: len(rows), None]
    return x


def _apply(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    return scale * x if softcap is None else softcap * torch.tanh(scale * x / softcap)


def _solve(probe: "_Probe", x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """Scale and softcap K from f(a) and f(2a), f(x) = K tanh(s x / K): tanh(2u) = 2 tanh(u) / (1 + tanh(u)^2) gives
    K^2 = f(a)^2 / (2 f(a)/f(2a) - 1), best conditioned where the bend 2 f(a)/f(2a) - 1 = tanh(u)^2 is about 0.3.
    """
    rungs = min(y.shape[-1], 24)
    x_v, y_v = x.reshape(-1, x.shape[-1])[0, :rungs], y.reshape(-1, y.shape[-1])[0, :rungs]
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


# ---- the loss --------------------------------------------------------------------------------------------------------


def _calibrate_loss(probe: "_Probe", transform: Transform) -> LossRule:
    labels = (
        torch.arange(probe.input_ids.numel(), device=probe.input_ids.device).view_as(probe.input_ids)
        * 5
        % transform.vocab
    )
    labels[:, 2] = _IGNORE_INDEX
    own, nll = [], []
    for seed in (0, 1):
        loss, y, seen = probe.run_loss(labels, seed)
        own.append(loss)
        nll.append({shift: _mean_nll(y, seen, shift) for shift in (True, False)})
    # An auxiliary loss does not depend on the logits, so it drops out of the difference between two draws.
    change = own[0] - own[1]
    tolerance = 2e-5 * (1 + max(map(abs, own)))
    fits = [shift for shift in (True, False) if abs(nll[0][shift] - nll[1][shift] - change) <= tolerance]
    if len(fits) != 1:
        probe.refuse(
            "its own loss is not the mean cross-entropy of its logits, neither with shifted nor with unshifted labels"
        )
    extra = own[0] - nll[0][fits[0]]
    replaced = probe.run_replaced_loss(labels)
    if replaced is not None and abs(replaced - extra) <= tolerance:
        return LossRule(fits[0], replaceable=True)
    if replaced is not None or abs(extra) > tolerance:
        probe.refuse(
            "its own loss has a part besides the cross-entropy that cannot be kept when the cross-entropy is replaced"
        )
    return LossRule(fits[0], replaceable=False)


def _mean_nll(logits: Tensor, labels: Tensor, shift: bool) -> float:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=_IGNORE_INDEX).item()


# ---- running the model on injected values ----------------------------------------------------------------------------


class _Probe:
    """One model and the few tokens it is run on."""

    def __init__(self, model: nn.Module, inner: nn.Module):
        self.model, self.inner, self.head = model, inner, find_head(inner)
        self.name = type(inner).__name__
        if getattr(inner.config, "is_encoder_decoder", False):
            self.refuse("it is an encoder-decoder; only decoder-only causal language models are understood")
        embeddings = inner.get_input_embeddings()
        ids = min(getattr(embeddings, "num_embeddings", self.head.out_features), self.head.out_features)
        special = set()
        for config in (inner.config, inner.config.get_text_config()):
            for name, value in vars(config).items():
                if name.endswith(("_id", "_index")):
                    special.update(value if isinstance(value, (list, tuple)) else [value])
        plain = [token for token in range(min(ids, 4096)) if token not in special] or [0]
        self.tokens = [plain[i % len(plain)] for i in range(_TOKENS + 1)]
        self.input_ids = torch.tensor([self.tokens[:_TOKENS]], device=input_device(inner))

    def refuse(self, reason: str, cause: Exception | None = None) -> None:
        raise ValueError(
            f"{self.name} cannot be used with a fused lm_head: {reason}. Use its own loss, or log_softmax of its "
            "logits, instead"
        ) from cause

    def known_number(self, fitted: float) -> float:
        """The number (or its inverse) among the model's own that was fitted, free of the fit's rounding."""
        owners = (
            self.inner.config,
            self.inner.config.get_text_config(),
            self.inner,
            getattr(self.inner, self.inner.base_model_prefix, None),
        )
        own = [float(v) for o in owners if o is not None for v in vars(o).values() if isinstance(v, (int, float)) and v]
        candidates = [1.0, *own, *(1.0 / v for v in own)]
        nearest = min(candidates, key=lambda value: abs(value - fitted))
        return nearest if abs(nearest - fitted) <= 1e-5 * abs(fitted) else fitted

    def run(self, draw: Callable, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(injected head output, logits, hidden states); the last token changes with the seed."""
        ids = self.input_ids.clone()
        ids[0, -1] = self.tokens[-1 - seed]
        injected, hidden_states, output = self._forward(draw, seed, input_ids=ids)
        return injected, self._logits(injected, output), hidden_states

    def run_loss(self, labels: Tensor, seed: int) -> tuple[float, Tensor, Tensor]:
        """(the model's own loss, logits, the labels that reached the inner model) on injected values."""
        seen = {}
        plain_forward = self.inner.forward

        def forward(*args, **kwargs):
            seen.update(kwargs)
            return plain_forward(*args, **kwargs)

        with swapped(self.inner, "forward", forward):
            injected, _, output = self._forward(_noise, seed, input_ids=self.input_ids, labels=labels)
        loss = output.get("loss") if hasattr(output, "get") else output[0]
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            self.refuse("it returns no scalar loss when it is given labels")
        return loss.item(), self._logits(injected, output), seen.get("labels", labels)

    def run_placeholder(self) -> None:
        """The model must go on from (B, T, 1) in place of logits."""
        self._forward(None, 0, input_ids=self.input_ids)

    def run_replaced_loss(self, labels: Tensor) -> float | None:
        """What the model adds to the value of a replaced loss_function; None when it does not use loss_function."""
        calls = []

        def loss_function(*_args, **_kwargs):
            calls.append(1)
            return torch.full((), 7.0, device=self.input_ids.device)

        with swapped(self.inner, "_loss_function", loss_function):
            try:
                _, _, output = self._forward(None, 0, input_ids=self.input_ids, labels=labels)
            except ValueError:
                return None
        return output["loss"].item() - 7.0 if len(calls) == 1 else None

    def _forward(self, draw: Callable | None, seed: int, **inputs) -> tuple[Tensor | None, Tensor, Any]:
        calls = []

        def forward(hidden, *_args, **_kwargs):
            shape = hidden.shape[:-1]
            if draw is None:
                value = Placeholder.apply((*shape, 1), hidden.dtype, hidden.device)
            else:
                value = draw((*shape, self.head.out_features), torch.Generator().manual_seed(seed))
                value = value.to(hidden.device, torch.float32 if hidden.device.type == "mps" else torch.float64)
            calls.append((value, hidden))
            return value.clone()  # softcaps may work in place

        with undisturbed(self.model), swapped_head(self.head, forward):
            try:
                output = self.model(**without_cache(self.inner, inputs))
            except Exception as error:
                self.refuse(f"a trial forward pass on input_ids alone failed in {type(error).__name__}: {error}", error)
        if len(calls) != 1:
            self.refuse(f"it calls its output embedding {len(calls)} times a forward pass")
        value, hidden = calls[0]
        return value, hidden, output

    def _logits(self, injected: Tensor, output: Any) -> Tensor:
        if isinstance(output, tuple):
            output = tuple(item for item in output if not (isinstance(item, Tensor) and item.dim() == 0))
        logits = logits_of(output)
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        if shape is None or shape[:-1] != injected.shape[:-1] or shape[-1] > injected.shape[-1]:
            self.refuse(
                f"its head puts out {tuple(injected.shape)} but its logits are {shape} (several prediction streams, or "
                "logits of some positions only)"
            )
        return logits.to(torch.float64 if injected.dtype == torch.float64 else logits.dtype)


def input_device(inner: nn.Module) -> torch.device:
    """Where the model wants its input_ids."""
    embeddings = inner.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:  # offloaded weights rest on another device or on none
        return torch.device(hook.execution_device)
    parameter = next((embeddings or inner).parameters(), None)
    return inner.device if parameter is None else parameter.device


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and a random state of its own; everything as before at the end."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: it would seed GPUs that fork_rng does not restore
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(0)
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
