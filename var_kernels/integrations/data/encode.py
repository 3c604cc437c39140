"""Examples to token ids: one flat table of rows (a prompt and one completion each), small enough to stay in memory."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.data.chat import ChatTemplate, Parts, template_errors
from var_kernels.integrations.data.forms import DataError, Example, Problem

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
    others: Tensor | None = None  # (tokens,) bool: in a completion, but not the assistant's; None: there are none

    @classmethod
    def of(cls, rows: Sequence[tuple[Any, Any]], counts: Sequence[int], **known: Any) -> "EncodedRows":
        """From the token ids of each row, (prompt, completion), and the number of rows of each example."""
        sizes = [(len(prompt), len(completion)) for prompt, completion in rows]
        return cls(
            token_ids=torch.cat([torch.as_tensor(ids, dtype=torch.int32) for row in rows for ids in row]),
            offset=torch.tensor([0, *map(sum, sizes)]).cumsum(0),
            prompt_length=torch.tensor([prompt for prompt, _ in sizes]),
            group=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
            groups=[list(range(end - count, end)) for count, end in zip(counts, accumulate(counts), strict=True)],
            **known,
        )

    def __len__(self) -> int:
        return len(self.prompt_length)

    def fingerprint(self, *more: Tensor | None) -> str:
        """Hash of the token ids and of which of them have labels: of the text, the tokenizer and max_length together;
        and of more tensors."""
        digest = hashlib.sha256()
        for tensor in (self.token_ids, self.offset, self.prompt_length, self.others, *more):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def length(self, row: int) -> int:
        """Number of tokens, prompt and completion."""
        return int(self.offset[row + 1] - self.offset[row])

    def row(self, row: int) -> dict:
        """input_ids and labels (T,) int64, and what is known of the row."""
        span = slice(self.offset[row], self.offset[row + 1])
        ids = self.token_ids[span].long()
        labels = ids.clone()
        labels[: self.prompt_length[row]] = IGNORE_INDEX
        if self.others is not None:
            labels[self.others[span]] = IGNORE_INDEX
        known = {"input_ids": ids, "labels": labels, "group": self.group[row]}
        if self.reward is not None:
            known["reward"] = self.reward[row]
        known |= {name: column[row] for name, column in self.columns.items()}
        return known | {name: column[span] for name, column in self.token_columns.items()}

    def completion_ids(self, row: int) -> list[int]:
        """The tokens of a row's completion, its end token among them."""
        return self.token_ids[self.offset[row] + self.prompt_length[row] : self.offset[row + 1]].tolist()

    def row_sums(self, values: Tensor) -> Tensor:
        """(tokens,) -> (rows,), in fp64 before it is rounded."""
        return torch.segment_reduce(values.double(), "sum", offsets=self.offset, initial=0.0).to(values.dtype)


