"""Chat templates that mark the assistant's text by {% generation %}: only its tokens have labels."""

import copy
import dataclasses
from itertools import chain

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.tiny_training import losses, tiny_config, tiny_model, tokenizer
from var_kernels.integrations.data import DataError, Example, encode_examples, parse_row
from var_kernels.integrations.trainer import VARTrainer


def message(role, content):
    return {"role": role, "content": content}


def _ids(text):
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


TURNS = [message("user", "hi"), message("assistant", "yo"), message("user", "bye"), message("assistant", "ciao")]
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer(template):
    chat = copy.deepcopy(tokenizer())
    chat.chat_template = template
    return chat


def trained_text(row):
    return tokenizer().decode(row["input_ids"][row["labels"] != -100])


def test_a_marked_template_trains_the_assistants_turns_alone():
    chat = chat_tokenizer(MARKED)
    example = Example(TURNS[:1], [TURNS[1:], TURNS[3:]], [1.0, 0.0], ["a", "b"])
    rows = encode_examples([example], chat, 128)
    parts = ["yo<eos>", "\n[user]bye<eos>\n[assistant]", "ciao<eos>", "\n"]
    ids = [_ids(part) for part in parts]
    row = rows.row(0)
    assert row["input_ids"].tolist() == _ids("[user]hi<eos>\n[assistant]") + list(chain(*ids))
    labels = [part if number % 2 == 0 else [-100] * len(part) for number, part in enumerate(ids)]
    assert row["labels"].tolist() == [-100] * len(_ids("[user]hi<eos>\n[assistant]")) + list(chain(*labels))
    # transformers' own mask marks the same text
    whole = chat.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, kept in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if kept]
    assert trained_text(row) == tokenizer().decode(marked) == "yo<eos>ciao<eos>"
    assert trained_text(rows.row(1)) == "ciao<eos>"
    unlabelled = dataclasses.replace(rows, others=None)
    assert unlabelled.fingerprint() != rows.fingerprint()  # other log-probs of the reference


def test_a_marked_conversation_is_cut_with_its_labels():
    example = Example(TURNS[:1], [TURNS[1:]], [1.0], ["here"])
    whole = encode_examples([example], chat_tokenizer(MARKED), 128).row(0)
    for length in (8, 20, 30):
        rows = encode_examples([example], chat_tokenizer(MARKED), length)
        row, prompt = rows.row(0), int(rows.prompt_length[0])
        cut = len(_ids("[user]hi<eos>\n[assistant]")) - prompt
        assert row["input_ids"].tolist() == whole["input_ids"][cut : cut + length].tolist()
        assert row["labels"].tolist() == whole["labels"][cut : cut + length].tolist()
        assert trained_text(row).startswith("yo")


def test_a_completion_that_keeps_no_token_of_the_assistant_is_named():
    turns = [message("user", "hi"), message("tool", "x" * 40), message("assistant", "yo")]
    example = Example(turns[:1], [turns[1:]], [1.0], ["here"])
    assert trained_text(encode_examples([example], chat_tokenizer(MARKED), 128).row(0)) == "yo<eos>"
    with pytest.raises(DataError, match=r"here: the completion must keep a token.*raise max_length"):
        encode_examples([example], chat_tokenizer(MARKED), 16)


UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def test_without_marks_the_answers_of_a_completion_are_those_that_the_generation_prompt_opens():
    example = Example(TURNS[:1], [TURNS[1:]], [1.0], ["here"])
    row = encode_examples([example], chat_tokenizer(UNMARKED), 128).row(0)
    parts = ["yo<eos>\n", "[user]bye<eos>\n[assistant]", "ciao<eos>\n"]
    prompt = _ids("[user]hi<eos>\n[assistant]")
    assert row["input_ids"].tolist() == [*prompt, *chain(*map(_ids, parts))]
    assert trained_text(row) == "yo<eos>\nciao<eos>\n"
    last = encode_examples([Example(TURNS[:3], [TURNS[3:]], [1.0], ["here"])], chat_tokenizer(UNMARKED), 128)
    assert trained_text(last.row(0)) == "ciao<eos>\n"


