"""Refusals of the public ops: metadata always, values only where reading them costs no device synchronisation (CPU
tensors).
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from var_kernels.ops.signatures import DEFAULTS, PRECISIONS, LogprobKeywords

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> None:
    """Types, shapes, dtypes, devices."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    if active is not None and active():  # it would refuse the autograd.Functions in words about their insides
        raise TypeError(
            "hidden must be no tensor of a torch.func transform (grad, vmap, jvp, vjp), got a call inside of one; call "
            "the op on the whole batch and use torch.autograd.grad"
        )
    check_model(hidden, lm_head_weight, bias, labels)
    leading = hidden.shape[:-1]
    if labels.shape != leading and not (labels.dim() == hidden.dim() and labels.shape[:-1] == leading):
        raise ValueError(
            f"labels must have shape {tuple(leading)} or {(*leading, 'K')}, the leading shape of hidden, "
            f"got {tuple(labels.shape)}; shift before the call, nothing is shifted here"
        )
    if labels.dim() == hidden.dim() and labels.shape[-1] == 0:
        raise ValueError(f"labels must hold at least one target id per row, got shape {tuple(labels.shape)}")
    if type(ignore_index) is not int:
        check_number("ignore_index", ignore_index)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32 token ids, got {labels.dtype}; call labels.long()")


def check_model(hidden, lm_head_weight, bias, labels=None, prefix: str = "") -> None:
    """Types, shapes, dtypes and devices of a model's tensors. prefix: "ref_" for the reference model's, which share the
    policy's labels.
    """
    given = {"hidden": hidden, "lm_head_weight": lm_head_weight, "labels": labels, "bias": bias}
    optional = ("bias", "labels") if prefix else ("bias",)
    given = {f"{prefix}{name}": t for name, t in given.items() if t is not None or name not in optional}
    for name, value in given.items():
        if type(value) is not Tensor:
            check_are_tensors(**{name: value})
            check_whole(name, value)
    if hidden.dtype not in DTYPES:
        supported, own = ", ".join(map(str, DTYPES)), hidden.is_floating_point()
        remedy = "dequantise it" if own else "pass the hidden states before the lm_head"
        raise TypeError(f"{prefix}hidden must be floating point, of {supported}, got {hidden.dtype}; {remedy}")
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[0] == 0:
        shape = tuple(lm_head_weight.shape)
        raise ValueError(f"{prefix}lm_head_weight must have shape (V, D) with V of at least 1, got {shape}")
    v, d = lm_head_weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != d:
        hint = "; pass its transpose" if hidden.dim() and hidden.shape[-1] == v else ""
        raise ValueError(
            f"{prefix}hidden must have shape (..., {d}) to match {prefix}lm_head_weight {(v, d)}, got "
            f"{tuple(hidden.shape)}{hint}"
        )
    if bias is not None and bias.shape != (v,):
        raise ValueError(
            f"{prefix}bias must have shape ({v},), one entry per row of {prefix}lm_head_weight, got {tuple(bias.shape)}"
        )
    for name, value in given.items():
        if value.device != hidden.device:
            raise misplaced(name, value, f"{prefix}hidden", hidden)


def misplaced(name: str, value: Tensor, like: str, other: Tensor) -> ValueError:
    return ValueError(f"{name} must be on {other.device} like {like}, got {value.device}; move it there")


def check_are_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_values(labels: Tensor, token_weight: Tensor | None, ignore_index: int, v: int) -> None:
    """Labels of a vocabulary of v; weights that are finite where the label counts."""
    # Read on the host: called where the values are at hand, on a CPU.
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= v))
    if wrong.any():
        raise ValueError(
            f"labels must be in [0, {v}) or ignore_index={ignore_index}, got {labels[wrong][0].item()} "
            f"({int(wrong.sum())} such entries); a tokenizer larger than the head, or another ignore index?"
        )
    if token_weight is not None and not bool((token_weight.isfinite() | (labels == ignore_index)).all()):
        raise ValueError("token_weight must be finite, got NaN or inf; check the rewards it was made from")


