"""This library's head inside TRL's trainers: their losses and metrics, log-probs from ``linear_logprob``.

    from trl import DPOTrainer
    from var_kernels.integrations.trl import FusedHeadMixin

    class FusedDPOTrainer(FusedHeadMixin, DPOTrainer): ...

TRL 1.16's trainers ask their model for per-token numbers by ``model(..., labels=..., fused_lm_head=True)`` and give it
that answer in their constructor, through one function of theirs: the mixin puts another in its place. Losses, metrics,
reference log-probs and data stay TRL's. SFT's losses weight every token by what its forward pass knows already: there
the gradients are made in the forward pass, by 3 GEMMs, not 4 (2, not 3, where the head is frozen).
"""

import functools
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.calibration import HeadParams, calibrate
from var_kernels.integrations.hf.capture import head_results, tied
from var_kernels.integrations.hf.forwards import swapped
from var_kernels.integrations.hf.model import (
    find_head,
    inner_model,
    is_adapter,
    logits_of,
    row_labels,
    unwrapped,
    without_cache,
)
from var_kernels.integrations.hf.probe import TrialFailedError
from var_kernels.integrations.hf_trainer import TrainerBase, refuse_behind_trainer
from var_kernels.ops import linear_logprob, linear_token_loss

_SEAM = "add_fused_lm_head"  # the name under which TRL's trainers look up what patches their models
# A head of this class is refused by TRL's constructors, whose own answer reads only its base layer's weight.
_ADAPTER = "BaseTunerLayer"
_FIELDS = frozenset(("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
_SFT = "trl.trainer.sft_trainer"
# dloss/dlogp of a token, times -num_items, from its log-prob: SFT's loss types
_SFT_SLOPES = {"nll": torch.ones_like, "dft": torch.exp}
_TILE_ELEMENTS = 2**22  # logits at once where their mean needs them


class FusedHeadMixin(TrainerBase):
    """Mixin in front of a TRL trainer (SFT, DPO, KTO, GRPO, RLOO): its models score tokens inside their own lm_head.

        class FusedSFTTrainer(FusedHeadMixin, SFTTrainer): ...

    The trainer is used as before and gives TRL's own losses, gradients and metrics to rounding. The (B, T, V) logits
    are never materialised; tokens without a label cost nothing. What the model itself does around its head (scale,
    softcap, vocabulary bias, sliced vocabulary, MoE auxiliary loss) is found as in ``fused_lm_head``, not by config
    names. Forward passes that TRL does not ask log-probs of, ``generate`` among them, run as ever. LoRA on the lm_head,
    which TRL's own head refuses, is added inside the tiles; switched off or as it was, it makes TRL's reference.

    Raises:
        TypeError: the class behind the mixin has no such head, or this TRL is too old; the mixin stands behind it.
        ValueError: an option needs logits in every step (SFT's label_smoothing_factor and compute_loss_func), or the
            model's head is not understood. The models are as before then.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        refuse_behind_trainer(cls, FusedHeadMixin)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        added: list[_FusedForward] = []
        try:
            with _replaced_seam(type(self), added):
                super().__init__(*args, **kwargs)
            if not added:
                raise TypeError(
                    "FusedHeadMixin must be on a trainer of TRL that patches a head for log-probs (SFT, DPO, KTO, "
                    f"GRPO, RLOO), got {type(self).__name__}; use fused_lm_head(model) for others"
                )
            _refuse_what_needs_logits(self)
        except BaseException:
            for fused in reversed(added):
                fused.restore()
            raise
        self._one_pass = None
        if _own_compute_loss(type(self)).__module__ == _SFT and self.args.loss_type in _SFT_SLOPES:
            self._one_pass = added[0].one_pass = SimpleNamespace(slope=_SFT_SLOPES[self.args.loss_type], num_items=None)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._one_pass is not None:
            self._one_pass.num_items = num_items_in_batch  # what TRL will divide the sum by
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _own_compute_loss(trainer_class: type):
    """The compute_loss behind the mixin: TRL's, or that of a class which may make something else of the log-probs."""
    behind = trainer_class.__mro__[trainer_class.__mro__.index(FusedHeadMixin) + 1 :]
    return next(vars(cls)["compute_loss"] for cls in behind if "compute_loss" in vars(cls))


@contextmanager
def _replaced_seam(trainer_class: type, added: list) -> Iterator[None]:
    """Inside the block TRL's constructors patch models by ``_FusedForward`` and let an adapted lm_head pass."""
    known = {sys.modules[cls.__module__] for cls in trainer_class.__mro__ if cls.__module__ in sys.modules}
    modules = [module for module in known if _SEAM in vars(module)]
    if not modules:
        try:
            found = f"trl {importlib.metadata.version('trl')}"
        except importlib.metadata.PackageNotFoundError:
            found = "no trl"
        raise TypeError(
            f"{trainer_class.__name__} must be a trainer of trl>=1.16 (SFT, DPO, KTO, GRPO, RLOO) behind "
            f"FusedHeadMixin, got bases {[cls.__name__ for cls in trainer_class.__bases__]} with {found}"
        )

    def add(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
        if unknown := set(outputs) - _FIELDS:
            raise ValueError(
                f"outputs must be among {sorted(_FIELDS)}, got {sorted(unknown)}; this version of TRL is newer than "
                "what FusedHeadMixin knows: use its own head, or an older one"
            )
        fields = frozenset(outputs)
        if added:  # a reference, by the policy's kernel: equal weights then differ by 0, not by a rounding
            fields |= added[0].fields & {"entropy"}
        added.append(_FusedForward(model, temperature, cast_lm_head_to_fp32, fields))

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(swapped(module, _SEAM, add))
            if _ADAPTER in vars(module):
                stack.enter_context(swapped(module, _ADAPTER, _NoAdapter))
        yield


class _NoAdapter:
    """A class that no lm_head is an instance of; find_head refuses unsupported adapters."""


def _refuse_what_needs_logits(trainer: Any) -> None:
    name = type(trainer).__name__
    # TRL puts a text there, before transformers 5.19, where its own loss is scaled already.
    asked = ["compute_loss_func"] if callable(getattr(trainer, "compute_loss_func", None)) else []
    # The other trainers have losses of their own and never look at it.
    if getattr(trainer, "label_smoother", None) is not None and getattr(trainer.args, "loss_type", None) == "nll":
        asked.append("label_smoothing_factor")
    if asked:
        raise ValueError(
            f"{', '.join(asked)} must be unset, as {'it needs' if len(asked) == 1 else 'they need'} the full logits "
            f"in every step, which {name} does not make. Leave out what is named, or use TRL's own class without "
            "FusedHeadMixin"
        )


class _FusedForward:
    """Stands for the forward of a model. No function, for deepcopy's sake: see ``hf.loss``."""

    def __init__(self, model: nn.Module, temperature: float, cast_to_fp32: bool, fields: frozenset[str]):
        self.model, self.temperature, self.cast_to_fp32, self.fields = model, temperature, cast_to_fp32, fields
        self.one_pass: SimpleNamespace | None = None  # of a trainer whose loss is known
        head = unwrapped(inner_model(model).get_output_embeddings())
        if cast_to_fp32 and is_adapter(head):
            head.__dict__.pop("forward", None)  # TRL's cast has put one there, which drops the adapter
            raise ValueError(
                "cast_lm_head_to_fp32 must be False with an adapter on the lm_head, got True: TRL's cast head leaves "
                "the adapter out when it generates. Set it to False, or leave lm_head out of target_modules"
            )
        with suppress(TrialFailedError):  # it wants more than tokens: its first batch will show
            calibrate(model)
        self.plain = model.forward
        self.instance_forward = model.__dict__.get("forward")
        functools.update_wrapper(self, type(model).forward)  # generate and Trainer read its signature
        model.forward = self

    def restore(self) -> None:
        if self.instance_forward is None:
            del self.model.forward
        else:
            self.model.forward = self.instance_forward

    def __call__(self, *args, fused_lm_head: bool = False, **kwargs):
        if args and args[0] is self.model:
            args = args[1:]  # accelerate, on unwrapping autocast, binds whatever it finds
        if not fused_lm_head:
            return self.plain(*args, **kwargs)
        return self._score(args, kwargs)

    def _score(self, args: tuple, kwargs: dict[str, Any]):
        from trl.trainer.utils import FusedCausalLMOutput

        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        num_items = kwargs.pop("num_items_in_batch", None)
        inputs = without_cache(self.model, kwargs)
        config = self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            inputs.setdefault("output_router_logits", True)  # outer VLM configs do not know it
        transform = calibrate(self.model, None if args else inputs)
        head = find_head(self.model)
        rows: list[Tensor] = []

        def compute(hidden: Tensor):
            rows.append(shift_labels.to(hidden.device) if labels is None else row_labels(labels, hidden, shift=True))
            params = transform.params(head, self.model)
            if self.one_pass is not None and torch.is_grad_enabled():
                return self._fields_in_one_pass(hidden, params, rows[0])
            if not self.cast_to_fp32:
                return self._fields_of(hidden, params, rows[0])
            with torch.autocast(hidden.device.type, enabled=False):
                return self._fields_of(hidden.float(), params, rows[0])

        if shift_labels is not None:
            labels = None  # the model's caller has shifted, across the ranks that share a sequence
        with head_results(self.model, head, compute, wide=transform.wide, low_rank=True) as results:
            output = self.plain(*args, **inputs)
        names = ["log_probs", *sorted(self.fields - {"log_probs"})]
        fields = dict(zip(names, tied(results, logits_of(output)), strict=True))
        mask = rows[0] != IGNORE_INDEX
        if labels is not None:  # (B, T - 1): the last row predicts nothing
            mask, fields = mask[:, :-1], {name: field[:, :-1] for name, field in fields.items()}
        count = mask.sum() if num_items is None else torch.as_tensor(num_items)
        loss = -fields["log_probs"].sum() / count.clamp(min=1)  # 0 without a label, and not 0 / 0
        aux_loss = getattr(output, "aux_loss", None)
        if aux_loss is None and kwargs.get("output_router_logits"):
            raise ValueError(
                f"output_router_logits must be False for {type(self.model).__name__}, which returns no aux_loss of its "
                "own, got True; set router_aux_loss_coef=0.0"
            )
        if aux_loss is not None and inputs.get("output_router_logits"):
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    def _fields_of(self, hidden: Tensor, head: HeadParams, labels: Tensor) -> tuple[Tensor, ...]:
        """(B, T) log_probs, then the other fields that were asked for in the order of their names; 0 without label."""
        call = functools.partial(linear_logprob, hidden, head.lm_head_weight, labels, head.bias, **head.logit_options)
        wanted = {"return_entropy": "entropy" in self.fields, "return_argmax": "is_top1" in self.fields}
        found = call(temperature=self.temperature, **wanted)
        logp, *rest = found if isinstance(found, tuple) else (found,)
        fields = {}
        if "entropy" in self.fields:
            fields["entropy"] = rest[0]
        if "is_top1" in self.fields:
            fields["is_top1"] = rest[-1] == labels  # -1 where there is no label
        with torch.no_grad():
            if "log_sum_sq_probs" in self.fields:
                # log sum p^2 = lse(2 z) - 2 lse(z), and half the temperature doubles z: the labels' logits cancel.
                fields["log_sum_sq_probs"] = 2 * logp - call(temperature=self.temperature / 2)
            if "mean_logits" in self.fields:
                fields["mean_logits"] = _mean_logits(hidden, head, labels) / self.temperature
        return logp, *(fields[name] for name in sorted(fields))

    def _fields_in_one_pass(self, hidden: Tensor, head: HeadParams, labels: Tensor) -> tuple[Tensor, ...]:
        """(B, T) log_probs, entropy, is_top1, of which only log_probs are differentiable, and only for SFT's loss."""
        count = (labels != IGNORE_INDEX).sum() if self.one_pass.num_items is None else self.one_pass.num_items
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        weight = 1 / torch.as_tensor(count, device=hidden.device).clamp(min=1).to(dtype)
        slope_of = self.one_pass.slope
        loss, logp, entropy, argmax = linear_token_loss(
            hidden,
            head.lm_head_weight,
            labels,
            lambda logp_n, weight_n: -weight_n * slope_of(logp_n.detach()) * logp_n,
            (weight.expand(labels.shape),),
            head.bias,
            **head.logit_options,
            return_logp=True,
            return_entropy=True,
            return_argmax=True,
        )
        return _Spread.apply(loss, logp, -weight * slope_of(logp), labels != IGNORE_INDEX), entropy, argmax == labels


class _Spread(torch.autograd.Function):
    """logp, which passes its gradient to the finished loss: where a label is, dlogp = dloss * slope, dloss a scalar."""

    @staticmethod
    def forward(ctx, loss, logp, slope, mask):
        ctx.save_for_backward(slope.where(mask, 0.0), mask)
        return logp.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp):
        slope, mask = ctx.saved_tensors
        dlogp, total = dlogp.where(mask, 0.0), slope.sum()
        dloss = torch.where(total == 0, 0.0, dlogp.sum() / total)
        expected = dloss * slope
        other = ((dlogp - expected).abs() > 1e-5 * expected.abs().amax()).any()  # NaN goes on, as in TRL
        torch._assert_async(~other, "the trainer's loss is not the one that its gradient was made for")
        return dloss, None, None, None


def _mean_logits(hidden: Tensor, head: HeadParams, labels: Tensor) -> Tensor:
    """(B, T) fp32 mean over the vocabulary of softcap(logit_scale * (W h + right left + bias)), 0 without a label."""
    weight, bias = head.lm_head_weight, head.bias
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = labels != IGNORE_INDEX
    products = [(hidden[kept], weight)]  # rows (n, D) and (V, D), then (n, R) and (V, R)
    if head.low_rank is not None:
        left, right = head.low_rank
        products.append((left[kept], right))
    if head.softcap is None:
        mean: Any = sum(rows.to(wide) @ factor.mean(0, dtype=wide) for rows, factor in products)
        means = head.logit_scale * (mean if bias is None else mean + bias.mean(dtype=wide))
    else:
        means = hidden.new_empty(len(products[0][0]), dtype=wide)
        for part in torch.arange(len(means), device=hidden.device).split(max(1, _TILE_ELEMENTS // len(weight))):
            logits: Any = sum(nn.functional.linear(rows[part], factor).to(wide) for rows, factor in products)
            logits = logits if bias is None else logits + bias
            means[part] = head.softcap * torch.tanh(logits * (head.logit_scale / head.softcap)).mean(-1)
    return means.new_zeros(labels.shape).masked_scatter(kept, means)
