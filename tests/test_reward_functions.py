"""What a reward function is given and returns, and what is said of one that does it wrong."""

import copy
import functools
from decimal import Decimal

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tests.test_bad_input_train import folder, tree  # noqa: F401 - a fixture
from tests.tiny_online import online_trainer
from tests.tiny_training import tiny_config, tiny_model, tiny_trainer, tokenizer
from var_kernels.integrations.data import DataError, Example, load_examples, parse_row
from var_kernels.integrations.trainer import VARTrainer
from var_kernels.integrations.trainer.rewards import RewardSum, apply_reward_function, columns_of, load_rewards


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, c: [1.0] * (len(c) - 1), "got 23; return a list with one float per completion"),
        (lambda p, c: 1.0, "must return one float each for 24 rows from here on, got float"),
        (lambda p, c: torch.tensor(1.0), "must return one float each for 24 rows from here on, got Tensor"),
        (lambda p, c: dict(enumerate(c)), "must return one float each for 24 rows from here on, got dict"),
        (lambda p, c: set(range(len(c))), "must return one float each for 24 rows from here on, got set"),
        (
            lambda p, c: [float("nan") if x == "3" else 0.0 for x in c],
            "row 4: the reward function must return finite fp32 numbers, got nan",
        ),
        (
            lambda p, c: [1e39 if x == "3" else 0.0 for x in c],
            "row 4: the reward function must return finite fp32 numbers, got 1e.39",
        ),
        (
            lambda p, c: ["high" if x == "3" else 0.0 for x in c],
            "row 4: the reward function must return finite fp32 numbers, got 'high'",
        ),
        (
            lambda p, c: [1 / (x != "3") for x in c],
            "row 4: the reward function raised ZeroDivisionError: division by zero",
        ),
        (lambda p, c: 1 / (len(c) == 1) and [0.0], "row 1: the reward function raised ZeroDivisionError"),
    ],
    ids=[
        "too few",
        "a number",
        "a tensor",
        "a dict",
        "a set",
        "NaN",
        "beyond fp32",
        "text",
        "raises on a row",
        "raises on the whole",
    ],
)
def test_what_a_reward_function_does_wrong_is_reported_by_row(function, message, folder):  # noqa: F811
    before = tree(folder)
    with pytest.raises(DataError, match=message):
        tiny_trainer(folder, trainer_options={"reward_func": function})
    assert tree(folder) == before


def test_a_reward_function_may_return_tensors_and_numpy_numbers(folder):  # noqa: F811
    import numpy as np

    examples = load_examples(folder / "rows.jsonl")[0]
    for function in (lambda p, c: torch.ones(len(c)), lambda p, c: np.ones(len(c)), lambda p, c: [True] * len(c)):
        assert all(example.rewards == [1.0, 1.0, 1.0] for example in apply_reward_function(function, examples))


