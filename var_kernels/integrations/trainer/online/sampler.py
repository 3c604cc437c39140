"""Completions from a policy: the interface, and transformers' ``generate`` behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from var_kernels.integrations.data import end_tokens
from var_kernels.integrations.hf.forwards import evaluating, swapped
from var_kernels.integrations.hf.model import inner_model


class Samples(NamedTuple):
    """Completions with the log-probs at which they were drawn: a sampler may return this in place of the lists alone.

    completions: as ``Sampler`` says. logps: parallel to them, one number a token, at the temperature of the draws; what
    ``importance_cap`` needs.
    """

    completions: list[list[list[int]]]
    logps: list[list[list[float]]] | None = None


class Sampler(Protocol):
    """Draws completions. Any callable of this form will do: an inference server, another engine.

    Args:
        model: the policy, not wrapped by DDP, as it is now; a backend with weights of its own must take these over.
        prompts: token ids, as training will see them (chat template and beginning-of-sequence token included).
        n: completions wanted of each prompt.
        temperature: divides the logits; the distribution is otherwise to be left as it is.
        max_new_tokens: of a completion, its end token included.
        seed: of these draws; equal arguments must give equal completions. No two calls of a run have the same.

    Returns:
        For each prompt n lists of token ids; a completion that ended holds its end token, last (padding behind it is
        left out). Or ``Samples``, with their log-probs.
    """

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> "list[list[list[int]]] | Samples": ...


@dataclass
class GenerateSampler:
    """``model.generate``: prompts padded on the left, pure sampling, whatever the model's own generation settings say.

    The model's generation settings, the mode of its modules and the random state are afterwards as they were.

    Args:
        pad_token_id: fills up shorter prompts.
        end_token_ids: any of them ends a completion.
    """

    pad_token_id: int
    end_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, tokenizer, pad_token_id: int) -> "GenerateSampler":
        """With the end tokens of the model's generation settings and of the tokenizer."""
        return cls(pad_token_id, end_tokens(tokenizer, inner_model(model)))

    @torch.no_grad()
    def __call__(self, model, prompts, *, n, temperature, max_new_tokens, seed):
        from transformers import GenerationConfig

        inner = inner_model(model)
        device = inner.get_input_embeddings().weight.device
        width = max(map(len, prompts))
        input_ids = torch.tensor([[self.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts])  # (P, T)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        settings = GenerationConfig(
            do_sample=True,
            temperature=float(temperature),
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            num_return_sequences=n,
            pad_token_id=self.pad_token_id,
            eos_token_id=list(self.end_token_ids),
            use_cache=True,
        )
        # generate fills what the settings leave open from the model's own, which may cut the distribution
        seeded = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with evaluating(inner), seeded, swapped(inner, "generation_config", settings):
            torch.manual_seed(seed)
            output = inner.generate(
                input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        ends, fillers = self.end_token_ids, {*self.end_token_ids, self.pad_token_id}
        rows = [without_padding(row, ends, fillers) for row in output[:, width:].tolist()]  # (P n, new tokens)
        return [rows[start : start + n] for start in range(0, len(rows), n)]


def check_completions(made: object, prompts: Sequence, n: int, max_new_tokens: int, vocabulary: int) -> Samples:
    """Return a sampler's completions as ``Samples``. Raises ValueError with what is wrong where."""
    made, logps = made if isinstance(made, Samples) else (made, None)
    if not isinstance(made, list) or len(made) != len(prompts):
        got = f"{len(made)}" if isinstance(made, list) else type(made).__name__
        raise ValueError(f"sampler must return {len(prompts)} lists, one a prompt, got {got}; in the prompts' order")
    for number, completions in enumerate(made):
        if len(completions) != n:
            raise ValueError(
                f"sampler must return {n} completions of prompt {number}, got {len(completions)}; draw n of each"
            )
        for ids in completions:
            if not 1 <= len(ids) <= max_new_tokens:
                raise ValueError(
                    f"sampler must return completions of 1 to {max_new_tokens} tokens, got {len(ids)} for prompt "
                    f"{number}; an empty answer is its end token alone"
                )
            wrong = [token for token in ids if not (isinstance(token, int) and 0 <= token < vocabulary)]
            if wrong:
                raise ValueError(
                    f"sampler must return token ids from 0 to {vocabulary - 1}, got {wrong[0]!r} for prompt {number}; "
                    "draw with this model's tokenizer"
                )
    if logps is not None:
        _check_logps(logps, made)
    return Samples(made, logps)


def _check_logps(logps: list[list[list[float]]], made: list[list[list[int]]]) -> None:
    for number, completions in enumerate(made):
        lengths = [len(ids) for ids in completions]
        got = [len(values) for values in logps[number]] if number < len(logps) else "none"
        if got != lengths:
            raise ValueError(f"sampler: logps of prompt {number} must be {lengths} numbers, got {got}; one a token")
        if wrong := [value for values in logps[number] for value in values if not -math.inf < value <= 1e-3]:
            raise ValueError(f"sampler: logps of prompt {number} must be finite and <= 0, got {wrong[0]}; nats")


def without_padding(ids: list[int], ends: Sequence[int], fillers: set[int]) -> list[int]:
    """A completion up to its first end token, where padding or more end tokens alone follow that."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids[: end + 1] if end is not None and fillers.issuperset(ids[end + 1 :]) else ids
