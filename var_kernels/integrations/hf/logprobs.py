"""Log-probabilities of a batch's tokens and sequences under a causal language model."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.calibration import HeadParams, is_causal, keeps_sequences_apart
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.model import decoder_inputs, find_head, inner_model, is_encoder_decoder, row_labels
from var_kernels.losses import sequence_sum
from var_kernels.ops import linear_logprob, vocab_parallel_logprob


def token_logprobs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    workspace_mb: float | None = None,
) -> Any:
    """Log-probability of every label given all tokens before it, computed inside the model's lm_head.

        logp[b, t] = log softmax(logits[b, t - 1] / temperature)[labels[b, t]]

    with the model's own scale, softcap and vocabulary bias in the logits; 0 where labels[b, t] is -100 and at t = 0,
    which no token precedes. In an encoder-decoder, whose decoder inputs start one token earlier, logits[b, t] belong to
    labels[b, t] and none is without. The (B, T, V) logits are never materialised; peak memory is that of
    ``linear_logprob``. Differentiable with respect to every parameter that requires a gradient.

    Args:
        model: an HF causal LM, plain or wrapped (DDP, FSDP, DeepSpeed, PEFT); called as ``model(...)``, in train or
            eval mode as it is.
        batch: the model's keyword arguments, (B, T) int64 ``input_ids`` among them, or (B, T, D) ``inputs_embeds``, and
            ``labels`` (B, T) int64 as everywhere in transformers: aligned with input_ids (not shifted), -100 where
            there is nothing to score. Without labels, of input_ids, every token is scored that attention_mask does not
            hide, and that has one before it that is not hidden either (behind padding on the left comes a first token).
            ``shift_labels`` in place of labels are the tokens after those of input_ids, and logp is aligned with them:
            a part of a sequence (context parallelism) ends with a label that is not in it. A row may hold several
            sequences (padding-free batches): where position_ids are 0 or do not rise, or cu_seq_lens_q say so, one
            begins, and no token precedes it. An encoder-decoder needs labels, of a length of their own;
            decoder_input_ids are made from them where they are missing.
        temperature: divides the logits, > 0.
        return_entropy: also return the entropy of each of these distributions (nats, differentiable, 0 where logp is).
        workspace_mb: as in ``linear_logprob``.

    Returns:
        (B, T) fp32 logp in nats, <= 0; with return_entropy the pair (logp, entropy).

    Raises:
        ValueError: the model's head is not understood or not causal; labels and input_ids differ in shape; sequences
            share a row and the model's hidden states mix them (it is tried once on eight tokens).
    """
    inner = inner_model(model)
    find_head(inner)  # before anything is said about the batch
    decoder_only = not is_encoder_decoder(inner)
    shift = decoder_only and (not isinstance(batch, Mapping) or batch.get("shift_labels") is None)
    inputs, labels = _inputs_and_labels(batch) if decoder_only else _decoder_inputs_and_labels(inner, batch)
    if not is_causal(model, inputs, encoder_decoder=not decoder_only):
        raise ValueError(
            f"{type(inner).__name__} is not causal: its hidden states depend on later tokens, so it has no next-token "
            "log-probabilities. A BERT-like model needs config.is_decoder = True"
        )
    starts = sequence_starts(inputs) if shift else None
    if starts is not None:
        check_apart(model, inputs, starts)
        labels = labels.masked_fill(starts.to(labels.device), IGNORE_INDEX)

    def score(hidden: Tensor, head: HeadParams):
        sharded = {} if head.group is None else {"process_group": head.group}
        return (vocab_parallel_logprob if sharded else linear_logprob)(
            hidden,
            head.lm_head_weight,
            row_labels(labels, hidden, shift=shift),
            head.bias,
            **head.logit_options,
            temperature=temperature,
            return_entropy=return_entropy,
            workspace_mb=workspace_mb,
            **sharded,
        )

    results, _ = capture(model, score, inputs, sharded=True, low_rank=True)
    if shift:  # (B, T): the row of t - 1 belongs to the label at t
        results = tuple(F.pad(result[:, :-1], (1, 0)) for result in results)
    return results if return_entropy else results[0]


def sequence_logprobs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    packed: bool = False,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
) -> Tensor:
    """Log-probability of each sequence's labels: ``token_logprobs`` summed over t. (B,) fp32, nats per sequence.

    With ``packed`` rows hold several sequences and the result is (S,), the sequences of all rows in their order; they
    begin as ``token_logprobs`` says. Positions must count on over padding behind them.
    """
    logp = token_logprobs(model, batch, temperature=temperature, workspace_mb=workspace_mb)
    if not packed:
        return logp.sum(-1)
    starts = sequence_starts(batch)
    if starts is None:
        raise ValueError(
            "packed=True must come with position_ids (B, T), 0 where a sequence begins, or cu_seq_lens_q in batch, got "
            f"{', '.join(batch)}; DataCollatorWithFlattening makes them"
        )
    begins = starts.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(begins, (0, 1), value=starts.numel())
    return sequence_sum(logp.flatten(), cu_seqlens=cu_seqlens.to(logp.device))


def _scored_by_mask(input_ids: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape (B, T) of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(mask.shape)}; with a mask of another form pass labels, which say what is scored"
        )
    hidden_before = F.pad(mask[:, :-1] == 0, (1, 0), value=False)  # (B, T); at t = 0 nothing is scored anyway
    return input_ids.masked_fill((mask == 0) | hidden_before, IGNORE_INDEX)


def _inputs_and_labels(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    tokens = tokens_of(batch) if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor):
        raise TypeError(
            "batch: expected a mapping with a tensor input_ids (B, T), as collators with return_tensors='pt' make it, "
            f"or inputs_embeds (B, T, D), got {type(batch).__name__}"
        )
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    shifted = inputs.pop("shift_labels", None)
    if shifted is not None and labels is not None:
        raise ValueError("batch must have labels or shift_labels, got both; drop one")
    labels = shifted if labels is None else labels
    if labels is None and tokens is not inputs.get("input_ids"):
        raise ValueError(
            "labels: expected with inputs_embeds, and with several ids a position, which do not say what is to be "
            "scored, got none"
        )
    if labels is None:
        mask = inputs.get("attention_mask")
        labels = tokens if mask is None else _scored_by_mask(tokens, mask)
    if labels.shape != tokens.shape or labels.dim() != 2:
        raise ValueError(
            f"labels must have the shape (B, T) of input_ids {tuple(tokens.shape)}, got {tuple(labels.shape)}; "
            "labels are not shifted, and -100 where ignored"
        )
    _check_int64(labels)
    return inputs, labels


def _decoder_inputs_and_labels(inner: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise TypeError(
            f"batch: {type(inner).__name__} is an encoder-decoder; expected a mapping with a tensor labels (B, T), the "
            f"decoder's targets, got {type(batch).__name__ if labels is None else type(labels).__name__}"
        )
    _check_int64(labels)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if inputs.get("decoder_input_ids") is None:
        inputs.update(decoder_inputs(inner, labels))
    return inputs, labels


def _check_int64(labels: Tensor) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}; use .long()")


# ---- rows of several sequences ---------------------------------------------------------------------------------------

# transformers' masks keep them apart by position_ids, where there is no attention_mask; flash attention by
# cu_seq_lens_q. Many models carry something over (recurrent states, position biases, masks of their own), so each is
# tried once on eight tokens.


def tokens_of(batch: Mapping[str, Any]) -> Tensor | None:
    """(B, T) the batch's input_ids, of several ids a position the first, or numbers in their place where it has
    inputs_embeds alone; None without both.
    """
    ids = batch.get("input_ids")
    ids = batch.get("inputs_embeds") if ids is None else ids
    return ids[..., 0].detach() if isinstance(ids, Tensor) and ids.dim() == 3 else ids


def sequence_starts(batch: Mapping[str, Any]) -> Tensor | None:
    """(B, T) bool, True where a sequence begins, of rows that may hold several; None where nothing says so.

    By cu_seq_lens_q, or position_ids that are 0 or do not rise.
    """
    tokens, positions, ends = tokens_of(batch), batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(ends, Tensor):
        starts = torch.zeros_like(tokens, dtype=torch.bool).flatten()
        # an entry at the end begins nothing
        starts = F.pad(starts, (0, 1)).index_fill(0, ends.to(starts.device, torch.int64), True)[:-1]
        return starts.view_as(tokens)
    if not isinstance(positions, Tensor) or positions.shape[-1] != tokens.shape[-1] or positions.dim() != 2:
        return None
    starts = F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0), value=True) | (positions == 0)
    return starts.expand_as(tokens)


def check_apart(model: nn.Module, inputs: Mapping[str, Any], starts: Tensor) -> None:
    """Refuse rows of several sequences whose hidden states depend on one another in this model.

    A model that does not keep them apart costs a look at the values of ``starts`` (B, T) in every call.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        return  # the caller says who sees whom
    if keeps_sequences_apart(model, inputs):
        return
    inside = starts[:, 1:]
    if mask is not None:
        inside = inside & ((mask[:, 1:] != 0) & (mask[:, :-1] != 0)).to(inside.device)
    if inside.any():
        remedy = "pad the sequences, one in a row"
        if mask is not None:
            remedy = "leave attention_mask out, which makes transformers ignore position_ids; or " + remedy
        elif inputs.get("position_ids") is None:
            remedy = "pass position_ids, which attention other than flash attention needs; or " + remedy
        raise ValueError(
            "position_ids must be those of one sequence per row, got several in one, where the hidden states of "
            f"{type(inner_model(model)).__name__} depend on the sequences before them; {remedy}"
        )
