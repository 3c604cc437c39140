"""Data forms, where a malformed row is reported, and what tokenisation makes of a row."""

import gzip
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import ROWS, losses, tiny_config, tiny_model, tokenizer
from var_kernels.integrations.data import DataError, Example, encode_examples, load_examples, merge_prompts, parse_row
from var_kernels.integrations.trainer import VARTrainer

GROUP = {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 0.5], "generators": ["m", "n"]}
SINGLE = {"prompt": "p", "completion": "a", "reward": -2}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
USER = [{"role": "user", "content": "hi"}]
ASSISTANT = [{"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "completions", "rewards", "is_pair"),
    [
        (GROUP, ["a", "b"], [1.0, 0.5], False),
        (SINGLE, ["a"], [-2.0], False),
        ({"prompt": "p", "completion": ""}, [""], None, False),
        (PAIR, ["a", "b"], None, True),
        ({**PAIR, "chosen_reward": 3, "rejected_reward": 1}, ["a", "b"], [3.0, 1.0], True),
        ({**PAIR, "rewards": [3, 1]}, ["a", "b"], [3.0, 1.0], True),
        ({"prompt": USER, "completion": ASSISTANT, "reward": 0}, [ASSISTANT], [0.0], False),
        # As a Parquet file of mixed forms has it: every column in every row.
        ({**SINGLE, "completions": None, "rewards": None, "chosen": None}, ["a"], [-2.0], False),
    ],
    ids=[
        "group",
        "single",
        "empty completion",
        "pair",
        "pair rewards",
        "pair rewards list",
        "messages",
        "null columns",
    ],
)
def test_a_row_of_each_form(row, completions, rewards, is_pair):
    example = parse_row(row, "here")
    assert example == Example(row["prompt"], completions, rewards, ["here"] * len(completions), is_pair)


BAD_ROWS = {
    "no prompt": ({"completion": "a", "reward": 1}, "a row must have prompt "),
    "prompt of another type": ({**SINGLE, "prompt": 3}, "prompt must be text or a list of messages, got int 3"),
    "null prompt": ({**SINGLE, "prompt": None}, "prompt must be text or a list of messages, got null"),
    "empty prompt": ({**SINGLE, "prompt": ""}, "prompt must not be empty"),
    "no messages": ({**SINGLE, "prompt": []}, "prompt must hold at least one message"),
    "message without role": ({**SINGLE, "prompt": [{"content": "x"}]}, "prompt message 0 must be"),
    "text and messages": (
        {"prompt": USER, "completion": "a", "reward": 1},
        "completion must be messages like prompt, got text",
    ),
    "no completion": ({"prompt": "p", "reward": 1}, "a row must have the keys prompt"),
    "null completion": ({**GROUP, "completions": ["a", None]}, r"completions\[1\] must be text .* got null"),
    "completions no list": ({**GROUP, "completions": "ab"}, "completions must be a list, got str 'ab'"),
    "no completions": ({**GROUP, "completions": []}, "completions must have at least one entry"),
    "fewer rewards": ({**GROUP, "rewards": [1]}, "rewards must have one entry per completion, 2, got 1"),
    "reward beyond fp32": ({**SINGLE, "reward": 1e39}, r"reward must be finite, got 1e\+39; rewards are kept in fp32"),
    "enormous integer": ({**SINGLE, "reward": 10**400}, r"reward must be finite, got 1000.*; rewards are kept in fp32"),
    "NaN reward": ({**GROUP, "rewards": [1, float("nan")]}, r"rewards\[1\] must be finite, got nan"),
    "infinite reward": ({**SINGLE, "reward": float("inf")}, "reward must be finite"),
    "null reward": ({**SINGLE, "reward": None}, "reward must be a number, got null"),
    "reward of another type": ({**SINGLE, "reward": "high"}, "reward must be a number, got str 'high'"),
    "boolean reward": ({**SINGLE, "reward": True}, "reward must be a number, got bool True"),
    "two forms": ({**SINGLE, "completions": ["b"]}, "a row must have completion or completions, got both"),
    "half of a surrogate pair": ({**SINGLE, "prompt": "\ud83d?"}, "prompt must be Unicode text, got a lone surrogate"),
    "the same in a message": (
        {"prompt": USER, "completion": [{"role": "assistant", "content": "a\udc00"}], "reward": 1},
        "completion must be Unicode text, got a lone surrogate",
    ),
    "half a pair": ({"prompt": "p", "chosen": "a"}, "a row must have rejected "),
    "one reward of a pair": ({**PAIR, "chosen_reward": 1}, "given together, got no rejected_reward"),
    "not an object": ([1, 2], "expected an object"),
    "rewards needed": ({"prompt": "p", "completion": "a"}, "reward must be in the data, since this method"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_malformed_row_is_named_by_line_and_reason(row, reason, tmp_path):
    good = json.dumps(SINGLE)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{json.dumps(row)}\n{good}\n")
    if isinstance(row, list):  # a first line "[" would make it an array; further down it is a row of the wrong type
        assert path.read_text().startswith("{")
    with pytest.raises(DataError, match=reason) as caught:
        load_examples(path, need_rewards="required")
    assert str(caught.value).startswith(f"{path}:3: ")
    examples, problems = load_examples(path, need_rewards="required", skip_malformed=True)
    assert len(examples) == 2
    assert [problem.where for problem in problems] == [f"{path}:3"]


def message(role, content=None, **more):
    return {"role": role, "content": content, **more}


TALK = [message("system", "be kind"), message("user", "hi"), message("assistant", "yo"), message("user", "bye")]
CALL = message("assistant", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])


@pytest.mark.parametrize(
    ("row", "prompt", "completions", "rewards"),
    [
        ({"messages": [*TALK, message("assistant", "ciao")]}, TALK, [[message("assistant", "ciao")]], None),
        (
            {"chosen": [*TALK, message("assistant", "ciao")], "rejected": [*TALK, message("assistant", "no")]},
            TALK,
            [[message("assistant", "ciao")], [message("assistant", "no")]],
            None,
        ),
        (  # a prompt of text that says the last question again
            {
                "prompt": "bye",
                "chosen": [*TALK, message("assistant", "ciao")],
                "rejected": [*TALK, message("assistant", "no")],
            },
            TALK,
            [[message("assistant", "ciao")], [message("assistant", "no")]],
            None,
        ),
        ({"prompt": "2 + 2", "completion": "4", "label": True}, "2 + 2", ["4"], [1.0]),
        ({"prompt": "2 + 2", "completion": "5", "label": False}, "2 + 2", ["5"], [-1.0]),
        ({"prompt": TALK, "completion": [CALL]}, TALK, [[CALL]], None),
    ],
    ids=["messages", "a pair with its prompt inside", "and in text", "desirable", "undesirable", "a tool call"],
)
def test_the_forms_of_other_trainers(row, prompt, completions, rewards):
    example = parse_row(row, "here")
    assert (example.prompt, example.completions, example.rewards) == (prompt, completions, rewards)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TALK}, "messages must be a conversation"),
        ({"messages": "hi"}, "messages must be a conversation"),
        ({"chosen": TALK[:1], "rejected": TALK[1:2]}, "a row must have prompt "),
        ({"prompt": "else", "chosen": TALK[:2], "rejected": TALK[:1]}, "chosen must be text like prompt, got messages"),
        ({"prompt": "a", "completion": "b", "tools": "f"}, "tools must be a list"),
    ],
)
def test_a_conversation_that_does_not_fit_is_named(row, reason):
    assert reason in parse_row(row, "here").reason


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("sft", [{"messages": [*TALK, message("assistant", text)]} for text in ("yes", "no", "well")]),
        (
            "dpo",
            [{"chosen": [*TALK, message("assistant", text)], "rejected": [*TALK, CALL]} for text in ("ciao", "yo")],
        ),
        ("kto", [{"prompt": "2 + 2", "completion": text, "label": text == "4"} for text in ("4", "5", "6")]),
    ],
    ids=["messages", "pairs of conversations", "judged"],
)
def test_training_on_the_forms_of_other_trainers(method, rows, tmp_path):
    import copy

    chat = copy.deepcopy(tokenizer())
    chat.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content or 'f()' }};{% endfor %}"
    config = tiny_config(tmp_path, method=method, max_steps=2, per_device_train_batch_size=2)
    trainer = VARTrainer(tiny_model(), config, rows, processing_class=chat)
    trainer.train()
    assert len(losses(trainer)) == 2
    assert losses(trainer)[1] != losses(trainer)[0]


