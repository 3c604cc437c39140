"""Conversations to text by the tokenizer's chat template, and which of that text the assistant writes."""

import re
from typing import Any

from var_kernels.integrations.data.forms import Example

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "text of its own"
_REMEDY = (
    "put {% generation %} ... {% endgeneration %} around what the assistant writes in tokenizer.chat_template "
    "(transformers' return_assistant_tokens_mask reads the same marks), or let the prompt end before the last answer"
)
Parts = list[tuple[str, bool]]  # consecutive texts, and whether each is another's than the assistant's
Spans = list[tuple[int, int]]  # (start, stop) of what the assistant writes


def template_errors() -> tuple[type[Exception], ...]:
    """Raised by a template on messages that do not fit it."""
    try:
        from jinja2.exceptions import TemplateError
    except ImportError:
        return (ValueError, ImportError)
    return (ValueError, TypeError, AttributeError, KeyError, TemplateError)


class ChatTemplate:
    """A tokenizer's chat template. ``left_out``: ends of generation prompts that the template drops once there is an
    answer, so that training does not see them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.left_out: list[str] = []
        self._formats: dict[str, str] = {}  # of each template

    def prompt(self, example: Any) -> str:
        """The conversation so far, up to where the assistant begins to write."""
        return self._render(example.prompt, example, True)

    def split(self, example: Any) -> tuple[str, list[Parts]]:
        """The prompt's text, the same for every completion, and the parts of each completion."""
        rendered = [self._completion(example, completion) for completion in example.completions]
        start = min(first for first, _, _ in rendered)
        head = rendered[0][1][:start]
        if any(whole[:start] != head for _, whole, _ in rendered):
            raise ValueError(
                "the chat template must render a prompt alike for all its completions, got different texts; write a "
                "template in which no message depends on later ones"
            )
        return head, [_parts(whole, spans, start) for _, whole, spans in rendered]

    def _completion(self, example: Any, completion: list[dict]) -> tuple[int, str, Spans]:
        """(where the completion begins, the whole text, what of it the assistant writes)"""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "messages need a tokenizer with a chat template, got none; set tokenizer.chat_template, or give plain "
                "text"
            )
        whole, marked = self._with_marks([*example.prompt, *completion], example)
        first, kept = self._start(example.prompt, example, whole, completion[0]["role"] == "assistant")
        if kept:
            self.left_out.append(kept)
        if marked is not None:
            return first, whole, marked
        if not any(message["role"] == "assistant" for message in completion):
            others = ", ".join(sorted({message["role"] for message in completion}))
            raise ValueError(
                "the completion must hold a message of the assistant, which alone is trained, got messages of "
                f"{others}; end it with the assistant's answer"
            )
        if len(completion) == 1:
            return first, whole, [(0, len(whole))]
        return first, whole, self._spans(example, completion, whole)

    def _spans(self, example: Example, completion: list[dict], whole: str) -> Spans:
        """Spans of a template without marks: an answer begins where the generation prompt ends and ends where the
        conversation up to it ends."""
        spans = []
        for number, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            before = [*example.prompt, *completion[:number]]
            start, dropped = self._start(before, example, whole, True)
            until = self._render([*before, message], example, False) if number + 1 < len(completion) else whole
            if not whole.startswith(until):
                raise ValueError(
                    f"the chat template must render message {number + 1} of the completion alike with and without "
                    f"later ones, got different texts; {_REMEDY}"
                )
            opened = self._render(before, example, True) != self._render(before, example, False)
            said = _text_of(message.get("content")).strip()
            if (dropped or not opened) and not whole[start:].lstrip().startswith(said):
                raise ValueError(
                    f"the chat template must begin message {number + 1} of the completion with its generation prompt, "
                    f"got {'another' if opened else 'no'} generation prompt and {whole[start:][:20]!r} where the "
                    f"message begins; {_REMEDY}"
                )
            spans.append((start if number else 0, len(until)))  # the first one with all that follows the prompt
        return spans

    def _start(self, messages: list[dict], example: Example, whole: str, opens: bool) -> tuple[int, str]:
        """Start of the text after these messages in the whole conversation, and the part of the generation prompt that
        is missing there: some templates end it with an empty thought that they drop once there is an answer."""
        head = self._render(messages, example, opens)
        if whole.startswith(head):
            return len(head), ""
        at = next((n for n, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), len(whole))
        if not opens or not whole.startswith(self._render(messages, example, False)):
            raise ValueError(
                "the chat template must render prompt + completion with the text of the prompt alone in front, "
                f"{head[at:][:20]!r} at character {at}, got {whole[at:][:20]!r} there; write a template in which no "
                "message depends on later ones"
            )
        for token in self.tokenizer.get_added_vocab():  # <think> and <|im_end|> have their first character in common
            for text in (head, whole):
                begin = text.find(token, max(0, at - len(token) + 1), at - 1 + len(token))
                at = begin if 0 <= begin < at else at
        return at, head[at:]

    # ---- rendering ---------------------------------------------------------------------------------------------------

    def _render(self, messages: list[dict], example: Example, opens: bool) -> str:
        options = {"tools": example.tools, "tokenize": False, "add_generation_prompt": opens}
        return self.tokenizer.apply_chat_template(
            self._messages(messages, example), **options, **(example.template_kwargs or {})
        )

    def _with_marks(self, messages: list[dict], example: Example) -> tuple[str, Spans | None]:
        """The rendered conversation, and what its template puts into {% generation %}; None where it has no such
        marks."""
        template = self._template(example)
        if template is None or not _MARK.search(template):
            return self._render(messages, example, False), None
        from transformers.utils.chat_template_utils import render_jinja_template

        # apply_chat_template counts the marks in tokens of the whole text; here prompt and completion are apart
        given = {**self.tokenizer.special_tokens_map, **(example.template_kwargs or {}), "chat_template": template}
        rendered, spans = render_jinja_template(
            [self._messages(messages, example)], tools=example.tools, return_assistant_tokens_mask=True, **given
        )
        return rendered[0], spans[0]

    def _template(self, example: Example) -> str | None:
        """The template's text; None for a tokenizer that renders by itself."""
        if not isinstance(self.tokenizer.chat_template, str | dict):
            return None
        return self.tokenizer.get_chat_template((example.template_kwargs or {}).get("chat_template"), example.tools)

    def _messages(self, messages: list[dict], example: Example) -> list[dict]:
        """Without keys that are null (a Parquet file has every key in every message), and with content as the template
        reads it: a text, or a list of parts."""
        made = [{key: value for key, value in message.items() if value is not None} for message in messages]
        of_text = all(isinstance(message.get("content", ""), str) for message in made)
        kind = self._format(example)
        if kind == "both" or (of_text and kind == "text"):
            return made
        for message in made:
            content = message.get("content")
            if kind == "text" and isinstance(content, list):
                message["content"] = _text_of(content)
            elif kind == "parts" and isinstance(content, str):
                message["content"] = [{"type": "text", "text": content}]
        return made

    def _format(self, example: Example) -> str:
        """ "text", "parts" or "both": what the template makes of a message of either kind."""
        template = self._template(example)
        key = template or ""
        if key not in self._formats:
            shown = []
            for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
                options = {"tokenize": False} if template is None else {"tokenize": False, "chat_template": template}
                try:
                    text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], **options)
                except Exception:  # whatever a template does on what it was not written for
                    text = ""
                shown.append(_PROBE in text and "'type'" not in text and '"type"' not in text)
            text, parts = shown
            self._formats[key] = ("both" if text else "parts") if parts else "text"
        return self._formats[key]


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _parts(whole: str, spans: Spans, start: int) -> Parts:
    parts, end = [], start
    for begin, stop in [*spans, (len(whole), len(whole))]:
        begin, stop = max(begin, start), max(stop, start)
        parts += [(whole[end:begin], True), (whole[begin:stop], False)]
        end = stop
    return [(text, of_others) for text, of_others in parts if text]