HI = [message("user", "hi")]
SUM = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {}}}]}
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }})"
    "{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURN_IN_THE_USER = (  # what the user says is closed, and the answer has no header: there is no generation prompt
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<eos>{% else %}[INST] {{ m.content }} [/INST]"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "completion", "trained"),
    [
        (UNMARKED, [message("assistant", "yo"), message("assistant", "ciao")], "yo<eos>\nciao<eos>\n"),
        (CALLS, [SUM, message("tool", "4"), message("assistant", "four")], "(sum)<eos>four<eos>"),
        (CALLS, [message("assistant", "a"), *HI, message("assistant", "b"), *HI], "a<eos>b<eos>"),
        (CALLS, [message("tool", "4"), message("assistant", "four")], "four<eos>"),
        (TURN_IN_THE_USER, [message("assistant", "yo"), *HI, message("assistant", "ciao")], " yo<eos> ciao<eos>"),
        (CALLS.replace("<assistant>", "<assistant><t>"), [message("assistant", "a"), message("assistant", "b")],
         "a<eos>b<eos>"),
    ],
    ids=["two answers", "a tool between", "others at the end", "a tool first", "no header", "a longer header"],
)  # fmt: skip
def test_a_completion_of_several_messages_trains_the_answers_alone(template, completion, trained):
    row = encode_examples([Example(HI, [completion], [1.0], ["here"])], chat_tokenizer(template), 128).row(0)
    assert trained_text(row) == trained
    whole = chat_tokenizer(template).apply_chat_template([*HI, *completion], tokenize=False)
    assert tokenizer().decode(row["input_ids"]) == whole


ENDS_THE_LAST = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ '<eos>' if loop.last else ';' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKS_LAST = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}hm {% endif %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CALLS.partition("{% if add")[0], "no generation prompt and '<assistant>a"),
        (CALLS.replace("<assistant>", "<asks>"), "another generation prompt and 'sistant>a"),
        (ENDS_THE_LAST, "render message 1 of the completion alike"),
        (THINKS_LAST, "render message 1 of the completion alike"),
    ],
    ids=["no generation prompt", "another", "an end at the last", "thoughts at the last"],
)
def test_answers_that_cannot_be_told_from_the_rest_are_named(template, reason):
    example = Example(HI, [[message("assistant", "a"), message("assistant", "b")]], [1.0], ["here"])
    with pytest.raises(DataError, match=rf"(?s)here: the chat template must .*{reason}.*\{{% generation %\}}"):
        encode_examples([example], chat_tokenizer(template), 128)


def test_a_completion_without_an_answer_is_named():
    example = Example(HI, [[message("tool", "4")]], [1.0], ["here"])
    with pytest.raises(DataError, match=r"here: the completion must hold a message of the assistant, .* of tool"):
        encode_examples([example], chat_tokenizer(UNMARKED), 128)


