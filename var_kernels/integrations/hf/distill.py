"""Divergence of a student's next-token distributions from a teacher's, inside both models' lm_heads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.calibration import HeadParams
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.model import next_labels
from var_kernels.ops import linear_token_kl
from var_kernels.ops.signatures import Direction


class HeadInputs(NamedTuple):
    """Constants: the hidden states (B, T, D) that a model feeds its lm_head, and that head."""

    hidden: Tensor
    head: HeadParams


def head_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> HeadInputs:
    """A teacher's forward pass without logits and without gradients, in train or eval mode as it is.

    Where FSDP or ZeRO-3 gathers weights for their use alone, the head is a copy of its own.
    """
    found = []

    def keep(hidden: Tensor, head: HeadParams) -> Tensor:
        if _gathers_weights(model):
            whole: Any = {"lm_head_weight": head.lm_head_weight.clone()}
            whole["bias"] = None if head.bias is None else head.bias.clone()
            whole["low_rank"] = None if head.low_rank is None else (head.low_rank[0], head.low_rank[1].clone())
            head = replace(head, **whole)
        found.append(head)
        return hidden

    with torch.no_grad():
        (hidden, *_), _ = capture(model, keep, inputs, low_rank=True)
    return HeadInputs(hidden, found[0])


def _gathers_weights(model: nn.Module) -> bool:
    """Return whether FSDP1, FSDP2 or ZeRO-3 shards the weights over ranks, which are whole only while they are used."""
    fsdp = any(hasattr(type(m), "reshard") or "_fsdp_wrapped_module" in m._modules for m in model.modules())
    return fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def divergence_in_head(
    hidden: Tensor,
    head: HeadParams,
    labels: Tensor,
    teacher: HeadInputs,
    *,
    direction: Direction = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocabulary: int | None = None,
    workspace_mb: float | None = None,
    token_weight: Tensor | None = None,
) -> Tensor:
    """``linear_token_kl`` of the student's hidden states (B, T, D) and the teacher's; labels (B, T), aligned with them,
    say which rows count: (B, T), or with token_weight (B, T) the weighted sum, in one pass.
    """

    def cut(of: HeadParams) -> dict[str, Any]:
        rows = slice(vocabulary)
        options = dict(of.logit_options)
        if of.low_rank is not None:
            options["low_rank"] = (of.low_rank[0].to(hidden.device), of.low_rank[1][rows].to(hidden.device))
        bias = None if of.bias is None else of.bias[rows].to(hidden.device)
        return {"weight": of.lm_head_weight[rows].to(hidden.device), "bias": bias, "options": options}

    own, other = cut(head), cut(teacher.head)
    if own["weight"].shape[0] != other["weight"].shape[0]:
        sizes = f"{own['weight'].shape[0]} and {other['weight'].shape[0]}"
        raise ValueError(
            f"the student and the teacher must have one vocabulary, got heads of {sizes} entries; with one tokenizer "
            "and padding of two lengths pass vocabulary=len(tokenizer)"
        )
    return linear_token_kl(
        hidden,
        own["weight"],
        teacher.hidden.to(hidden.device),
        other["weight"],
        labels,
        own["bias"],
        other["bias"],
        direction=direction,
        beta=beta,
        temperature=temperature,
        ref_temperature=temperature if teacher_temperature is None else teacher_temperature,
        workspace_mb=workspace_mb,
        token_weight=token_weight,
        reduction="none" if token_weight is None else "sum",
        **own["options"],
        **{f"ref_{name}": value for name, value in other["options"].items()},
    )


def token_divergence(
    model: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Any],
    *,
    direction: Direction = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocabulary: int | None = None,
    workspace_mb: float | None = None,
) -> Tensor:
    """Divergence of the student's distribution from the teacher's at every label, without either model's logits.

        "forward"   KL(teacher || student)      classic distillation, mass-covering
        "reverse"   KL(student || teacher)      on-policy distillation, mode-seeking
        "jsd"       beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student: GKD

    The teacher may have another hidden size, another architecture and another dtype; its tokenizer must be the
    student's. Gradients go to the student alone. Peak memory is that of ``linear_token_kl``.

    Args:
        model: the student; teacher: of the same kinds as ``token_logprobs`` takes, its whole lm_head on one device.
        batch: the models' keyword arguments, input_ids (B, T) among them, and labels (B, T), not shifted, -100 where
            there is nothing to learn. What a label says is not used.
        direction, beta: as above.
        temperature: divides both models' logits; teacher_temperature: the teacher's own in its place.
        vocabulary: ids that both models know, len(tokenizer), where their heads are padded to two lengths.
        workspace_mb: see ``linear_token_kl``.

    Returns:
        (B, T) fp32, nats, >= 0: at t the divergence of the distributions that predict labels[:, t]; 0 where it is -100.

    Raises:
        ValueError, TypeError: a head that is not understood, labels of another shape, two vocabularies.
    Source: Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649), equation 1.
    """
    options = {"direction": direction, "beta": beta, "temperature": temperature, "vocabulary": vocabulary}
    options |= {"teacher_temperature": teacher_temperature, "workspace_mb": workspace_mb}
    return F.pad(_divergence(model, teacher, batch, mean=False, **options)[:, :-1], (1, 0))


def distillation_loss(model: nn.Module, teacher: nn.Module, batch: Mapping[str, Any], **options: Any) -> Tensor:
    """Mean of ``token_divergence`` over the labels that are not -100, in one pass: a scalar, nats per token. options:
    its own.
    """
    return _divergence(model, teacher, batch, mean=True, **options)


def _divergence(model, teacher, batch: Mapping[str, Any], *, mean: bool, **options: Any) -> Tensor:
    """(B, T), at t the divergence of the distributions that predict the label after it; or their mean."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("batch must hold labels (B, T), -100 where there is nothing to learn, got none; add them")
    told = head_inputs(teacher, inputs)

    def in_head(hidden: Tensor, head: HeadParams) -> Tensor:
        following, weight = next_labels(labels, hidden), None
        if mean:
            kept = following != IGNORE_INDEX
            weight = kept.to(torch.promote_types(hidden.dtype, torch.float32)) / kept.sum().clamp(min=1)
        return divergence_in_head(hidden, head, following, told, token_weight=weight, **options)

    (divergence, *_), _ = capture(model, in_head, inputs, low_rank=True)
    return divergence
