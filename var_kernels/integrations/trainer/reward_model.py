"""Rewards from a model: a sequence classifier of transformers with one label, or a causal LM with its reward head."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_kernels.integrations import IGNORE_INDEX
from var_kernels.integrations.data import EncodedRows, Example, encode_examples, end_tokens
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.forwards import evaluating
from var_kernels.integrations.hf.heads import RewardHead, load_head
from var_kernels.integrations.hf.model import next_labels
from var_kernels.integrations.trainer.collator import model_inputs
from var_kernels.integrations.trainer.loading import check_folder, load_causal_lm, pad_token
from var_kernels.integrations.trainer.scoring import over_rows
from var_kernels.losses.ava import last_value, pair_accuracy

logger = logging.getLogger(__name__)
_HEAD_FILE = "value_head.json"


class RewardModel:
    """A reward function that is a model: ``reward_func=RewardModel.from_pretrained(path)``.

        sequence classifier            its one logit
        causal LM with a reward head   mu of the state that predicts the completion's last token, as in training
                                       (methods ava_p, ava_d, bradley_terry)

    Texts become tokens as in training (``encode_examples``), with the model's own tokenizer: messages by its chat
    template, plain text joined, with the end token; a tokenizer with a separator token (BERT's kind) gets prompt and
    completion as its pair of texts.

    Args:
        model: the model, in whatever dtype it computes.
        tokenizer: its tokenizer.
        head: the reward head of a causal LM; None for a classifier.
        batch_size: completions at once.
        max_length: tokens of prompt and completion; longer ones are cut as in training, equal prompts of a call alike.
        as_chat: wrap plain text in messages (user, assistant), for a reward model that knows only those.

    Raises:
        ValueError: a classifier with several labels, a tokenizer without chat template with as_chat.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        head: RewardHead | None = None,
        batch_size: int = 16,
        max_length: int = 1024,
        as_chat: bool = False,
    ) -> None:
        labels = getattr(model.config, "num_labels", 1)
        if head is None and labels != 1:
            raise ValueError(
                f"reward model must be a classifier with one label, got {labels} labels; give one of num_labels=1"
            )
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < (1 if name == "batch_size" else 2):
                raise ValueError(f"reward model: {name} must be positive, got {value}; max_length at least 2")
        if as_chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("reward model: as_chat needs a tokenizer with a chat template; drop as_chat")
        self.pad_token_id = pad_token(tokenizer)
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:
            text_config.pad_token_id = self.pad_token_id  # by which a classifier finds the last token
        self.model, self.tokenizer, self.head = model, tokenizer, head
        self.batch_size, self.max_length, self.as_chat = batch_size, max_length, as_chat

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | str = torch.float32, device: Any = None, **options: Any
    ) -> "RewardModel":
        """From a folder or a name on the hub; a folder with a saved reward head holds a causal LM.

        Raises:
            FileNotFoundError, OSError: there is no such model.
            ValueError: a model without a trained reward: another head, several labels, a classifier whose head is not
                in the file.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = str(path)
        check_folder("reward model", path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        head = None
        if (Path(path) / _HEAD_FILE).is_file():
            model = load_causal_lm(path, dtype)  # an adapter too
            head = load_head(path)
            if not isinstance(head, RewardHead):
                kind = json.loads((Path(path) / _HEAD_FILE).read_text(encoding="utf-8"))["class"]
                raise ValueError(
                    f"reward model: {path} must hold a RewardHead, got a {kind}; ava_p and bradley_terry train one"
                )
        else:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, output_loading_info=True
            )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(
                    f"reward model must be a trained classifier, got {path}, where {', '.join(missing[:3])} would be "
                    "random; pass a sequence classifier with one label, or what method ava_p or bradley_terry saved"
                )
        return cls(model.requires_grad_(False).eval(), tokenizer, head=head, **options).to(device)

    def to(self, device: Any) -> "RewardModel":
        if device is not None:
            self.model.to(device)
            if self.head is not None:
                self.head.to(device)
        return self

    def __call__(self, prompts: Sequence, completions: Sequence) -> list[float]:
        """One reward for each (prompt, completion), both texts or both messages.

        Raises:
            DataError: rows that the chat template refuses.
        """
        batches = self._batches(list(prompts), list(completions))
        rewards = torch.zeros(len(prompts), dtype=torch.float64)
        with torch.no_grad(), evaluating(self.model):
            for members, inputs in batches:
                rewards[members] = self._score(inputs).double().cpu()
        return rewards.tolist()

    def _batches(self, prompts: list, completions: list):
        """(rows, inputs) of rows of like length."""
        if self.as_chat:
            prompts = [_message("user", p) if isinstance(p, str) else p for p in prompts]
            completions = [_message("assistant", c) if isinstance(c, str) else c for c in completions]
        device = next(self.model.parameters()).device
        if self.head is None and self.tokenizer.sep_token_id is not None and all(isinstance(p, str) for p in prompts):
            pairs = self._text_pairs(prompts, completions)
            lengths = [len(pair["input_ids"]) for pair in pairs]
        else:
            pairs, given = None, enumerate(zip(prompts, completions, strict=True))
            examples = [Example(p, [c], None, [f"completion {row + 1}"]) for row, (p, c) in given]
            rows = encode_examples(examples, self.tokenizer, self.max_length, end_tokens(self.tokenizer, self.model))
            lengths = [rows.length(row) for row in range(len(rows))]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            if pairs is None:
                yield members, model_inputs(rows, members, self.pad_token_id, device)
            else:
                yield members, self.tokenizer.pad([pairs[row] for row in members], return_tensors="pt").to(device)

    def _text_pairs(self, prompts: list[str], completions: list[str]) -> list[dict]:
        """Pairs of texts as the tokenizer joins them, cut as training cuts: equal prompts alike, to the newest tokens.

        Raises:
            ValueError: long texts and a tokenizer of Python's own.
        """
        joiner = getattr(self.tokenizer, "backend_tokenizer", None)
        if joiner is None:
            whole = self.tokenizer(prompts, completions, truncation=False)
            made = [{name: values[row] for name, values in whole.items()} for row in range(len(prompts))]
            if any(len(row["input_ids"]) > self.max_length for row in made):
                raise ValueError(
                    f"reward model: texts of more than max_length = {self.max_length} tokens need a tokenizer of the "
                    f"tokenizers library, got {type(self.tokenizer).__name__}; raise max_length"
                )
            return made
        joiner.no_truncation()  # the settings of its last call
        joiner.no_padding()
        room = self.max_length - joiner.num_special_tokens_to_add(True)
        first, second = (joiner.encode_batch(texts, add_special_tokens=False) for texts in (prompts, completions))
        longest: dict[str, int] = {}
        for prompt, completion in zip(prompts, second, strict=True):
            longest[prompt] = max(longest.get(prompt, 0), len(completion))
        made = []
        for prompt, asked, said in zip(prompts, first, second, strict=True):
            asked.truncate(max(room // 2, room - longest[prompt], 1), direction="left")
            said.truncate(max(room - len(asked), 1))
            joined = joiner.post_process(asked, said, True)
            inputs = {
                "input_ids": joined.ids,
                "attention_mask": joined.attention_mask,
                "token_type_ids": joined.type_ids,
            }
            made.append({name: values for name, values in inputs.items() if name in self.tokenizer.model_input_names})
        return made

    def _score(self, inputs) -> Tensor:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if self.head is None:
            return self.model(**inputs).logits[:, 0].float()  # (B, 1) -> (B,)

        return _last_mu(self.model, self.head, inputs, labels)


def judge_pairs(trainer, rows: EncodedRows) -> tuple[float, int]:
    """(pairs that the trainer's reward head orders as the data do, a tie counting half; pairs) among the rows."""
    pairs = torch.tensor([group for group, is_pair in zip(rows.groups, rows.is_pair, strict=True) if is_pair])
    if not len(pairs):
        return 0.0, 0
    device = trainer.accelerator.device
    reward = torch.zeros(len(rows), dtype=torch.float64, device=device)

    def visit(batch: dict[str, Tensor], members: list[int]) -> None:
        labels = batch.pop("labels")
        with torch.no_grad(), trainer.accelerator.autocast():
            made = _last_mu(trainer.model, trainer.extra_head, batch, labels)
        reward[members] = made[: len(members)].to(reward)

    over_rows(trainer, trainer.model, rows, visit, "rewards")
    reward = trainer.accelerator.reduce(reward, "sum").cpu()
    return pair_accuracy(*reward[pairs].unbind(1)).item() * len(pairs), len(pairs)


def _last_mu(model: nn.Module, head: RewardHead, inputs, labels: Tensor) -> Tensor:
    """(B,) mu of the state that predicts the last token of each row's completion."""

    def in_head(hidden: Tensor, _):
        return last_value(head(hidden)[0], next_labels(labels, hidden) != IGNORE_INDEX)

    (reward_B,), _ = capture(model, in_head, inputs, low_rank=True)
    return reward_B


def _message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]