def check_number(name: str, value) -> None:
    if not torch.compiler.is_compiling() and not isinstance(value, (float, int, numbers.Real)):
        got, hint = type(value).__name__, ""
        if isinstance(value, Tensor):
            hint = "; it is a constant here, a scale that learns is a factor of hidden"
            if value.dim():
                got = f"{got} of shape {tuple(value.shape)}"
                hint = "; one a call: call once for the rows of each value, with the labels of the others ignored"
        raise TypeError(f"{name} must be a number, got {got}{hint}")


def is_traced(t: Tensor) -> bool:
    """Return whether there are shapes without values: under torch.compile and torch.export, on the meta device, in a
    FakeTensorMode.
    """
    return torch.compiler.is_compiling() or t.device.type == "meta" or isinstance(t, FakeTensor)


def values_readable(t: Tensor) -> bool:
    """Return whether reading values is free: on a CPU, where there are any."""
    return t.device.type == "cpu" and not is_traced(t)


def check_whole(name: str, value: Any) -> None:
    """No DTensor: its operations are collectives, and tiles are none."""
    if not torch.compiler.is_compiling() and hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {tuple(map(str, value.placements))}; inside "
            "an FSDP module's forward it is one (fused_lm_head calls there); else pass its full_tensor(), or each "
            "rank's to_local() to vocab_parallel_logprob"
        )


def check_low_rank(low_rank, hidden: Tensor, lm_head_weight: Tensor, workspace_mb, prefix: str = "") -> None:
    """Two factors that belong to hidden's rows and the head's; prefix: "ref_" for the reference model's."""
    if not isinstance(low_rank, tuple | list) or len(low_rank) != 2 or not all(isinstance(t, Tensor) for t in low_rank):
        raise TypeError(
            f"{prefix}low_rank must be a pair of tensors (left (..., R), right (V, R)), got {type(low_rank).__name__}; "
            "of a LoRA adapter: (scaling * hidden @ A.T, B)"
        )
    left, right = low_rank
    leading, v = tuple(hidden.shape[:-1]), lm_head_weight.shape[0]
    if right.dim() != 2 or right.shape[0] != v or left.shape != (*leading, right.shape[1]):
        raise ValueError(
            f"{prefix}low_rank must have the shapes left {(*leading, 'R')} and right ({v}, R), got {tuple(left.shape)} "
            f"and {tuple(right.shape)}; left has a row for each row of {prefix}hidden, right one for each row of "
            f"{prefix}lm_head_weight"
        )
    for name, factor in (("left", left), ("right", right)):
        check_whole(f"{prefix}low_rank's {name}", factor)
        if factor.device != hidden.device:
            raise misplaced(f"{prefix}low_rank's {name}", factor, f"{prefix}hidden", hidden)
    if workspace_mb == 0:
        raise ValueError(
            f"workspace_mb must be positive with {prefix}low_rank, got 0; the fused forward has no second product, "
            "pass None"
        )


def check_dtypes(hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None, left, right, prefix: str = "") -> None:
    """One dtype for all operands; a bias, and the two of low_rank, may be of fp32 beside 16 bit. Called after autocast
    had its say. prefix: "ref_" for the reference model's.
    """
    allowed = (hidden.dtype, torch.float32) if hidden.dtype.itemsize == 2 else (hidden.dtype,)
    for name, value, dtypes in (("lm_head_weight", lm_head_weight, allowed[:1]), ("bias", bias, allowed)):
        if value is not None and value.dtype not in dtypes:
            raise TypeError(
                f"{prefix}{name} is {value.dtype} but {prefix}hidden is {hidden.dtype}; cast one of them, or run under "
                "torch.autocast"
            )
    if left is not None and not left.dtype == right.dtype in allowed:
        raise TypeError(
            f"{prefix}low_rank must be of one dtype, {' or '.join(map(str, allowed))} beside {prefix}hidden of "
            f"{hidden.dtype}, got {left.dtype} and {right.dtype}; cast them, or run under torch.autocast"
        )


def complete_options(op: str, options: Mapping[str, Any], keywords: Any) -> LogprobKeywords:
    """The options of a call of ``op``, which has those of ``keywords``, with the defaults of the others."""
    names = keywords.__optional_keys__
    for name in options:
        if name not in names:
            raise TypeError(
                f"{op}() got an unexpected keyword argument {name!r}; its options: {', '.join(sorted(names))}"
            )
    complete: Any = {**DEFAULTS, **options}
    check_head_options(complete)
    return complete