def encode_examples(
    examples: Sequence[Example], tokenizer: Any, max_length: int, end_token_ids: Sequence[int] = ()
) -> EncodedRows:
    """Tokenise prompts and completions apart, as generation will see them, and join them: prompt + completion + end of
    sequence.

    Plain text: what the tokenizer puts before a text comes first (unless the text begins with it), its end-of-sequence
    token last (unless the completion ends with an end token). Messages: the tokenizer's chat template decides on both;
    labels are on what the assistant writes, which is tokenised apart from what others write.

    Rows longer than ``max_length`` are cut and counted, never dropped. Equal prompts are cut alike, so that their
    completions are compared under the same tokens: the prompt keeps its begin token and its newest tokens, as many as
    its longest completion leaves room for, but at least half of ``max_length``; then the completions lose their last
    tokens (with them the end token).

    Args:
        end_token_ids: tokens that end a completion besides the tokenizer's end-of-sequence token; see ``end_tokens``.

    Raises:
        ValueError: no end-of-sequence token, no chat template for messages, max_length below 2.
        DataError: rows that the chat template refuses, whose prompt has no token, whose completion keeps none that has
            a label, or in which the answers cannot be told from the rest.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a prompt token and a completion token), got {max_length}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer must have an end-of-sequence token, which ends completions, got none; set "
            "tokenizer.eos_token"
        )
    texts = _split_texts(examples, tokenizer)
    ends = {tokenizer.eos_token_id, *end_token_ids}
    whole, longest = list(_token_lists(texts, tokenizer, ends)), {}
    for prompt, _, completion, *_ in whole:
        key = prompt.numpy().tobytes()
        longest[key] = max(longest.get(key, 0), len(completion))
    rows, others, problems, cut_prompts, cut_completions = [], [], [], 0, 0
    for prompt, kept, completion, of_others, where in whole:
        room = max(max_length // 2, max_length - longest[prompt.numpy().tobytes()])
        cut_prompts += len(prompt) > room
        prompt = cut_prompt(prompt, kept, room)
        room = max_length - len(prompt)
        cut_completions += len(completion) > room
        completion, of_others = completion[:room], of_others[:room]
        if of_others.all():
            reason = "the completion must keep a token of the assistant's within max_length, got none"
            problems.append(Problem(where, reason))
        rows.append((prompt, completion))
        others += [torch.zeros(len(prompt), dtype=torch.bool), of_others]
    if problems:
        raise DataError(
            problems, remedy="put {% generation %} ... {% endgeneration %} around all that the assistant writes, or "
            "raise max_length",
        )  # fmt: skip
    if cut_prompts or cut_completions:
        logger.warning(
            "max_length %d: of %d rows, %d lost the beginning of the prompt and %d the end of the completion",
            *(max_length, len(whole), cut_prompts, cut_completions),
        )
    of_others = torch.cat(others)
    return EncodedRows.of(
        rows,
        [len(example.completions) for example in examples],
        reward=rewards_of(examples),
        is_pair=[example.is_pair for example in examples],
        where=[where for example in examples for where in example.where],
        cut_prompts=cut_prompts,
        cut_completions=cut_completions,
        others=of_others if of_others.any() else None,
    )


def rewards_of(examples: Sequence[Example]) -> Tensor | None:
    """(rows,) fp32, NaN where a row has none; None where no row has one."""
    if all(example.rewards is None for example in examples):
        return None
    nan = float("nan")
    rewards = [r for ex in examples for r in (ex.rewards or [nan] * len(ex.completions))]
    return torch.tensor(rewards, dtype=torch.float32)


def encode_prompts(examples: Sequence[Example], tokenizer: Any, room: int) -> tuple[list[list[int]], int]:
    """The token ids of prompts alone, as generation begins with them, cut to ``room``; and how many were cut.

    Raises:
        DataError: prompts that the chat template refuses, or that have no token.
    """
    chat, texts, problems = ChatTemplate(tokenizer), [], []
    for example in examples:
        where = example.where[0]
        if isinstance(example.prompt, str):
            texts.append(_RowText(example.prompt, [], False, where))
            continue
        try:
            texts.append(_RowText(chat.prompt(example), [], True, where))
        except template_errors() as error:
            problems.append(Problem(where, str(error)))
    if problems:
        raise DataError(problems, remedy="change the chat template, or drop these rows")
    made = [(prompt, kept) for prompt, kept, *_ in _token_lists(texts, tokenizer, set())]
    return [cut_prompt(ids, kept, room).tolist() for ids, kept in made], sum(len(ids) > room for ids, _ in made)


def cut_prompt(ids: Tensor, kept: int, room: int) -> Tensor:
    """At most ``room`` tokens: the first ``kept`` of them, which begin every text, and the newest."""
    if len(ids) <= room:
        return ids
    kept = kept if kept < room else 0
    return torch.cat([ids[:kept], ids[len(ids) - room + kept :]])


def end_tokens(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """Tokens that end a completion: those of the model's generation settings, and the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return tuple(dict.fromkeys(i for i in (*ends, tokenizer.eos_token_id) if i is not None))


@dataclass(frozen=True)
class _RowText:
    prompt: str
    parts: Parts  # of the completion
    rendered: bool  # by the chat template
    where: str


def _split_texts(examples: Sequence[Example], tokenizer) -> list[_RowText]:
    chat, texts, problems = ChatTemplate(tokenizer), [], []
    for example in examples:
        if isinstance(example.prompt, str):
            pairs: Any = zip(example.completions, example.where, strict=True)
            texts += [_RowText(example.prompt, [(completion, False)], False, where) for completion, where in pairs]
            continue
        try:
            head, completions = chat.split(example)
        except template_errors() as error:
            problems.append(Problem(example.where[0], str(error)))
            continue
        texts += [_RowText(head, parts, True, where) for parts, where in zip(completions, example.where, strict=True)]
    if problems:
        raise DataError(problems, remedy="change the chat template, or drop these rows")
    if chat.left_out:
        logger.warning(
            "in %d rows the chat template drops the end of its generation prompt once there is an answer (%r): their "
            "completions are trained without it",
            *(len(chat.left_out), chat.left_out[0]),
        )
    return texts


