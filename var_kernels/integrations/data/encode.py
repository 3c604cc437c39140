"""Examples to token ids: one flat table of rows (a prompt and one completion each), small enough to stay in memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from var_kernels.integrations.data.forms import DataError, Example, Problem, Text

logger = logging.getLogger(__name__)
_CHUNK = 1000  # texts handed to the tokenizer at once
_ANCHORS = ("\n", ":", "x")  # texts that rarely grow together with what follows


@dataclass
class EncodedRows:
    """Tokenised rows. Row i is ``token_ids[offset[i] : offset[i + 1]]``, of which the first ``prompt_length[i]`` are
    the prompt."""

    token_ids: Tensor  # (tokens,) int32
    offset: Tensor  # (rows + 1,) int64
    prompt_length: Tensor  # (rows,) int64
    reward: Tensor | None  # (rows,) fp32, NaN where a row has none
    group: Tensor  # (rows,) int64: rows of one example have the same number
    groups: list[list[int]]  # the rows of each example
    is_pair: list[bool]  # of each example: its two rows are (chosen, rejected)
    where: list[str]  # of each row: the line it was read from
    cut_prompts: int = 0
    cut_completions: int = 0
    columns: dict[str, Tensor] = field(default_factory=dict, compare=False)  # (rows,), made for the method: "ref_logp"
    token_columns: dict[str, Tensor] = field(default_factory=dict, compare=False)  # (tokens,), beside token_ids

    def __len__(self) -> int:
        return len(self.prompt_length)

    def length(self, row: int) -> int:
        """Number of tokens, prompt and completion."""
        return int(self.offset[row + 1] - self.offset[row])

    def row(self, row: int) -> dict:
        """input_ids and labels (T,) int64, and what is known of the row."""
        ids = self.token_ids[self.offset[row] : self.offset[row + 1]].long()
        labels = ids.clone()
        labels[: self.prompt_length[row]] = -100
        known = {"input_ids": ids, "labels": labels, "group": self.group[row]}
        if self.reward is not None:
            known["reward"] = self.reward[row]
        known |= {name: column[row] for name, column in self.columns.items()}
        span = slice(self.offset[row], self.offset[row + 1])
        return known | {name: column[span] for name, column in self.token_columns.items()}

    def row_sums(self, values: Tensor) -> Tensor:
        """(tokens,) -> (rows,), in fp64 before it is rounded."""
        return torch.segment_reduce(values.double(), "sum", offsets=self.offset, initial=0.0).to(values.dtype)


def encode_examples(examples: Sequence[Example], tokenizer, max_length: int) -> EncodedRows:
    """Tokenise prompts and completions apart, as generation will see them, and join them: prompt + completion + end of
    sequence.

    Plain text: the tokenizer's own beginning-of-sequence token comes first, its end-of-sequence token last. Messages:
    the tokenizer's chat template decides on both. Rows longer than ``max_length`` are cut and counted, never dropped:
    first the prompt loses its oldest tokens, down to half of ``max_length``, then the completion its last ones (with
    them the end token).

    Raises:
        ValueError: no end-of-sequence token, no chat template for messages, max_length below 2.
        DataError: rows that the chat template refuses, or whose prompt has no token.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a prompt token and a completion token), got {max_length}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token: set tokenizer.eos_token, completions must end with it"
        )
    texts, problems = _split_texts(examples, tokenizer)
    if problems:
        raise DataError(problems, remedy="the chat template does not fit these rows")
    rows, lengths, cut_prompts, cut_completions = [], [], 0, 0
    for prompt, completion, where in _token_lists(texts, tokenizer):
        if not prompt:
            raise DataError(
                [Problem(where, "the prompt has no token")], remedy="this tokenizer makes nothing of the prompt"
            )
        room = max(max_length // 2, max_length - len(completion))
        cut_prompts += len(prompt) > room
        prompt = prompt[-room:]
        cut_completions += len(prompt) + len(completion) > max_length
        completion = completion[: max_length - len(prompt)]
        lengths.append((len(prompt), len(completion)))
        rows.append(torch.tensor(prompt + completion, dtype=torch.int32))
    if cut_prompts or cut_completions:
        logger.warning(
            "max_length %d: of %d rows, %d lost the beginning of the prompt and %d the end of the completion",
            *(max_length, len(rows), cut_prompts, cut_completions),
        )
    groups, first = [], 0
    for example in examples:
        groups.append(list(range(first, first + len(example.completions))))
        first += len(example.completions)
    rewards = None
    if any(example.rewards is not None for example in examples):
        nan = float("nan")
        rewards = [r for ex in examples for r in (ex.rewards or [nan] * len(ex.completions))]
        rewards = torch.tensor(rewards, dtype=torch.float32)
    return EncodedRows(
        token_ids=torch.cat(rows),
        offset=torch.tensor([0] + [sum(pair) for pair in lengths]).cumsum(0),
        prompt_length=torch.tensor([prompt for prompt, _ in lengths]),
        reward=rewards,
        group=torch.tensor([number for number, rows_of in enumerate(groups) for _ in rows_of]),
        groups=groups,
        is_pair=[example.is_pair for example in examples],
        where=[where for example in examples for where in example.where],
        cut_prompts=cut_prompts,
        cut_completions=cut_completions,
    )


def _split_texts(examples: Sequence[Example], tokenizer) -> tuple[list[tuple[str, str, bool, str]], list[Problem]]:
    """(prompt text, completion text, rendered by the template?, where) of each row."""
    texts, problems = [], []
    for example in examples:
        for completion, where in zip(example.completions, example.where, strict=True):
            if isinstance(example.prompt, str):
                texts.append((example.prompt, completion, False, where))
                continue
            try:
                texts.append((*_render(tokenizer, example.prompt, completion, example.tools), True, where))
            except _template_errors() as error:
                problems.append(Problem(where, str(error)))
    return texts, problems


def _render(tokenizer, prompt: Text, completion: Text, tools: list | None) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "messages need a tokenizer with a chat template: set tokenizer.chat_template, or give plain text"
        )
    head = tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tools=tools, tokenize=False)
    if not whole.startswith(head):
        raise ValueError(
            "the chat template renders prompt + completion differently from the prompt alone, so they cannot be told "
            "apart"
        )
    return head, whole[len(head) :]


