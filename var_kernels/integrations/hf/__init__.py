"""Fused losses on any Hugging Face causal language model, without its [B, T, V] logits."""

from var_kernels.integrations.hf.calibration import HeadParams
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.cross import cross_reference_logprobs
from var_kernels.integrations.hf.distill import distillation_loss, token_divergence
from var_kernels.integrations.hf.logprobs import sequence_logprobs, token_logprobs
from var_kernels.integrations.hf.loss import fused_lm_head
from var_kernels.integrations.hf.model import next_labels

__all__ = [
    "HeadParams", "capture", "cross_reference_logprobs", "distillation_loss", "fused_lm_head", "next_labels",
    "sequence_logprobs", "token_divergence", "token_logprobs",
]  # fmt: skip