def check_head_options(options: Mapping[str, Any], prefix: str = "") -> None:
    """prefix: "ref_" for the reference model's."""
    logit_scale, softcap, temperature = options["logit_scale"], options["softcap"], options["temperature"]
    label_smoothing, workspace_mb = options["label_smoothing"], options["workspace_mb"]
    for name in ("logit_scale", "softcap", "temperature", "label_smoothing", "workspace_mb"):
        value = options[name]
        if type(value) not in (float, int) and not (value is None and name in ("softcap", "workspace_mb")):
            check_number(prefix + name, value)
    # Comparisons: torch.compile(dynamic=True) traces no math.isfinite of a float that may change.
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"{prefix}logit_scale must be finite and not 0, got {logit_scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{prefix}softcap must be positive and finite, got {softcap}; pass None for no softcap")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{prefix}temperature must be positive and finite, got {temperature}; greedy decoding has no log-probs"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}; 1 leaves out the label")
    if options["precision"] not in PRECISIONS:
        check_choice("precision", options["precision"], PRECISIONS)
    if workspace_mb is not None and not 0 <= workspace_mb * 2**20 < math.inf:
        raise ValueError(f"workspace_mb must be 0 or positive (MiB), got {workspace_mb}; pass None for the default")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_token_weight(token_weight: Tensor | None, labels: Tensor) -> None:
    if not isinstance(token_weight, Tensor):
        raise TypeError(
            f"token_weight must be a torch.Tensor or None (weight 1), got {type(token_weight).__name__}; "
            "the argument order is hidden, lm_head_weight, labels, token_weight, bias"
        )
    if not token_weight.is_floating_point():
        raise TypeError(f"token_weight must be floating point, got {token_weight.dtype}; call token_weight.float()")
    if token_weight.shape != labels.shape:
        raise ValueError(
            f"token_weight must have the shape of labels, {tuple(labels.shape)}, got {tuple(token_weight.shape)}; "
            "expand per-sequence weights over their tokens"
        )
    if token_weight.device != labels.device:
        raise misplaced("token_weight", token_weight, "labels", labels)


def check_num_items(num_items, active_NK: Tensor) -> None:
    """Positive; 0 items are none of which a row could be one."""
    if num_items is None:
        return
    if not isinstance(num_items, Tensor):
        check_number("num_items", num_items)
    elif num_items.numel() != 1:
        raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}; sum the counts")
    elif not values_readable(num_items):
        return
    if 0 < num_items < math.inf or (num_items == 0 and values_readable(active_NK) and not active_NK.any()):
        return
    raise ValueError(
        f"num_items must be positive and finite (0 only where no row counts), got {num_items}; count the items of the "
        "global batch"
    )


def check_num_active(num_active) -> None:
    if isinstance(num_active, bool) or not isinstance(num_active, int):
        raise TypeError(
            f"num_active must be an int or None, got {type(num_active).__name__}; count on the host, or pass None"
        )
    if num_active < 0:
        raise ValueError(f"num_active must be 0 or positive, got {num_active}; None counts the rows that carry a label")


def check_token_inputs(token_loss, token_inputs, labels: Tensor, hidden: Tensor) -> None:
    if not callable(token_loss):
        raise TypeError(f"token_loss must be a function of (logp, ...), got {type(token_loss).__name__}")
    if not isinstance(token_inputs, tuple | list):
        raise TypeError(f"token_inputs must be a tuple of tensors, got {type(token_inputs).__name__}; write (tensor,)")
    if isinstance(labels, Tensor) and isinstance(hidden, Tensor) and labels.dim() == hidden.dim():
        raise ValueError(
            f"labels must hold one target a row, shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}; use "
            "linear_logprob for several targets"
        )
    for i, value in enumerate(token_inputs):
        if not isinstance(value, Tensor) or value.shape != labels.shape or value.device != labels.device:
            got = f"{tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"token_inputs[{i}] must be a tensor in the shape of labels, {tuple(labels.shape)} on {labels.device}, "
                f"got {got}; expand per-sequence values over their tokens"
            )