def _template_errors() -> tuple[type[Exception], ...]:
    try:
        from jinja2.exceptions import TemplateError
    except ImportError:
        return (ValueError, ImportError)
    return (ValueError, TemplateError)


def _token_lists(texts, tokenizer):
    """(prompt ids, completion ids, where) of each row."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        prompts = _ids(tokenizer, [prompt for prompt, _, _, _ in chunk])
        completions = _continuations(tokenizer, [completion for _, completion, _, _ in chunk])
        # A prompt's own special tokens: only a leading <bos> is wanted; some tokenizers also close with <eos> or <sep>.
        opens = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        for (_, _, rendered, where), prompt, completion in zip(chunk, prompts, completions, strict=True):
            if rendered:
                yield prompt, completion, where
            else:
                yield [bos, *prompt] if opens else prompt, [*completion, eos], where


def _continuations(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts that stand behind others: without the space that SentencePiece-like tokenizers put before a text."""
    anchors = {anchor: _ids(tokenizer, [anchor])[0] for anchor in _ANCHORS}
    bare, *behind = _ids(tokenizer, ["a", *(f"{anchor}a" for anchor in anchors)])
    if all(ids == [*before, *bare] for ids, before in zip(behind, anchors.values(), strict=True)):
        return _ids(tokenizer, texts)
    results = _ids(tokenizer, texts)
    left = list(range(len(texts)))
    for anchor, before in anchors.items():
        joined = _ids(tokenizer, [anchor + texts[i] for i in left])
        # Where a token spans the two, another anchor is tried.
        apart = {i: ids[len(before) :] for i, ids in zip(left, joined, strict=True) if ids[: len(before)] == before}
        for i, ids in apart.items():
            results[i] = ids
        left = [i for i in left if i not in apart]
        if not left:
            break
    return results


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
