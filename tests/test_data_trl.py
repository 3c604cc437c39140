"""The same rows become the same tokens as in TRL's own trainers."""

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

import datasets

from tests.tiny_training import tiny_model, tokenizer
from var_kernels.integrations.data import DataError, encode_examples, merge_prompts, parse_row

TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
BODY = (
    "{% if tools %}[tools]{{ tools | tojson }}<eos>\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.content is string %}{{ m.content }}{% endif %}"
    "{% if m.content is not string %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<eos>\n{% endfor %}"
)
TEMPLATES = {
    "plain": BODY + "{% if add_generation_prompt %}[assistant]{% endif %}",
    "begins itself": "{{ bos_token }}" + BODY + "{% if add_generation_prompt %}[assistant]{% endif %}",
    # An empty thought in the generation prompt alone: the answer is trained without it, as in TRL.
    "thinks": BODY
    + "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}",
    # The same thought in the answer, too.
    "thinks aloud": "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last and "
    "enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{{ m.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}",
    "names its tools only": "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}{{ date or '' }}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


OFF = {"chat_template_kwargs": {"enable_thinking": False}}
TALK = [{"role": "system", "content": "be kind"}, user("1 + 1?"), assistant("2"), user("2 + 2?")]
PARTS = [user([{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}])]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "1"}}}
ROWS = {
    "completion": {"prompt": TALK, "completion": [assistant("4")]},
    "a prompt that the assistant ends": {"prompt": TALK[:3], "completion": [assistant("4")]},
    "without thinking": {"prompt": TALK, "completion": [assistant("4")], **OFF},
    "an argument that no template reads": {
        "prompt": TALK, "completion": [assistant("4")], "chat_template_kwargs": {"nobody_reads_this": 3},
    },
    "an argument that one template reads": {
        "prompt": TALK, "completion": [assistant("4")], "chat_template_kwargs": {"date": "26 May"},
    },
    "a template of its own": {
        "prompt": TALK, "completion": [assistant("4")],
        "chat_template_kwargs": {"chat_template": TEMPLATES["begins itself"]},
    },
    "tools": {"prompt": TALK, "completion": [assistant("4")], "tools": TOOLS},
    "tools as JSON": {"prompt": TALK, "completion": [assistant("4")], "tools": '[{"type": "function", "function": '
                      '{"name": "sub", "parameters": {}}}]'},
    "text": {"prompt": "2 + 2 = ", "completion": "4"},
    "text with its end": {"prompt": "2 + 2 = ", "completion": "4<eos>"},
}  # fmt: skip
ONLY_BODY = {"parts": {"prompt": PARTS, "completion": [assistant("4")]}}


def chat(template):
    made = copy.deepcopy(tokenizer())
    made.chat_template = TEMPLATES[template]
    return made


def trl_config(kind, folder, **options):
    import trl

    settings = {"use_cpu": True, "report_to": "none", "max_length": None, "bf16": False, **options}
    return getattr(trl, f"{kind}Config")(str(folder), **settings)


