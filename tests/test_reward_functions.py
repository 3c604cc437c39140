"""What a reward function returns, and what is said of one that does it wrong."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.test_bad_input_train import folder, tree  # noqa: F401 - a fixture
from tests.tiny_training import tiny_trainer
from var_kernels.integrations.data import DataError, load_examples
from var_kernels.integrations.trainer.rewards import apply_reward_function, load_reward_function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, c: [1.0] * (len(c) - 1), "must return a list with one float per completion"),
        (lambda p, c: 1.0, "for 24 rows from here on it returned float"),
        (
            lambda p, c: [float("nan") if x == "3" else 0.0 for x in c],
            "row 4: the reward function must return finite numbers, got nan",
        ),
        (
            lambda p, c: ["high" if x == "3" else 0.0 for x in c],
            "row 4: the reward function must return finite numbers, got 'high'",
        ),
        (
            lambda p, c: [1 / (x != "3") for x in c],
            "row 4: the reward function raised ZeroDivisionError: division by zero",
        ),
        (lambda p, c: 1 / (len(c) == 1) and [0.0], "row 1: the reward function raised ZeroDivisionError"),
    ],
    ids=["too few", "a number", "NaN", "text", "raises on a row", "raises on the whole"],
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
    with pytest.raises(ValueError, match="'broken_reward' cannot be imported: ModuleNotFoundError"):
        load_reward_function("broken_reward:f")