def test_completions_of_a_prompt_that_share_less_of_the_header_are_given_the_same_prompt():
    """One answer keeps the thought that the generation prompt opens, the other drops it."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.thinking %}<t>{{ m.thinking }}</t>{% endif %}{{ m.content }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}<assistant><t>{% endif %}"
    )
    thinks = [{"role": "assistant", "content": "4", "thinking": "two and two"}]
    example = Example(HI, [thinks, [message("assistant", "4")]], [1.0, 0.0], ["a", "b"])
    rows = encode_examples([example], chat_tokenizer(template), 128)
    size = int(rows.prompt_length[0])
    assert rows.prompt_length.tolist() == [size, size]
    assert trained_text(rows.row(0)) == "<t>two and two</t>4<eos>"
    assert trained_text(rows.row(1)) == "4<eos>"


@pytest.mark.parametrize("answer", ["", "<b>4", "4"])
def test_no_token_is_cut_where_the_thought_is_dropped(answer):
    """<t> has its first character in common with <eos>, and with the answer."""
    chat = chat_tokenizer(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><t>{% endif %}"
    )
    chat.add_tokens(["<t>"])
    row = encode_examples([Example(HI, [[message("assistant", answer)]], [1.0], ["here"])], chat, 128).row(0)
    assert trained_text(row) == f"{answer}<eos>"
    assert row["input_ids"].tolist().count(chat.eos_token_id) == 2


def part(text):
    return {"type": "text", "text": text}


STRINGS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<eos>{% endfor %}"
LISTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}<eos>{% endfor %}"
STRICT = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<eos>' }}{% endfor %}"
EITHER = LISTS.replace("{% for p", "{% if m.content is string %}{{ m.content }}{% else %}{% for p").replace(
    "{% endfor %}<eos>", "{% endfor %}{% endif %}<eos>"
)


@pytest.mark.parametrize("template", [STRINGS, LISTS, STRICT, EITHER], ids=["strings", "lists", "strict", "either"])
@pytest.mark.parametrize("asked", ["hi there", [part("hi "), part("there")]], ids=["text", "parts"])
@pytest.mark.parametrize("answer", ["yo", [part("yo")], [{**part("yo"), "image": None}]], ids=["text", "parts", "null"])
def test_content_in_parts_is_the_same_text_whatever_the_template_reads(template, asked, answer):
    example = parse_row({"prompt": [message("user", asked)], "completion": [message("assistant", answer)]}, "here")
    row = encode_examples([example], chat_tokenizer(template), 128).row(0)
    assert tokenizer().decode(row["input_ids"]) == "[user]hi there<eos>[assistant]yo<eos>"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [part("what is this?"), {"type": "image"}],
            "prompt message 0 part must be of type 'text', got 'image'; drop it",
        ),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "got 'image_url'"),
        ([{"type": "text", "text": 3}], "prompt message 0 part must be of type 'text'"),
        (["hi"], "prompt message 0 part must be {'type': 'text', 'text': str}, got str 'hi'"),
        ([{"text": "hi"}], "prompt message 0 part must be {'type': 'text', 'text': str}"),
        (3, "prompt message 0 must be"),
    ],
)
def test_content_that_is_no_text_is_named(content, reason):
    row = {"prompt": [message("user", content)], "completion": [message("assistant", "yo")]}
    assert reason in parse_row(row, "here").reason


def test_training_on_marked_turns_weighs_the_assistants_tokens_alone(tmp_path):
    """Sums, lengths and the reference's log-probs are of the labelled tokens."""
    texts = (("yo", "ciao"), ("well", "no"), ("a", "bb"))
    turns = [[TURNS[0], message("assistant", a), TURNS[2], message("assistant", b)] for a, b in texts]
    rows = [{"prompt": t[:1], "completion": t[1:], "reward": float(i)} for i, t in enumerate(turns)]
    config = tiny_config(tmp_path, max_length=64, per_device_train_batch_size=3)
    trainer = VARTrainer(tiny_model(), config, rows, processing_class=chat_tokenizer(MARKED))
    table, score = trainer.train_dataset.rows, []
    for number in range(3):
        row = table.row(number)
        kept = row["labels"] != -100
        with torch.no_grad():
            logp = trainer.model(row["input_ids"][None]).logits[0].log_softmax(-1)
        s = logp[:-1][kept[1:]].gather(1, row["labels"][kept][:, None]).sum()
        assert table.columns["ref_logp"][number].item() == pytest.approx(s.item(), rel=1e-6)
        score.append((s, s / kept.sum() + number / 0.5))
    trainer.train()
    weight = torch.stack([value for _, value in score]).softmax(0)
    assert losses(trainer)[0] == pytest.approx(-(weight * torch.stack([s for s, _ in score])).sum().item(), rel=1e-6)
