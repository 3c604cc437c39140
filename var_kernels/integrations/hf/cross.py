"""Every completion scored after every prompt: the reference log-probs of VAR's "cross" normaliser."""

import copy
import inspect
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.hf.calibration import HeadParams, calibrate
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.logprobs import sequence_logprobs
from var_kernels.integrations.hf.model import inner_model, input_device
from var_kernels.integrations.hf.probe import undisturbed
from var_kernels.ops import linear_logprob

# Per model: the longest prompt whose cache was seen to agree with a full forward pass, or 0 where it did not.
_cache_trust: WeakKeyDictionary = WeakKeyDictionary()


def cross_reference_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor],
    completions: Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int = 16384,
    workspace_mb: float | None = None,
) -> Tensor:
    """Log-probability of every completion after every prompt, without gradients and without dropout (eval mode).

        scores[i, j] = sum_t log p(completions[j][t] | prompts[i], completions[j][:t])

    Each distinct prompt runs once; its KV cache is copied for the completions, which run in chunks. The first use of a
    model (and of a longer prompt) checks one entry against a full forward pass; a model that cannot continue from its
    cache with several tokens (Mamba-like states) is scored by full passes of prompt + completion. No (N, V) logits.
    Under FSDP or ZeRO-3 every rank must make the same number of passes.

    Args:
        prompts: lists or 1-D tensors of token ids, one token at least (a BOS token for an empty text).
        completions: likewise; give the end token where it is to count. As many as prompts, or not.
        max_tokens: rows times (prompt + completion) length of one forward pass; bounds activations and cache copies.
        workspace_mb: as in ``linear_logprob``.

    Returns:
        (len(prompts), len(completions)) fp32, nats, sums over tokens, on the model's device. For per-token means
        divide by the completions' lengths: ``scores / torch.tensor([len(c) for c in completions])``.

    Raises:
        ValueError: an empty prompt or completion; the model's head is not understood, or it is an encoder-decoder.
    """
    prompt_ids = [_token_ids("prompts", i, ids) for i, ids in enumerate(prompts)]
    completion_ids = [_token_ids("completions", j, ids) for j, ids in enumerate(completions)]
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; it bounds the tokens of one forward pass")
    inner = inner_model(model)
    calibrate(model)  # an encoder-decoder is refused: its completions do not continue its prompts
    scorer = _Scorer(model, completion_ids, max_tokens, workspace_mb, input_device(inner))
    # Longest first: what is verified for it covers the rest, and memory runs out at once if it ever does.
    distinct = sorted(set(prompt_ids), key=len, reverse=True)
    with undisturbed(model):
        rows = {prompt: _verified_row(inner, scorer, prompt) for prompt in (distinct if completion_ids else ())}
    if not rows:
        return torch.zeros(len(prompt_ids), len(completion_ids), device=scorer.device)
    return torch.stack([rows[prompt] for prompt in prompt_ids])


def _token_ids(argument: str, index: int, ids: Sequence[int] | Tensor) -> tuple[int, ...]:
    if isinstance(ids, Tensor) and (ids.dim() != 1 or ids.is_floating_point()):
        raise ValueError(
            f"{argument}[{index}] must be a 1-D tensor of token ids, got shape {tuple(ids.shape)} of {ids.dtype}; give "
            "each sequence by itself, without padding"
        )
    ids = tuple(ids.tolist() if isinstance(ids, Tensor) else ids)
    if not ids:
        hint = "start it with a BOS token" if argument == "prompts" else "drop it, or end it with an EOS token"
        raise ValueError(f"{argument}[{index}] must have at least one token id, got none; {hint}")
    return ids


def _verified_row(inner: nn.Module, scorer: "_Scorer", prompt: tuple[int, ...]) -> Tensor:
    trusted = _cache_trust.get(inner)
    if trusted == 0:
        return scorer.full_row(prompt)
    row = scorer.cached_row(prompt)
    if row is not None and (trusted or 0) >= len(prompt):
        return row
    longest = scorer.order[0]
    exact = scorer.full_row(prompt, only=longest)
    per_token = max(1e-4, 8 * torch.finfo(inner.dtype).eps)
    if row is not None and (row[longest] - exact[longest]).abs().item() <= per_token * len(scorer.completions[longest]):
        _cache_trust[inner] = len(prompt)
        return row
    _cache_trust[inner] = 0
    return scorer.full_row(prompt)


