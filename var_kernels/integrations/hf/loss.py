"""The model's own language-modelling loss, computed without logits."""

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.calibration import MASKED, HeadParams, calibrate, calibrate_loss, fingerprint
from var_kernels.integrations.hf.capture import head_results, tied
from var_kernels.integrations.hf.forwards import of_a_library, placeholder, swapped
from var_kernels.integrations.hf.logits_functions import Source, no_logits, open_logits
from var_kernels.integrations.hf.model import (
    decoder_inputs,
    find_head,
    inner_model,
    is_encoder_decoder,
    logits_of,
    row_labels,
    vocabulary_size,
)
from var_kernels.integrations.hf.probe import TrialFailedError, noise
from var_kernels.ops import linear_weighted_nll, vocab_parallel_logprob


class fused_lm_head:  # noqa: N801  (used like a function: with fused_lm_head(model): ...)
    """While it is applied, a forward pass with labels computes the model's own loss inside its lm_head, without logits.

        with fused_lm_head(model):
            out = model(**batch, labels=labels)
        out.loss.backward()

    out.loss = sum of -logp over the labels that are not -100, divided by their number, or by ``num_items_in_batch``
    where the model takes it, with the model's own label shift (none in an encoder-decoder), logit scale, softcap and
    vocabulary bias, without the labels that attention_mask hides where its loss leaves these out, plus its MoE
    auxiliary loss.
    With no label left it is a differentiable 0, also where num_items_in_batch is 0 (transformers gives NaN, with the
    same gradients of 0). out.logits has the shape of logits and no values: any use says where to find them. Forward
    passes without labels, ``generate`` among them, run as ever. Peak memory is that of ``linear_weighted_nll``.

    A loss that is not transformers' own code (``model.loss_function = ...``, a loss in a forward of your own) runs as
    it stands in every call, on logits whose values are computed where it reads them (``fused_logits``).

    ``fused_lm_head(model).apply()`` and ``.restore()`` do the same without a block. The model is called as the caller
    calls it (DDP, FSDP, PEFT ... around it); only the innermost model is patched. A copy of it, by ``copy.deepcopy``
    or pickle, is plain.

    Args:
        model: an HF causal LM, plain or wrapped.
        precision, workspace_mb: as in ``linear_weighted_nll``.

    Raises:
        ValueError: on applying, where the model's head is not understood; nothing is patched then. A model that needs
            more than tokens (a picture) is looked at when its first batch with labels comes. In a forward pass, where
            a loss of your own reads logits in a way that needs them all.
        RuntimeError: the model's head is fused already.
    """

    def __init__(self, model: nn.Module, *, precision: str = "fp32", workspace_mb: float | None = None) -> None:
        self.model = model
        self.inner = inner_model(model)
        self._options: dict[str, Any] = {"precision": precision, "workspace_mb": workspace_mb}
        self._applied = self._used = False
        self.loss_without_labels = 0.0  # Trainer's mean over evaluation batches leaves out NaN

    def __del__(self):
        if not vars(self).get("_used", True):
            warnings.warn(
                "fused_lm_head(model) was neither entered nor applied, so the model is a plain one: write "
                "`with fused_lm_head(model):`, or fused_lm_head(model).apply()",
                stacklevel=2,
            )

    def __enter__(self) -> "fused_lm_head":
        return self.apply()

    def __exit__(self, *exc_info) -> None:
        self.restore()

    def apply(self) -> "fused_lm_head":
        self._used = True
        if getattr(getattr(self.inner, "_var_kernels_fused", None), "_applied", False):
            raise RuntimeError(
                f"{type(self.inner).__name__}: fused_lm_head is applied already; leave that block or call restore()"
            )
        try:
            self._calibrate(None)
        except TrialFailedError:
            self._calibrated_at: Any = None  # it wants more than tokens: the first batch with labels will show
        self._plain_forward = self.inner.forward
        self._instance_forward = self.inner.__dict__.get("forward")
        self._signature = inspect.signature(self._plain_forward)
        self._patched_forward = _PatchedForward(self)
        self.inner._var_kernels_fused = self
        self.inner.forward = self._patched_forward
        self._applied = True
        return self

    def _calibrate(self, inputs: Mapping[str, Any] | None) -> None:
        model = self.inner if inputs else self.model
        self._transform = calibrate(model, inputs, encoder_decoder=True)
        self._rule = None
        if _all_of_libraries(self.inner):
            try:
                self._rule = calibrate_loss(model, inputs, encoder_decoder=True)
            except TrialFailedError:
                raise
            except ValueError:
                pass  # no plain mean: it runs as it stands
        self._calibrated_at = fingerprint(self.inner)

    def restore(self) -> None:
        self._used = True
        if not self._applied:
            return
        self._applied = False
        del self.inner._var_kernels_fused
        if self.inner.__dict__.get("forward") is not self._patched_forward:
            return  # someone wrapped forward since; ours stays below theirs and now only passes on
        if self._instance_forward is None:
            del self.inner.forward
        else:
            self.inner.forward = self._instance_forward

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_applied": False}  # nobody would restore a copy of the model, so it is a plain one

    def _forward(self, *args, **kwargs):
        if not self._applied:
            return self._plain_forward(*args, **kwargs)
        call = self._signature.bind_partial(*args, **kwargs)
        named = self._named(call)
        labels, shift_labels = named.get("labels"), named.get("shift_labels")
        if labels is None:
            return self._plain_forward(*args, **kwargs)
        if self._calibrated_at != fingerprint(self.inner):
            self._calibrate_on(named)
        if self._rule is None:
            return self._own_loss(*args, **kwargs)
        scored = _shown(labels, named.get("attention_mask")) if self._rule.masked else labels
        head = find_head(self.inner)
        rows: list[Tensor] = []  # the label of every row of hidden, once the head has run
        num_items = named.get("num_items_in_batch")

        def nll_mean(hidden: Tensor) -> Tensor:
            if shift_labels is not None:
                rows.append(shift_labels.to(hidden.device).reshape(hidden.shape[:-1]))
            else:
                rows.append(row_labels(scored, hidden, shift=self._rule.shift))
            params = self._transform.params(head, self.inner)
            if params.group is not None:
                return _sharded_nll_mean(hidden, params, rows[0], num_items, self._options)
            return linear_weighted_nll(
                hidden,
                params.lm_head_weight,
                rows[0],
                None,
                params.bias,
                # Divided inside the op: gradients of the sum may overflow fp16, and scaling them later copies dW.
                reduction="mean",
                num_items=_divisor(num_items, rows[0]),
                **params.logit_options,
                **self._options,
            )

        options = {"wide": self._transform.wide, "sharded": True, "low_rank": True}
        with head_results(self.inner, head, nll_mean, **options) as results:
            if not self._rule.replaceable:
                if shift_labels is not None:
                    raise ValueError(
                        f"shift_labels must be None, since {type(self.inner).__name__}'s own loss does not read them, "
                        "got a tensor; pass labels"
                    )
                given = [named.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds")]
                if is_encoder_decoder(self.inner) and all(value is None for value in given):
                    named.update(decoder_inputs(self.inner, labels))
                output = self._again(call, {**named, "labels": None})
                counted = num_items if self._rule.counted else None
                loss = self._loss(rows, results, num_items, None, logits_of(output), labels, None, counted)
                return _without_logits(output, self._transform.vocab, loss)
            losses = []

            def loss_function(logits, labels=None, *args, **kwargs):
                if not _same_labels(scored, labels):
                    raise ValueError(
                        f"{type(self.inner).__name__} must pass its labels to its own loss unchanged, got others; put "
                        "-100 in labels where none is to count"
                    )
                losses.append(self._loss(rows, results, num_items, shift_labels, logits, labels, *args, **kwargs))
                return losses[0]

            with swapped(self.inner, "_loss_function", loss_function):
                output = self._plain_forward(*args, **kwargs)
        if not losses:
            raise ValueError(
                f"{type(self.inner).__name__} must compute a loss of labels, and did not; see what its forward does "
                "with them, or use token_logprobs"
            )
        return _without_logits(output, self._transform.vocab)

    def _own_loss(self, *args, **kwargs) -> Any:
        """The model's forward as it stands, its loss read from logits that are computed where it reads them."""
        inner, head, name = self.inner, find_head(self.inner), type(self.inner).__name__
        sources: list[Source] = []

        def logits(hidden: Tensor) -> Tensor:
            params = self._transform.params(head, inner)
            source = Source(name, hidden, params, self._differs, self._options)
            sources.append(source)
            kind = hidden.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            learns = hidden if hidden.requires_grad else params.lm_head_weight
            nothing = placeholder(hidden, learns, value=math.nan)  # for code that torch does not show us
            return open_logits(nothing, source, vocabulary_size(head), dtype)

        options = {"sharded": True, "low_rank": True, "as_logits": True}
        try:
            with head_results(inner, head, logits, **options):
                return self._plain_forward(*args, **kwargs)
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            raise ValueError(
                f"{name}: its own loss must be Python code where it reads logits, got TorchScript, which cannot read "
                "logits that are not computed; leave torch.jit.script out, or leave fused_lm_head out for this model"
            ) from error
        finally:
            for source in sources:
                source.close()

    @_disable_dynamo
    def _differs(self, steps: tuple, device: torch.device) -> str | None:
        """Describe how these elementwise steps after the head differ from the model's own; None if they do not."""
        head = find_head(self.inner)
        x = noise((4, vocabulary_size(head)), torch.Generator().manual_seed(0))
        x = x.to(device, torch.float32 if device.type == "mps" else torch.float64)
        expected, made = self._transform.logits(x, self.inner), x
        for step in steps:
            made = step(made)
        if made.shape != expected.shape:
            return f"{made.shape[-1]} ids in place of {expected.shape[-1]}"
        masked = (made < MASKED).all(0)
        if masked.nonzero().flatten().tolist() != list(self._transform.masked):
            return "other ids are masked"
        worst = (made - expected)[:, ~masked].abs().amax().item()
        if worst <= 1e-4 * (1.0 + expected[:, ~masked].abs().amax().item()):
            return None
        return f"they differ by up to {worst:.3g}, by a scale or an offset of its own"

    def _named(self, call: inspect.BoundArguments) -> dict[str, Any]:
        """The arguments of the call that have names, those among the model's ``**kwargs`` too."""
        named = dict(call.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named.update(named.pop(name, {}))
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                named.pop(name, None)
        return named

    def _again(self, call: inspect.BoundArguments, named: dict[str, Any]) -> Any:
        """The plain forward on these named arguments, and those of the call that its ``*args`` take."""
        parameters = self._signature.parameters
        stars = [
            n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_POSITIONAL and call.arguments.get(n)
        ]
        if not stars:
            return self._plain_forward(**named)
        before = [named.pop(name) for name in itertools.takewhile(lambda name: name not in stars, parameters)]
        return self._plain_forward(*before, *call.arguments[stars[0]], **named)

    @_disable_dynamo
    def _calibrate_on(self, inputs: Mapping[str, Any]) -> None:
        """Calibrate within a call, on its inputs if need be, through the plain forward, below wrappers around ours.

        An autocast object of accelerate's that is entered twice stays on for good.
        """
        with swapped(self.inner, "forward", self._plain_forward):
            self._calibrate(inputs)

    def _loss(
        self,
        rows,
        results,
        num_items,
        callers_shift,
        logits,
        labels,
        vocab_size=None,
        num_items_in_batch=None,
        ignore_index=IGNORE_INDEX,
        shift_labels=None,
        **_kwargs,
    ) -> Tensor:
        """Stand in for the model's loss_function(logits, labels, vocab_size): return the loss that is known already."""
        name = type(self.inner).__name__
        if ignore_index != IGNORE_INDEX:
            raise ValueError(f"ignore_index must be {IGNORE_INDEX}, got {ignore_index}; put {IGNORE_INDEX} in labels")
        # A model that does not shift may say so by shift_labels=labels; calibrate_loss has seen that it does not.
        own_shift = shift_labels is not callers_shift
        if own_shift and isinstance(shift_labels, Tensor):
            own_shift = self._rule.shift or shift_labels.shape != rows[0].shape
        moved = own_shift or (labels is not None and labels.shape != rows[0].shape)
        if moved or not results:
            raise ValueError(
                f"{name} must score the positions that its lm_head computed, got others; use the model's own loss"
            )
        (loss,) = tied(results, logits)
        if self.loss_without_labels != 0.0:
            loss = loss.masked_fill((rows[0] == IGNORE_INDEX).all(), self.loss_without_labels)
        if (num_items is None) == (num_items_in_batch is None):
            return loss
        # The model does not pass on the count that it was given, or makes its own.
        count = (rows[0] != IGNORE_INDEX).sum().clamp(min=1)
        given, wanted = (_divisor(n, rows[0]) for n in (num_items, num_items_in_batch))
        return loss * given / count if wanted is None else loss * count / wanted


def _shown(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The labels without those that the attention mask hides, of a model whose own loss leaves these out."""
    if mask is None:
        return labels
    if mask.shape != labels.shape:
        raise ValueError(
            f"attention_mask must have the shape of labels {tuple(labels.shape)}, got {tuple(mask.shape)}; the model's "
            "own loss leaves out the labels that it hides"
        )
    return labels.masked_fill(mask.to(labels.device) == 0, IGNORE_INDEX)


def _same_labels(ours: Tensor, theirs: Tensor | None) -> bool:
    """Return whether the labels that reach the model's loss equal those of the call; new tensors are compared."""
    if theirs is None or theirs is ours:
        return True
    return ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.device))


def _sharded_nll_mean(
    hidden: Tensor, head: HeadParams, labels: Tensor, num_items: Tensor | int | None, options: Mapping[str, Any]
) -> Tensor:
    """The mean of a head whose vocabulary is sharded over ranks."""
    logp: Any = vocab_parallel_logprob(
        hidden, head.lm_head_weight, labels, head.bias, process_group=head.group, **head.logit_options, **options
    )
    count = (labels != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else _divisor(num_items, labels)
    return -logp.sum() / count


def _divisor(num_items: Tensor | float | None, labels: Tensor) -> Tensor | float | None:
    """``num_items``, or 1 where it is 0 and no label of this rank is left: the loss is 0 then, and not 0 / 0."""
    if isinstance(num_items, Tensor):
        empty = (num_items == 0) & (labels == IGNORE_INDEX).all().to(num_items.device)
        return num_items.masked_fill(empty, 1)  # on the device: no value is read back
    if num_items == 0 and not bool((labels != IGNORE_INDEX).any()):
        return 1
    return num_items


def _all_of_libraries(inner: nn.Module) -> bool:
    """Return whether forward and loss are a library's code, none of the user's own: a trial covers all of it."""
    models = [module for module in inner.modules() if callable(getattr(module, "get_output_embeddings", None))]
    return all(of_a_library(m.forward) and of_a_library(getattr(m, "loss_function", None)) for m in models)


class _PatchedForward:
    """Stands for the forward of the inner model. No function: deepcopy passes those on as they are, and the forward of
    a copied model would run the weights of the first."""

    def __init__(self, fused: fused_lm_head):
        functools.update_wrapper(self, fused._plain_forward)  # Trainer and PEFT read its signature
        self.fused = fused

    def __call__(self, *args, **kwargs):
        if args and args[0] is self.fused.inner:
            args = args[1:]  # accelerate, on taking autocast off a model, binds whatever forward it finds
        return self.fused._forward(*args, **kwargs)


@_disable_dynamo
def _without_logits(output: Any, vocab: int, loss: Tensor | None = None) -> Any:
    """The output with logits that explain themselves in place of the placeholder, and ``loss`` where one is given."""
    logits = logits_of(output)
    if logits is not None:
        logits = no_logits((*logits.shape[:-1], vocab), logits.dtype, logits.device)
    if isinstance(output, Mapping):
        changed = {"logits": logits} if loss is None else {"logits": logits, "loss": loss}
        return type(output)(**{**output, **changed})
    if loss is not None:
        output = (loss, *output)
    at = next(i for i, item in enumerate(output) if isinstance(item, Tensor) and item.dim() > 0)
    return (*output[:at], logits, *output[at + 1 :])