def prepared(kind, rows, tok, folder, **options):
    """The rows as TRL's trainer of that kind prepares them."""
    import trl

    reference = {} if kind == "SFT" else {"ref_model": tiny_model(dtype=torch.float32)}
    trainer = getattr(trl, f"{kind}Trainer")(
        tiny_model(dtype=torch.float32),
        **reference,
        args=trl_config(kind, folder, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tok,
    )
    return trainer.train_dataset


def ours(row, tok):
    table = encode_examples(merge_prompts([parse_row(row, "here")]), tok, 10_000)
    made = []
    for number in range(len(table)):
        ids, size = table.row(number)["input_ids"].tolist(), int(table.prompt_length[number])
        made.append((ids[:size], ids[size:]))
    return table, made


CASES = [(template, name, row) for template in TEMPLATES for name, row in ROWS.items()]
CASES += [(template, *next(iter(ONLY_BODY.items()))) for template in ("plain", "begins itself", "thinks")]


@pytest.mark.parametrize(("template", "row"), [case[::2] for case in CASES], ids=["-".join(case[:2]) for case in CASES])
def test_a_completion_is_that_of_sft(template, row, tmp_path):
    tok = chat(template)
    made = prepared("SFT", [row], tok, tmp_path)[0]
    table, [(prompt, completion)] = ours(row, tok)
    assert tok.decode(prompt + completion) == tok.decode(made["input_ids"])
    assert prompt + completion == made["input_ids"]
    assert table.row(0)["labels"].tolist() == made["labels"]


def test_the_conversation_of_sft_holds_the_same_tokens(tmp_path):
    """Labels differ by decision: here the last answer alone is trained."""
    for template in TEMPLATES:
        row = {"messages": [*TALK, assistant("4")], **OFF}
        _, [(prompt, completion)] = ours(row, chat(template))
        assert prompt + completion == prepared("SFT", [row], chat(template), tmp_path)[0]["input_ids"]


def shipped_templates():
    from importlib.util import find_spec

    folder = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    return sorted(path for path in folder.glob("*.jinja"))


@pytest.mark.parametrize("path", shipped_templates(), ids=lambda path: path.stem)
def test_templates_of_real_models_give_the_tokens_of_trl(path):
    """Those that TRL ships, but for rows that it cannot render, or renders without text (lists of parts alone)."""
    from trl.data_utils import _tokenize, common_prefix_length

    tok = copy.deepcopy(tokenizer())
    tok.chat_template = path.read_text()
    rows = [
        {"prompt": TALK[1:], "completion": [assistant("4")]},
        *(ROWS[name] for name in ("completion", "without thinking", "tools", "a prompt that the assistant ends")),
        {"prompt": TALK[1:], "completion": [assistant("4", reasoning_content="2 and 2")]},
        {"prompt": TALK[1:], "completion": [{"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS},
    ]
    compared = 0
    for row in rows:
        options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        try:
            prompt = _tokenize(tok, row["prompt"], add_generation_prompt=True, **options)["input_ids"]
            whole = _tokenize(tok, row["prompt"] + row["completion"], **options)["input_ids"]
        except Exception:  # the template's own refusal, of whatever class
            continue
        if "2 + 2?" not in tok.decode(whole):
            continue
        shared = common_prefix_length(prompt, whole)
        assert ours(row, tok)[1] == [(whole[:shared], whole[shared:])]
        compared += 1
    assert compared or path.stem.split("_")[0] in ("idefics3", "smolvlm", "llava")


MARKED = (
    "{% if tools %}[tools]{{ tools | tojson }}<eos>\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{% if enable_thinking is defined and enable_thinking is false and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [assistant("2"), user("3 + 3?"), assistant("6"), {"role": "tool", "content": "7"}, assistant("8")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK[:2], "completion": TURNS},
        {"prompt": TALK[:2], "completion": TURNS, **OFF, "tools": TOOLS},
        {"prompt": TALK, "completion": [assistant("4")]},
        {"prompt": TALK, "completion": [assistant("4"), assistant("5")]},
    ],
    ids=["turns", "with arguments and tools", "one", "two"],
)
def test_marked_answers_are_those_of_assistant_only_loss(row, tmp_path):
    tok = copy.deepcopy(tokenizer())
    tok.chat_template = MARKED
    made = prepared("SFT", [row], tok, tmp_path, assistant_only_loss=True)[0]
    table, [(prompt, completion)] = ours(row, tok)
    assert prompt + completion == made["input_ids"]
    assert table.row(0)["labels"].tolist() == made["labels"]


def test_answers_without_marks_are_those_of_assistant_only_loss_with_them(tmp_path):
    row = {"prompt": TALK[:2], "completion": TURNS}
    tok = copy.deepcopy(tokenizer())
    tok.chat_template = MARKED
    made = prepared("SFT", [row], tok, tmp_path, assistant_only_loss=True)[0]
    plain = copy.deepcopy(tok)
    plain.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert ours(row, plain)[0].row(0)["labels"].tolist() == made["labels"]


PAIRS = {
    "pair": {"prompt": TALK, "chosen": [assistant("4")], "rejected": [assistant("5")]},
    "prompt inside": {"chosen": [*TALK, assistant("4")], "rejected": [*TALK, assistant("5")]},
    "without thinking": {"prompt": TALK, "chosen": [assistant("4")], "rejected": [assistant("5")], **OFF},
    "tools": {"prompt": TALK, "chosen": [assistant("4")], "rejected": [assistant("5")], "tools": TOOLS},
    "text": {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5<eos>"},
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_a_pair_is_that_of_dpo(template, row, tmp_path):
    made = prepared("DPO", [row], chat(template), tmp_path)[0]
    _, pair = ours(row, chat(template))
    assert pair == [(made["prompt_ids"], made[key]) for key in ("chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("name", ["completion", "without thinking", "tools", "text"])
def test_a_judged_completion_is_that_of_kto(name, tmp_path):
    rows = [{**ROWS[name], "label": label} for label in (True, False)]
    made = prepared("KTO", rows, chat("thinks"), tmp_path)
    for row, expected in zip(rows, made, strict=True):
        table, [pair] = ours(row, chat("thinks"))
        assert pair == (expected["prompt_ids"], expected["completion_ids"])
        assert table.reward.tolist() == [1.0 if expected["label"] else -1.0]


def test_what_the_generation_prompt_alone_holds_is_named(caplog):
    ours(ROWS["without thinking"], chat("thinks"))
    assert "in 1 rows the chat template drops the end of its generation prompt" in caplog.text
    assert "<think></think>" in caplog.text
    caplog.clear()
    ours(ROWS["without thinking"], chat("thinks aloud"))
    assert not caplog.text


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        (3, "chat_template_kwargs must be an object, got int 3"),
        ({"tokenize": True}, "chat_template_kwargs must be for the template, got tokenize"),
        ({"add_generation_prompt": False, "max_length": 3}, "got add_generation_prompt, max_length"),
    ],
)
def test_arguments_that_are_not_the_templates_are_named(kwargs, reason):
    assert reason in parse_row({"prompt": "a", "completion": "b", "chat_template_kwargs": kwargs}, "here").reason


def test_arguments_of_a_parquet_file_that_are_null_are_not_given():
    rows = [ROWS["without thinking"], {**ROWS["completion"], "chat_template_kwargs": {"enable_thinking": None}}]
    rows.append({**ROWS["completion"], "chat_template_kwargs": None})
    template = "{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}-{% endif %}"
    tok = chat("plain")
    tok.chat_template = template + TEMPLATES["plain"]
    texts = [tok.decode(ours(row, tok)[1][0][0]) for row in rows]
    assert [text.partition("[")[0] for text in texts] == ["False", "-", "-"]


def test_prompts_of_different_arguments_or_tools_stay_apart():
    rows = [ROWS[name] for name in ("completion", "without thinking", "tools", "completion")]
    merged = merge_prompts(parse_row(row, str(n)) for n, row in enumerate(rows))
    assert [example.where for example in merged] == [["0", "3"], ["1"], ["2"]]


def test_a_template_that_fails_on_a_row_is_named_by_it():
    tok = chat("plain")
    tok.chat_template = "{{ messages[0].content + 3 }}"
    with pytest.raises(DataError, match=r"here: .*concatenate"):
        ours(ROWS["completion"], tok)