def _holds_keys_and_values_only(cache) -> bool:
    """Recurrent states (Mamba, linear attention) neither repeat over a batch nor take several tokens at once."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


class _Scorer:
    """The completions, in chunks with the longest first, and two ways to score them all after one prompt.

    Rows are (len(completions),) fp32.
    """

    def __init__(self, model, completions, max_tokens, workspace_mb, device):
        self.model, self.completions, self.max_tokens, self.workspace_mb = model, completions, max_tokens, workspace_mb
        self.device = device
        self.order = sorted(range(len(completions)), key=lambda j: len(completions[j]), reverse=True)

    def _chunks(self, order: list[int], prompt_length: int):
        while order:
            rows = max(1, self.max_tokens // (prompt_length + len(self.completions[order[0]])))
            yield order[:rows]
            order = order[rows:]

    def full_row(self, prompt: tuple[int, ...], only: int | None = None) -> Tensor:
        """By forward passes of prompt + completion; with ``only`` that entry alone, the others 0."""
        row = torch.zeros(len(self.completions), device=self.device)
        for chunk in self._chunks(self.order if only is None else [only], len(prompt)):
            ids, mask = self._padded([prompt + self.completions[j] for j in chunk])
            labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
            labels[:, : len(prompt)] = IGNORE_INDEX
            batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            row[chunk] = sequence_logprobs(self.model, batch, workspace_mb=self.workspace_mb).float().to(self.device)
        return row

    def cached_row(self, prompt: tuple[int, ...]) -> Tensor | None:
        """By one pass of the prompt, and completions that continue from its cache; None where it has no such cache."""
        first = torch.tensor([[[ids[0] for ids in self.completions]]], device=self.device)  # (1, 1, B)
        inputs = {"input_ids": torch.tensor([prompt], device=self.device), "use_cache": True}
        (logp,), output = self._captured(lambda hidden: hidden[:, -1:], first, inputs)
        row = logp[0, 0].float().to(self.device)  # of the first tokens, all predicted by the prompt's last position
        cache_name = "cache" if "cache" in output else "past_key_values"  # from transformers 5.24 on, and before
        cache = getattr(output, cache_name, None)
        if not _holds_keys_and_values_only(cache):
            return None
        for chunk in self._chunks([j for j in self.order if len(self.completions[j]) > 1], len(prompt)):
            ids, mask = self._padded([self.completions[j] for j in chunk])
            prompt_mask = mask.new_ones(len(chunk), len(prompt))
            own_cache = copy.deepcopy(cache)
            own_cache.batch_repeat_interleave(len(chunk))
            inputs = {
                "input_ids": ids[:, :-1],
                "attention_mask": torch.cat([prompt_mask, mask[:, :-1]], dim=1),
                cache_name: own_cache,
                "use_cache": True,
            }
            labels = ids.masked_fill(mask == 0, IGNORE_INDEX)[:, 1:]
            (logp,), _ = self._captured(lambda hidden: hidden, labels, inputs)
            row[chunk] += logp.sum(-1).float().to(self.device)
        return row

    def _captured(self, rows_of, labels: Tensor, inputs: dict):
        def score(hidden: Tensor, head: HeadParams) -> Tensor:
            labels_here, options = labels.to(hidden.device), head.logit_options
            if head.low_rank is not None:
                options["low_rank"] = (rows_of(head.low_rank[0]), head.low_rank[1])
            return linear_logprob(
                rows_of(hidden), head.lm_head_weight, labels_here, head.bias, **options, workspace_mb=self.workspace_mb
            )

        if "output_router_logits" in inspect.signature(inner_model(self.model).forward).parameters:
            inputs = {**inputs, "output_router_logits": False}  # an auxiliary loss cannot be had of a continuation
        return capture(self.model, score, inputs, low_rank=True)

    def _padded(self, sequences: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Right-padded (n, T) int64 ids and 0/1 mask."""
        rows = [torch.tensor(sequence, device=self.device) for sequence in sequences]
        ids, mask = (pad_sequence(part, batch_first=True) for part in (rows, [*map(torch.ones_like, rows)]))
        return ids, mask
