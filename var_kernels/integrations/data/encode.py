"""Examples to token ids: one flat table of rows (a prompt and one completion each), small enough to stay in memory."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from var_kernels.integrations.data.forms import DataError, Example, Problem, Text

logger = logging.getLogger(__name__)
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
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
    others: Tensor | None = None  # (tokens,) bool: in a completion, but not the assistant's; None: there are none

    def __len__(self) -> int:
        return len(self.prompt_length)

    def length(self, row: int) -> int:
        """Number of tokens, prompt and completion."""
        return int(self.offset[row + 1] - self.offset[row])

    def row(self, row: int) -> dict:
        """input_ids and labels (T,) int64, and what is known of the row."""
        span = slice(self.offset[row], self.offset[row + 1])
        ids = self.token_ids[span].long()
        labels = ids.clone()
        labels[: self.prompt_length[row]] = -100
        if self.others is not None:
            labels[self.others[span]] = -100
        known = {"input_ids": ids, "labels": labels, "group": self.group[row]}
        if self.reward is not None:
            known["reward"] = self.reward[row]
        known |= {name: column[row] for name, column in self.columns.items()}
        return known | {name: column[span] for name, column in self.token_columns.items()}

    def row_sums(self, values: Tensor) -> Tensor:
        """(tokens,) -> (rows,), in fp64 before it is rounded."""
        return torch.segment_reduce(values.double(), "sum", offsets=self.offset, initial=0.0).to(values.dtype)


def encode_examples(examples: Sequence[Example], tokenizer, max_length: int) -> EncodedRows:
    """Tokenise prompts and completions apart, as generation will see them, and join them: prompt + completion + end of
    sequence.

    Plain text: the tokenizer's own beginning-of-sequence token comes first, its end-of-sequence token last. Messages:
    the tokenizer's chat template decides on both, and, where it marks the assistant's text by {% generation %}, on what
    of a completion has labels; what is marked and what is not are tokenised apart, too. Rows longer than ``max_length``
    are cut and counted, never dropped: first the prompt loses its oldest tokens, down to half of ``max_length``, then
    the completion its last ones (with them the end token).

    Raises:
        ValueError: no end-of-sequence token, no chat template for messages, max_length below 2.
        DataError: rows that the chat template refuses, whose prompt has no token, whose completion keeps none that has
            a label, or holds messages of others than the assistant that the template does not tell apart.
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
    rows, others, lengths, cut_prompts, cut_completions = [], [], [], 0, 0
    for prompt, completion, of_others, where in _token_lists(texts, tokenizer):
        if not prompt:
            raise DataError(
                [Problem(where, "the prompt has no token")], remedy="this tokenizer makes nothing of the prompt"
            )
        room = max(max_length // 2, max_length - len(completion))
        cut_prompts += len(prompt) > room
        prompt = prompt[-room:]
        cut_completions += len(prompt) + len(completion) > max_length
        completion, of_others = completion[: max_length - len(prompt)], of_others[: max_length - len(prompt)]
        if all(of_others):
            problems.append(Problem(where, "the completion keeps no token that the chat template gives the assistant"))
        lengths.append((len(prompt), len(completion)))
        rows.append(torch.tensor(prompt + completion, dtype=torch.int32))
        others.append(torch.tensor([False] * len(prompt) + of_others, dtype=torch.bool))
    if problems:
        raise DataError(
            problems, remedy="put {% generation %} ... {% endgeneration %} around all that the assistant writes, or "
            "raise max_length",
        )  # fmt: skip
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
        others=torch.cat(others) if any(row.any() for row in others) else None,
    )


@dataclass(frozen=True)
class _RowText:
    prompt: str
    parts: list[tuple[str, bool]]  # of the completion, and whether each is another's than the assistant's
    rendered: bool  # by the chat template
    where: str


def _split_texts(examples: Sequence[Example], tokenizer) -> tuple[list[_RowText], list[Problem]]:
    texts, problems = [], []
    for example in examples:
        for completion, where in zip(example.completions, example.where, strict=True):
            if isinstance(example.prompt, str):
                texts.append(_RowText(example.prompt, [(completion, False)], False, where))
                continue
            try:
                head, parts = _render(tokenizer, example.prompt, completion, example.tools)
                texts.append(_RowText(head, parts, True, where))
            except _template_errors() as error:
                problems.append(Problem(where, str(error)))
    return texts, problems


def _render(tokenizer, prompt: Text, completion: Text, tools: list | None) -> tuple[str, list[tuple[str, bool]]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "messages need a tokenizer with a chat template: set tokenizer.chat_template, or give plain text"
        )
    answers = completion[0]["role"] == "assistant"
    head = tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=answers)
    whole, spans = _with_marks(tokenizer, [*prompt, *completion], tools)
    if not whole.startswith(head):
        raise ValueError(
            "the chat template renders prompt + completion differently from the prompt alone, so they cannot be told "
            "apart"
        )
    if spans is None:
        others = sorted({message["role"] for message in completion} - {"assistant"})
        if others:
            raise ValueError(
                f"the completion holds messages of {', '.join(others)}, and only what the assistant writes is trained: "
                "put {% generation %} ... {% endgeneration %} around that in tokenizer.chat_template (transformers' "
                "return_assistant_tokens_mask reads the same marks), or let the prompt end with these messages"
            )
        return head, [(whole[len(head) :], False)]
    parts, end = [], len(head)
    for start, stop in [*spans, (len(whole), len(whole))]:
        start, stop = max(start, len(head)), max(stop, len(head))
        parts += [(whole[end:start], True), (whole[start:stop], False)]
        end = stop
    return head, [(text, of_others) for text, of_others in parts if text]


def _with_marks(tokenizer, messages: list[dict], tools: list | None) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendered conversation, and the (start, stop) of each part that its template puts into {% generation %}; None
    where the template has no such marks."""
    if not isinstance(tokenizer.chat_template, str | dict):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False), None
    template = tokenizer.get_chat_template(None, tools)
    if not _MARK.search(template):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False), None
    from transformers.utils.chat_template_utils import render_jinja_template

    # apply_chat_template counts the marks in tokens of the whole text; prompt and completion are tokenised apart here
    rendered, spans = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return rendered[0], spans[0]


def _template_errors() -> tuple[type[Exception], ...]:
    try:
        from jinja2.exceptions import TemplateError
    except ImportError:
        return (ValueError, ImportError)
    return (ValueError, TemplateError)


def _token_lists(texts: list[_RowText], tokenizer):
    """(prompt ids, completion ids, which of these are of others, where) of each row."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        prompts = _ids(tokenizer, [row.prompt for row in chunk])
        parts = iter(_continuations(tokenizer, [text for row in chunk for text, _ in row.parts]))
        # A prompt's own special tokens: only a leading <bos> is wanted; some tokenizers also close with <eos> or <sep>.
        opens = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        for row, prompt in zip(chunk, prompts, strict=True):
            completion, of_others = [], []
            for _, other in row.parts:
                ids = next(parts)
                completion += ids
                of_others += [other] * len(ids)
            if row.rendered:
                yield prompt, completion, of_others, row.where
            else:
                yield [bos, *prompt] if opens else prompt, [*completion, eos], [*of_others, False], row.where


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