def _token_lists(texts: list[_RowText], tokenizer, ends: set[int]):
    """(prompt ids, how many of them begin every text, completion ids, which of these are of others, where) of each
    row."""
    bos, before = tokenizer.bos_token_id, None
    opening = _template_opening(tokenizer) if any(row.rendered for row in texts) else []
    problems = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        prompts = _ids(tokenizer, [row.prompt for row in chunk])
        parts = iter(_continuations(tokenizer, [text for row in chunk for text, _ in row.parts]))
        if before is None:
            before = _put_before(tokenizer, [row.prompt for row in chunk])
        for row, prompt in zip(chunk, prompts, strict=True):
            completion, of_others = [], []
            for _, other in row.parts:
                ids = next(parts)
                completion += ids
                of_others += [other] * len(ids)
            if not row.rendered:
                # a text may hold some of it: [gMASK]<sop> before "<sop>hi"
                held = next(n for n in range(len(before), -1, -1) if before[len(before) - n :] == prompt[:n])
                prompt = [*before[: len(before) - held], *prompt]
                if ends and not _has_ended(tokenizer, completion, ends):
                    completion, of_others = [*completion, tokenizer.eos_token_id], [*of_others, False]
            if not prompt:
                problems.append(Problem(row.where, "the prompt must have at least one token, got none"))
            begins = (before, opening if row.rendered else [], [bos])
            kept = max(len(begin) for begin in (*begins, []) if prompt[: len(begin)] == begin)
            first, second = (torch.tensor(values, dtype=torch.int32) for values in (prompt, completion))
            yield (first, kept, second, torch.tensor(of_others, dtype=torch.bool), row.where)
    if problems:
        raise DataError(problems, remedy="pass the model's own tokenizer, or drop these rows")


def _put_before(tokenizer, texts: list[str]) -> list[int]:
    """The tokens that the tokenizer puts before every text; those that it puts behind are no part of a prompt."""
    for text in ("a", *texts):
        bare = _ids(tokenizer, [text])[0]
        if bare:
            whole = tokenizer(text, truncation=False, verbose=False)["input_ids"]
            places = range(len(whole) - len(bare) + 1)
            return whole[: next((n for n in places if whole[n : n + len(bare)] == bare), 0)]
    return []


def _template_opening(tokenizer) -> list[int]:
    """The special tokens that the chat template writes once, before all messages, whatever these are."""
    roles = ("user", "assistant", "user")
    probe = Example([{"role": role, "content": "a"} for role in roles], [], None)
    try:
        (ids,) = _ids(tokenizer, [ChatTemplate(tokenizer).prompt(probe)])
    except template_errors():
        return []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    once = (ids.count(token) == 1 and token in special for token in ids)
    return [token for token, _ in zip(ids, takewhile(bool, once), strict=False)]


def _has_ended(tokenizer, ids: list[int], ends: set[int]) -> bool:
    """Return whether an end token is the last, or followed by white space alone."""
    last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in ends), None)
    if last is None:
        return False
    return last == len(ids) - 1 or not tokenizer.decode(ids[last + 1 :]).strip()


def _continuations(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts that stand behind others: without the space that SentencePiece-like tokenizers put before a text."""
    anchors = {anchor: _ids(tokenizer, [anchor])[0] for anchor in _ANCHORS}
    bare, *behind = _ids(tokenizer, ["a", *(f"{anchor}a" for anchor in anchors)])
    results = _ids(tokenizer, texts)
    if all(ids == [*before, *bare] for ids, before in zip(behind, anchors.values(), strict=True)):
        return results
    left = list(range(len(texts)))
    for anchor, before in anchors.items():
        joined = _ids(tokenizer, [anchor + texts[i] for i in left])
        # Where a token spans the two, another anchor is tried.
        apart = {i: ids[len(before) :] for i, ids in zip(left, joined, strict=True) if ids[: len(before)] == before}
        for i, ids in apart.items():
            results[i] = ids
        left = [i for i in left if i not in apart]
    return results


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"] if texts else []