def test_tools_reach_the_chat_template():
    import copy

    chat = copy.deepcopy(tokenizer())
    chat.chat_template = (
        "{% if tools %}<{{ tools[0].name }}>{% endif %}{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    row = {"prompt": USER, "completion": ASSISTANT, "tools": [{"name": "add"}]}
    encoded = encode_examples([parse_row(row, "here")], chat, 64).row(0)
    assert encoded["input_ids"].tolist() == _ids("<add>hi;yo;")


JUDGED = {"prompt": "2 + 2", "completion": "4"}


@pytest.mark.parametrize(
    ("label", "reward"),
    [
        *((label, 1.0) for label in (1, 1.0, "true", "True", "1", np.bool_(True), np.int64(1), torch.tensor(True))),
        *((label, -1.0) for label in (0, 0.0, "false", "FALSE", "0", np.bool_(False), np.uint8(0), torch.tensor(0))),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_a_label_of_any_kind(label, reward):
    assert parse_row({**JUDGED, "label": label}, "here", "unless_pair").rewards == [reward]
    assert parse_row({**JUDGED, "label": label, "reward": None}, "here", "required").rewards == [reward]


@pytest.mark.parametrize("label", [2, -1, 0.5, "good", "", [True], float("nan"), np.int64(2), torch.tensor([1, 0])])
def test_what_is_no_label_is_named_where_it_is_needed(label):
    problem = parse_row({**JUDGED, "label": label}, "here", "required")
    assert "label must be true or false (or 1 or 0), got" in problem.reason
    assert parse_row({**JUDGED, "label": label}, "here").rewards is None  # a column of another meaning
    assert parse_row({**JUDGED, "label": label, "reward": 2}, "here", "required").rewards == [2.0]


NUMBERS = [
    *(np.float32(0.5), np.float64(0.5), np.float16(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.array(0.5)),
    *(torch.tensor(0.5, dtype=torch.bfloat16), Decimal("0.5"), Fraction(1, 2), "0.5", " 5e-1 ", "+.5"),
]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: f"{type(value).__name__} {value}")
def test_a_reward_of_any_number_type(value):
    assert parse_row({**SINGLE, "reward": value}, "here").rewards == [0.5]
    assert parse_row({**GROUP, "rewards": [value, 1]}, "here").rewards == [0.5, 1.0]
    assert parse_row({**PAIR, "chosen_reward": value, "rejected_reward": np.int64(-3)}, "here").rewards == [0.5, -3.0]


@pytest.mark.parametrize("rewards", [(1, 0.5), np.array([1, 0.5]), torch.tensor([1.0, 0.5]), [np.int32(1), "0.5"]])
def test_rewards_may_be_any_sequence(rewards):
    assert parse_row({**GROUP, "rewards": rewards}, "here").rewards == [1.0, 0.5]
    assert parse_row({**PAIR, "rewards": rewards}, "here").rewards == [1.0, 0.5]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.bool_(True), "must be a number, got bool"),
        (torch.tensor(True), "must be a number, got Tensor"),
        ("0,5", "must be a number, got str '0,5'"),
        ("nan", "must be a number"),
        ("1_000", "must be a number"),
        ("", "must be a number"),
        (1j, "must be a number"),
        (torch.ones(2), "must be a number"),
        (np.float32("nan"), "must be finite, got"),
        (torch.tensor(float("inf")), "must be finite"),
        (Decimal("NaN"), "must be finite"),
        (Decimal("sNaN"), "must be finite"),
        ("1e39", "must be finite"),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_what_is_no_finite_number_is_named(value, reason):
    assert f"reward {reason}" in parse_row({**SINGLE, "reward": value}, "here").reason


def test_rows_of_any_mapping_and_messages_in_a_tuple():
    from collections import UserDict

    row = {"prompt": tuple(USER), "completion": tuple(ASSISTANT), "reward": 1}
    assert parse_row(UserDict(row), "here") == Example(USER, [ASSISTANT], [1.0], ["here"])


def test_every_problem_is_counted_and_ten_are_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p", "key{i}": 1}}\n' for i in range(13)))
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert len(caught.value.problems) == 13
    assert "13 malformed rows" in str(caught.value)
    assert "... and 3 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 12


def test_a_reason_that_many_rows_share_is_shown_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join('{"prompt": 1}\n' for _ in range(13)) + '{"prompt": "p"}\n')
    with pytest.raises(DataError) as caught:
        load_examples(path)
    _, first, second = str(caught.value).splitlines()
    assert first.startswith(f"  {path}:1: ")
    assert first.endswith(" (and 12 more rows like it)")
    assert second.startswith(f"  {path}:14: ")
    assert "more rows" not in second


def test_lines_that_are_not_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "completion": "a"}\n{"prompt": "p"\n\xff\xfe\n')
    examples, problems = load_examples(path, skip_malformed=True)
    assert len(examples) == 1
    assert [str(problem).split(" at ")[0] for problem in problems] == [
        f"{path}:2: not JSON: Expecting ',' delimiter",
        f"{path}:3: not UTF-8: invalid start byte",
    ]


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(SINGLE) + '\n{"prompt": ' + "[" * 200_000 + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        load_examples(path)
    path.write_text(f"[{json.dumps(SINGLE)},\n" + "[" * 200_000)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON that can be read: nested too deeply"):
        load_examples(path)


def test_a_json_array_names_the_line_its_element_begins_on(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps([SINGLE, {"prompt": "p"}, GROUP], indent=1))
    examples, problems = load_examples(path, skip_malformed=True)
    assert [example.where[0] for example in examples] == [f"{path}:3", f"{path}:11"]
    assert [problem.where for problem in problems] == [f"{path}:8"]
    path.write_text('[{"prompt": "p", "completion": "a"},\n {"prompt": }]')
    with pytest.raises(DataError, match=r"rows.json:2: not JSON: .*nothing after it was read"):
        load_examples(path)
    path.write_text('[{"prompt": "p", "completion": "a"}\n {"prompt": "p", "completion": "a"}]')
    with pytest.raises(DataError, match=r"rows.json:2: not JSON: expected ',' or ']'"):
        load_examples(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz", "rows.parquet"])
def test_every_kind_of_file_holds_the_same_rows(name, tmp_path, monkeypatch):
    path = tmp_path / name
    if name.endswith(".parquet"):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        text = json.dumps(ROWS) if ".json." in name + "." else "".join(json.dumps(row) + "\n" for row in ROWS)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    examples, problems = load_examples(str(path), need_rewards="required")
    assert not problems
    assert [(e.prompt, e.completions, e.rewards) for e in examples] == [
        (row["prompt"], row["completions"], row["rewards"]) for row in ROWS
    ]


def test_a_truncated_gzip_file_is_reported(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    text = "".join(json.dumps({**SINGLE, "prompt": str(i) * 50}) + "\n" for i in range(1000))
    path.write_bytes(gzip.compress(text.encode())[:-200])
    with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: unreadable from here on"):
        load_examples(path)


def test_equal_prompts_are_merged_and_pairs_are_not():
    rows = [SINGLE, {**SINGLE, "prompt": "q"}, PAIR, {**SINGLE, "completion": "b", "reward": 4}, PAIR]
    merged = merge_prompts(parse_row(row, str(i)) for i, row in enumerate(rows))
    assert [(e.prompt, e.completions, e.rewards, e.where) for e in merged] == [
        ("p", ["a", "b"], [-2.0, 4.0], ["0", "3"]),
        ("q", ["a"], [-2.0], ["1"]),
        ("p", ["a", "b"], None, ["2", "2"]),
        ("p", ["a", "b"], None, ["4", "4"]),
    ]


# ---- tokenisation ----------------------------------------------------------------------------------------------------


def _ids(text):
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_row_is_prompt_completion_and_end_with_labels_on_the_last_two():
    rows = encode_examples([parse_row(ROWS[0], "here")], tokenizer(), 64)
    prompt, completion = [0, *_ids(ROWS[0]["prompt"])], [*_ids(ROWS[0]["completions"][1]), 1]
    row = rows.row(1)
    assert row["input_ids"].tolist() == prompt + completion
    assert row["labels"].tolist() == [-100] * len(prompt) + completion
    assert row["reward"].item() == 0.25
    assert rows.groups == [[0, 1, 2]]
    assert (rows.cut_prompts, rows.cut_completions) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "completion", "kept_prompt", "kept_completion"),
    [(4, 3, 5, 4), (20, 2, 7, 3), (20, 20, 5, 5), (3, 20, 4, 6)],  # given in characters, kept in tokens
    ids=["fits", "long prompt", "both long", "long completion"],
)
def test_long_rows_lose_the_oldest_of_the_prompt_but_its_begin_token_then_the_end_of_the_completion(
    prompt, completion, kept_prompt, kept_completion
):
    letters = "cdefghijklmnpqrsvwyz"  # not in the tokenizer's training text: a token each
    example = Example(letters[:prompt], [letters[:completion].upper()], [1.0], ["here"])
    rows = encode_examples([example], tokenizer(), 10)
    ids = rows.row(0)["input_ids"].tolist()
    everything = [0, *_ids(letters[:prompt])], [*_ids(letters[:completion].upper()), 1]
    assert ids == [0, *everything[0][1:][1 - kept_prompt :], *everything[1][:kept_completion]]
    assert rows.cut_prompts == (len(everything[0]) > kept_prompt)
    assert rows.cut_completions == (len(everything[1]) > kept_completion)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_no_space_comes_between_prompt_and_completion(scheme):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE(unk_token="<unk>"))  # as SentencePiece: a space before every text
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bare.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    bare.train_from_iterator(["answer: yes no 4", "\n\n\n\n"], trainer)
    spaced = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for prompt, completion in (
        ("answer:\n", "yes"),
        ("answer:", " yes"),
        ("answer: ", "4"),
        ("answer:", "\n\nno"),
        ("a", ""),
    ):
        row = encode_examples([Example(prompt, [completion], [1.0], ["here"])], spaced, 64).row(0)
        assert spaced.decode(row["input_ids"][:-1]) == prompt + completion
        assert row["input_ids"][-1] == spaced.eos_token_id


def test_messages_go_through_the_chat_template():
    import copy

    chat = copy.deepcopy(tokenizer())
    example = Example(USER, [ASSISTANT], [1.0], ["here"])
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template"):
        encode_examples([example], chat, 64)
    chat.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = encode_examples([example], chat, 64).row(0)
    prompt, completion = _ids("[user]hi<eos>[assistant]"), _ids("yo<eos>")
    assert row["input_ids"].tolist() == prompt + completion
    assert row["labels"].tolist() == [-100] * len(prompt) + completion
    chat.chat_template = "{{ messages | length }}"
    with pytest.raises(DataError, match=r"here: the chat template must render prompt .* got .* there"):
        encode_examples([example], chat, 64)
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="here: roles must alternate"):
        encode_examples([example], chat, 64)
