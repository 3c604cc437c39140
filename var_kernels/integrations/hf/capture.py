"""A function of the caller's, computed inside a model's lm_head in place of the logits."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from var_kernels.integrations.hf.calibration import calibrate
from var_kernels.integrations.hf.head import HeadParams, head_results, tied
from var_kernels.integrations.hf.model import find_head, inner_model, logits_of, without_cache


def capture(
    model: nn.Module,
    fn: Callable[[Tensor, HeadParams], Any],
    inputs: Mapping[str, Any],
    *,
    sharded: bool = False,
    low_rank: bool = False,
) -> tuple[tuple[Tensor, ...], Any]:
    """Run ``model(**inputs)`` with ``fn(hidden, head_params)`` computed inside the lm_head's forward instead of logits.

    fn's results (a tensor or a tuple of tensors, any shape) come back differentiable, tied to the model's output; no
    (N, V) tensor is made unless fn makes one. hidden (B, T, D) is what the model feeds its head; nothing is shifted.

    Args:
        model: an HF causal LM, or one wrapped by DDP, FSDP, DeepSpeed or PEFT. It is called as ``model(**inputs)``.
        fn: called once, with hidden and the head's weight, bias and calibrated logit transform.
        inputs: keyword arguments of the model, without ``labels``; for an encoder-decoder with decoder_input_ids.
            use_cache is False unless given.
        sharded: fn knows a ``HeadParams`` with a group, whose vocabulary is sharded over ranks.
        low_rank: fn passes ``**head_params.logit_options`` on to the ops, or adds ``head_params.low_rank`` itself;
            without it a head with an active LoRA adapter is refused.

    Returns:
        (results, output): fn's results as a tuple, and the model's output, its ``logits`` the placeholder.

    Raises:
        ValueError: the model's head is not understood (see ``calibrate``).
    """
    inner = inner_model(model)
    head = find_head(inner)
    transform = calibrate(model, inputs, encoder_decoder=inputs.get("decoder_input_ids") is not None)

    def compute(hidden: Tensor):
        return fn(hidden, transform.params(head, inner))

    with head_results(inner, head, compute, wide=transform.wide, sharded=sharded, low_rank=low_rank) as results:
        output = model(**without_cache(inner, inputs))
    if not results:
        raise ValueError(
            f"{type(inner).__name__} must call its output embedding in this forward pass, and did not; pass inputs "
            "from which it makes logits"
        )
    return tied(results, logits_of(output)), output