def test_a_module_that_fails_to_import_is_named_with_its_error(folder):  # noqa: F811
    (folder / "broken_reward.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match=r"can be imported .* got 'broken_reward'.*: ModuleNotFoundError"):
        load_rewards("broken_reward:f")


def test_several_functions_with_weights(folder, monkeypatch):  # noqa: F811
    """Each in its own way of being called; a list is a sum, the command has names and weights."""
    monkeypatch.chdir(folder)
    (folder / "mixed_rewards.py").write_text(
        "def length(prompts, texts):\n    return [len(t) for t in texts]\n"
        "def right(completions, answer, **columns):\n    return [c == a for c, a in zip(completions, answer)]\n"
    )
    examples = [parse_row(row, "here") for row in ANSWERS]
    total = apply_reward_function(load_rewards("mixed_rewards:length, mixed_rewards:right*-0.5"), examples)
    assert [ex.rewards for ex in total] == [[0.5, 1.0]] * 4
    half = apply_reward_function(load_rewards("mixed_rewards:length*0.5"), examples)
    assert [ex.rewards for ex in half] == [[0.5, 0.5]] * 4
    both = [load_rewards(f"mixed_rewards:{name}") for name in ("length", "right")]
    trainer = tiny_trainer(folder / "run", ANSWERS, trainer_options={"reward_func": both})
    assert trainer.train_dataset.rows.reward.tolist() == [2.0, 1.0] * 4
    online = columns_of(examples[0], RewardSum(both))
    assert online["answer"] == "1"
    with pytest.raises(ValueError, match=r"reward must be module:function\*weight, got 'a:f\*x'"):
        load_rewards("a:f*x")
    for parts, error in (([], ValueError), ([3], TypeError), ([(len, float("nan"))], ValueError)):
        with pytest.raises(error, match="reward_func must hold"):
            RewardSum(parts)


# ---- the columns of a row --------------------------------------------------------------------------------------------

ANSWERS = [
    {"prompt": f"{a} + 1 = ", "completions": [str(a + 1), "9"], "answer": str(a + 1), "level": {"of": a}}
    for a in range(4)
]
FORMS = {
    "several": ANSWERS,
    "one each": [{**row, "completions": None, "completion": c} for row in ANSWERS for c in row["completions"]],
    "pairs": [
        {"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": "9", "answer": r["answer"]} for r in ANSWERS
    ],
}


def right(completions, answer):
    """As TRL's examples are written: no prompts, a column by its name."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


class Judge:
    def __call__(self, prompts, completions, *, answer=None, **columns):
        assert len(prompts) == len(completions) == len(answer)
        return right(completions, answer)

    def method(self, prompts, completions, **columns):
        return right(completions, columns["answer"])


class Module(torch.nn.Module):
    def forward(self, prompts, completions, answer):
        return torch.tensor(right(completions, answer))


FUNCTIONS = {
    "by name": right,
    "by position": lambda p, c, answer: right(c, answer),
    "keywords": lambda prompts, completions, **kw: right(completions, kw["answer"]),
    "the other way round": lambda answer, completions, prompts: right(completions, answer),
    "keyword only": lambda p, c, *, answer: right(c, answer),
    "all by keyword": lambda **kw: right(kw["completions"], kw["answer"]),
    "the prompts and keywords": lambda prompts, **kw: right(kw["completions"], kw["answer"]),
    "an object": Judge(),
    "a method": Judge().method,
    "part of a function": functools.partial(lambda scale, completions, answer: right(completions, answer), 2.0),
    "a module": Module(),
    "a wrapper": lambda *args, **kw: right(args[1], kw["answer"]),
}


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_columns_of_the_rows_reach_the_function(rows, name, tmp_path):
    trainer = tiny_trainer(tmp_path, rows, trainer_options={"reward_func": FUNCTIONS[name]})
    assert trainer.train_dataset.rows.reward.tolist() == [1.0, 0.0] * 4


def test_a_function_without_keywords_is_called_as_before(tmp_path):
    trainer = tiny_trainer(tmp_path, ANSWERS, trainer_options={"reward_func": lambda p, c: [int(x) for x in c]})
    assert trainer.train_dataset.rows.reward.tolist() == [1, 9, 2, 9, 3, 9, 4, 9]


def test_every_column_reaches_keywords_as_it_stands_in_the_row(tmp_path):
    seen = {}

    def function(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completion_ids=completion_ids)
        return range(len(completions))

    rows = [{**row, "reward": 3.0, "label": "easy", "chosen": None} for row in ANSWERS[:2]]
    rows[1].pop("level")
    trainer = tiny_trainer(tmp_path, rows, trainer_options={"reward_func": function})
    assert seen["answer"] == ["1", "1", "2", "2"]
    assert seen["level"] == [{"of": 0}, {"of": 0}, None, None]
    assert seen["reward"] == [3.0] * 4
    assert seen["label"] == ["easy"] * 4
    assert set(seen) == {"answer", "level", "reward", "label", "chosen", "prompts", "completion_ids"}
    table = trainer.train_dataset.rows
    labels = [table.row(row)["labels"] for row in range(4)]
    assert seen["completion_ids"] == [values[values != -100].tolist() for values in labels]


def test_a_column_that_no_row_has_is_named(tmp_path):
    for function in (lambda completions, gold: [], lambda p, c, *, gold: []):
        with pytest.raises(ValueError, match=r"reward function: needs a column 'gold' in the data, got \['answer'"):
            tiny_trainer(tmp_path, ANSWERS, trainer_options={"reward_func": function})
    trainer = tiny_trainer(
        tmp_path,
        ANSWERS,
        trainer_options={"reward_func": lambda completions, gold=None: [int(c) * (gold is None) for c in completions]},
    )
    assert trainer.train_dataset.rows.reward.tolist() == [1, 9, 2, 9, 3, 9, 4, 9]


def test_rows_that_a_function_with_columns_fails_on_are_named(tmp_path):
    def function(completions, answer):
        return [1 / (int(a) - 3) for a in answer]

    with pytest.raises(DataError, match="train_dataset row 3: the reward function raised ZeroDivisionError"):
        tiny_trainer(tmp_path, ANSWERS, trainer_options={"reward_func": function})


@pytest.mark.parametrize(
    ("error", "sizes", "message"),
    [
        (KeyError, [5, 1, 1, 1], "place 2: the reward function raised KeyError: 'no answer'"),
        (TimeoutError, [5], "place 0: the reward function raised TimeoutError on 5 rows from here on: no answer"),
    ],
)
def test_a_function_that_fails_is_called_again_up_to_the_first_row_and_a_service_is_not(error, sizes, message):
    calls = []

    def function(prompts, completions):
        calls.append(len(prompts))
        if {"2", "4"} & set(prompts):
            raise error("no answer")
        return [0.0] * len(prompts)

    examples = [Example(str(n), ["c"], None, [f"place {n}"]) for n in range(5)]
    with pytest.raises(DataError, match=message):
        apply_reward_function(function, examples)
    assert calls == sizes


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.int64(1), torch.tensor(0.5), Decimal("0.5"), np.bool_(True), "0.5"]
)
def test_numbers_of_any_type_are_rewards(value):
    (example,) = apply_reward_function(lambda p, c: [value], [Example("p", ["c"], None, ["here"])])
    assert example.rewards == [float(value)]


@pytest.mark.parametrize("value", [None, np.float32("nan"), torch.tensor(float("inf")), "high", torch.ones(2), 1j])
def test_what_is_no_number_is_named_by_row(value):
    with pytest.raises(DataError, match="here: the reward function must return finite fp32 numbers, got"):
        apply_reward_function(lambda p, c: [value], [Example("p", ["c"], None, ["here"])])


def test_a_call_gets_whole_prompts():
    calls = []

    def function(prompts, completions):
        calls.append(len(prompts))
        return range(len(prompts))

    examples = [Example(str(n), ["c"] * size, None, ["here"] * size) for n, size in enumerate([30, 30, 30, 130, 1, 64])]
    scored = apply_reward_function(function, examples)
    assert calls == [60, 30, 64, 64, 3, 64]
    assert [len(example.rewards) for example in scored] == [30, 30, 30, 130, 1, 64]


# ---- online ----------------------------------------------------------------------------------------------------------


def test_online_the_columns_of_the_prompts_row_reach_the_function(tmp_path):
    seen = []

    def function(completions, answer, completion_ids, prompts, **columns):
        seen.extend(zip(prompts, answer, columns["level"], completion_ids, completions, strict=True))
        return [float(len(c)) for c in completions]

    trainer = online_trainer(tmp_path, prompts=ANSWERS, iterations=2, reward_func=function)
    trainer.train()
    answers = {row["prompt"]: (row["answer"], row["level"]) for row in ANSWERS}
    assert {prompt for prompt, *_ in seen} == set(answers)
    assert all((answer, level) == answers[prompt] for prompt, answer, level, *_ in seen)
    assert all(tokenizer().decode(ids, skip_special_tokens=True) == text for *_, ids, text in seen)


def test_online_a_prompt_stands_once_for_each_value_of_the_columns_that_are_read(tmp_path):
    rows = [{"prompt": "1 + 1 = ", "answer": answer, "id": n} for n, answer in enumerate("223")]
    wanted = {
        lambda prompts, completions: 0: 1,
        lambda completions, answer: 0: 2,
        lambda completions, **columns: 0: 3,
    }
    for number, (function, count) in enumerate(wanted.items()):
        trainer = online_trainer(tmp_path / str(number), prompts=rows, reward_func=function)
        assert len(trainer.online.prompts) == count


def test_online_tools_and_arguments_of_the_template_are_the_rows(tmp_path):
    chat = copy.deepcopy(tokenizer())
    chat.chat_template = (
        "{% for t in tools or [] %}<{{ t.name }}>{% endfor %}{% for m in messages %}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}{% if think is defined %}[{{ think }}]{% endif %}:{% endif %}"
    )
    message = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    rows = [
        {"prompt": message, "tools": [{"name": "add"}]},
        {"prompt": message, "chat_template_kwargs": {"think": False}},
        {"prompt": message},
    ]
    config = tiny_config(tmp_path, method="dpo", online=True, max_new_tokens=4)
    trainer = VARTrainer(tiny_model(), config, rows, processing_class=chat, reward_func=lambda p, c: [0.0] * len(p))
    assert [chat.decode(prompt.ids) for prompt in trainer.online.prompts] == ["<add>hi;:", "hi;[False]:", "hi;:"]
