"""An lm_head whose frozen weight is packed: bitsandbytes' 4 bit, torchao's and other tensors with ``dequantize()``.

It is dequantised whole, inside the head's forward, for the time of the loss: V x D in the model's dtype. Layers that
also round their input (8-bit activations) compute something else than W h and are refused: each head is compared once
with its dequantised weight. So is a head in floating point whose forward someone replaced.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from var_kernels.integrations.hf.model_inputs import home_of, of_a_library
from var_kernels.integrations.hf.parallel import is_dtensor

_PROBES = 4
# Module -> (its weight and forward then, how far it is from W h)
_errors: WeakKeyDictionary = WeakKeyDictionary()


def is_packed(weight: Tensor) -> bool:
    return not weight.is_floating_point() or (is_traceable_wrapper_subclass(weight) and not is_dtensor(weight))


def dense_weight(head: nn.Module) -> Tensor | None:
    """(V, D) floating point, the head's own weight where it is that already; None where it cannot be made."""
    weight: Any = head.weight
    if not is_packed(weight):
        return weight
    if getattr(weight, "quant_state", None) is not None:
        dense = _dequantised_4bit(weight.data, weight.quant_state)
    elif is_traceable_wrapper_subclass(weight) and callable(unpack := getattr(type(weight), "dequantize", None)):
        dense = unpack(weight)
    else:
        return None
    return dense.detach() if dense.shape == (head.out_features, head.in_features) else None


def _dequantised_4bit(codes: Tensor, state) -> Tensor:
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):  # by a forward pass in eval mode without gradients
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    return functional.dequantize_4bit(codes, state)


def own_forward(head: nn.Module) -> Callable | None:
    """The function that replaces nn.Linear's forward, in the class or on the instance; None where none does, or where
    a library put its own around it (tensor parallelism, offloading), which the head's trial shows.
    """
    hooked = hasattr(head, "_hf_hook") and hasattr(head, "_old_forward")  # accelerate's, which calls the old one
    forward = head._old_forward if hooked else vars(head).get("forward")
    if forward is None or (of_a_library(forward) and home_of(forward) != "torch"):
        forward = type(head).forward
    if getattr(forward, "__self__", head) is head:
        forward = getattr(forward, "__func__", forward)
    return None if forward is nn.Linear.forward else forward


@torch.no_grad()
def computes_a_product(head: nn.Module) -> bool:
    """Return whether the head's output is W h + b with the dequantised W, to the rounding of its dtype; tried once for
    each weight and forward, in train and eval mode."""
    key, seen = (id(head.weight), own_forward(head)), _errors.get(head)
    if seen is None or seen[0] != key:
        dense = dense_weight(head)
        computable = dense is not None and dense.device.type != "meta" and not is_dtensor(dense)
        _errors[head] = (key, _distance(head, dense) if computable else float("inf"))
    return _errors[head][1] <= 1.0


def _distance(head: nn.Module, dense: Tensor) -> float:
    """rms of the difference over what rounding of the operands to their dtype explains."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_PROBES, dense.shape[1], generator=generator, device="cpu").to(dense.device, dense.dtype)
    bias = 0.0 if head.bias is None else head.bias.double()
    forward = getattr(head, "_old_forward", head.forward)
    training, distances = head.training, []
    # A head that normalises or bends is a product at one size of its input at most.
    scales = (1.0,) if is_packed(head.weight) else (1.0, 1e-2, 1e2)
    kind = dense.device.type
    with torch.random.fork_rng([dense.device] if kind == "cuda" else []), torch.autocast(kind, enabled=False):
        for mode in (False, True):
            head.training = mode
            for scale in scales:
                # bitsandbytes packs its weight anew where nobody wants gradients
                given = (scale * hidden).requires_grad_()
                truth = given.double() @ dense.double().t() + bias
                try:
                    error = forward(given).double() - truth
                except Exception:
                    error = torch.full_like(truth, float("inf"))
                allowed = max(1e-4, 0.5 * torch.finfo(dense.dtype).eps)
                distances.append((error.square().mean().sqrt() / truth.square().mean().sqrt() / allowed).item())
    head.training = training
    return max(distances)
