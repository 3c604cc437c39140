"""What every registered loss of sequences, pairs and groups promises alike: its pass class is true, its gradient is the
derivative of its value, nothing flows to constants, 16-bit inputs are widened, and 1e4 nats do no harm."""

import inspect
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from var_kernels.losses import (
    finetuning,
    group,
    kto,
    listwise,
    margin,
    pair,
    policy_gradient,
    regression,
    sail,
    supervised,
)
from var_kernels.losses.registry import LOSSES, MEANINGS, MODEL_LOSSES

MODULES = (finetuning, group, kto, listwise, margin, pair, policy_gradient, regression, sail, supervised)

# options that make each loss and each of its modes: a new loss of these modules gets a line here
CASES = {
    "sft": ("sft", {}),
    "sft, mean": ("sft", {"token_reduction": "mean"}),
    "var": ("var", {}),
    "awr": ("awr", {"beta": 0.7}),
    "raft": ("raft", {}),
    "raft, mean": ("raft", {"token_reduction": "mean"}),
    "dpo": ("dpo", {"beta": 0.3}),
    "dpo, smoothed": ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    "robust_dpo": ("robust_dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    "ipo, mean": ("ipo", {"tau": 0.2}),
    "ipo, sum": ("ipo", {"tau": 0.2, "token_reduction": "sum"}),
    "hinge": ("hinge", {"beta": 0.3}),
    "slic": ("slic", {"delta": 1.0, "target_weight": 0.3}),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.5}),
    "orpo": ("orpo", {"odds_weight": 0.5}),
    "sail_dp": ("sail_dp", {"beta": 0.3}),
    "sail_pp": ("sail_pp", {"beta": 0.3}),
    "sail_pr": ("sail_pr", {"beta": 0.3}),
    "sail_dp, reverse KL": ("sail_dp", {"beta": 0.3, "revkl_coef": 0.1}),
    "exo": ("exo", {"beta": 0.3, "reward_temperature": 0.5}),
    "lire": ("lire", {"temperature": 4.0}),
    "lire, mean": ("lire", {"temperature": 1.0, "token_reduction": "mean"}),
    "rebel": ("rebel", {"eta": 0.5}),
    "qrpo": ("qrpo", {"beta": 0.3}),
    "dro": ("dro", {"tau": 0.3}),
    "kto": ("kto", {"beta": 0.3}),
    "gspo": ("gspo", {"clip_low": 0.3, "clip_high": 0.3}),
    "reinforce": ("reinforce", {}),
    "iw_sft": ("iw_sft", {"temperature": 0.7}),
    "info_nca": ("info_nca", {"beta": 0.3, "reward_temperature": 0.5}),
    "nca": ("nca", {"beta": 0.3, "reward_temperature": 0.5}),
    "gvpo": ("gvpo", {"beta": 0.3}),
    "target_po": ("target_po", {"eta": 0.5}),
    "astar_po": ("astar_po", {"beta": 0.3}),
    "vespo": ("vespo", {}),
    "topr": ("topr", {}),
}
# whose gradient is not the derivative of their value: part of it stands behind a stopped gradient (test_sail.py,
# test_policy_gradient.py, test_finetuning_losses.py) or behind the batch's own baseline, which is then given
STOPPED = ("sail_pp", "sail_pr", "vespo", "topr", "iw_sft")

ROWS = 6
GROUP_IDS = torch.tensor([7, 4, 7, 7, 4, 9])


def inputs_of(loss, seed=0, spread=3.0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """A tensor for every name in the loss's signature."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in loss.tensors:
        if name == "group_ids":
            tensors[name] = GROUP_IDS
        elif name in ("desirable", "counted"):
            tensors[name] = torch.tensor([True, False, True, True, False, False])
        elif name.endswith("lengths"):
            tensors[name] = torch.randint(1, 9, (ROWS,), generator=generator)
        elif name.endswith("logp"):
            logp = -(20 + spread * torch.randn(ROWS, dtype=torch.float64, generator=generator)).abs()
            tensors[name] = logp.to(dtype)
        elif name == "advantage":  # of both signs in every row over a few seeds
            tensors[name] = (torch.rand(ROWS, dtype=torch.float64, generator=generator) - 0.5).to(dtype)
        elif name in ("reward", "chosen_reward", "rejected_reward", "value", "sample_weight"):
            tensors[name] = torch.rand(ROWS, dtype=torch.float64, generator=generator).to(dtype)
        else:
            assert name == "kl_baseline", f"no test input for {name}"
    return tensors


def policy_names(tensors):
    return [name for name in tensors if name.startswith("policy_")]


def policy_gradient(case, tensors) -> dict[str, torch.Tensor]:
    name, options = CASES[case]
    leaves = {key: tensors[key].detach().clone().requires_grad_() for key in policy_names(tensors)}
    loss = LOSSES[name].function(**{**tensors, **leaves}, **options)
    return dict(zip(leaves, torch.autograd.grad(loss.sum(), leaves.values()), strict=True))


def test_every_loss_of_these_modules_is_here():
    owners = {module.__name__ for module in MODULES}
    registered = {name for name, x in LOSSES.items() if x.function.__module__ in owners and x.item != "token"}
    assert registered == {name for name, _ in CASES.values()}


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES.values()}))
def test_signature_and_docstring_keep_the_contract(name):
    loss = LOSSES[name]
    assert loss.tensors[0].startswith("policy_")
    assert ("group_ids" in loss.tensors) == (loss.item == "group")
    assert ("policy_rejected_logp" in loss.tensors) == (loss.item == "pair")
    doc = inspect.getdoc(loss.function)
    for word in ("Args:", "Returns", "Raises", "Source:"):
        assert word in doc, word
    for option in loss.options:
        assert option in doc or f"as ``{name[:4]}" in doc, option


@pytest.mark.parametrize("name", sorted({**LOSSES, **MODEL_LOSSES}))
def test_every_tensor_and_result_is_described(name):
    """By the loss itself, or by the registry from the tensor's name."""
    loss = LOSSES.get(name) or MODEL_LOSSES[name]
    args, returns = inspect.getdoc(loss.function).split("\nArgs:\n")[-1].split("\n\nReturns:\n")
    described = {word for line in re.findall(r"^    ([\w*, ]+):", args, re.MULTILINE) for word in line.split(", ")}
    patterns = {*described, *(["chosen_*", "rejected_*"] if "chosen_*: " in args and "rejected_*: " in args else [])}
    for tensor in loss.tensors:
        assert any(fnmatchcase(tensor, pattern) for pattern in patterns), tensor
    assert "fp32 (fp64 for fp64" in returns


def test_the_page_says_what_tensors_are():
    page = (Path(__file__).parents[1] / "docs" / "api" / "losses.md").read_text()
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)) == MEANINGS


@pytest.mark.parametrize("name", sorted(name for name, loss in LOSSES.items() if not loss.reads_tokens))
def test_what_is_called_wrongly_is_refused_by_name(name):
    """By position and by name: a tensor too few, one too many, one twice."""
    loss = LOSSES[name]
    tensors, options = inputs_of(loss), {**dict.fromkeys(loss.options, 0.3), **loss.defaults}
    options = {key: value for key, value in options.items() if loss.options[key] is inspect.Parameter.empty}
    expected = loss.function(**tensors, **options)
    assert torch.equal(loss.function(*tensors.values(), **options), expected)
    first, *_ = tensors
    with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{first}'"):
        loss.function(**{key: value for key, value in tensors.items() if key != first}, **options)
    with pytest.raises(TypeError, match="positional argument"):
        loss.function(*tensors.values(), None, None, **options)
    with pytest.raises(TypeError, match=f"multiple values for argument '{first}'"):
        loss.function(*tensors.values(), **{first: tensors[first]}, **options)
    with pytest.raises(TypeError, match=f"{first} must be a floating-point tensor"):
        loss.function(**{**tensors, first: [1.0]}, **options)


@pytest.mark.parametrize("case", CASES)
def test_one_loss_per_row_and_wide_enough(case):
    name, options = CASES[case]
    loss = LOSSES[name]
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        tensors = inputs_of(loss, spread=60.0, dtype=dtype)  # so far apart that 16 bits cannot hold the differences
        got = loss.function(**tensors, **options)
        assert got.shape == (ROWS,)
        assert got.dtype == want
        # to the bit what the widened inputs give: nothing is computed in 16 bits
        wide = {key: value.to(want) if value.is_floating_point() else value for key, value in tensors.items()}
        assert torch.equal(got, loss.function(**wide, **options))


@pytest.mark.parametrize("case", CASES)
def test_gradient_by_finite_differences(case):
    name, options = CASES[case]
    if name in STOPPED:
        pytest.skip("part of the gradient is stopped: test_sail.py, test_policy_gradient.py")
    loss = LOSSES[name]
    tensors = inputs_of(loss)
    if name == "kto":
        tensors["kl_baseline"] = torch.tensor(0.5, dtype=torch.float64)
    leaves = policy_names(tensors)

    def function(*policy):
        return loss.function(**{**tensors, **dict(zip(leaves, policy, strict=True))}, **options)

    assert torch.autograd.gradcheck(function, [tensors[key].requires_grad_() for key in leaves])


@pytest.mark.parametrize("case", CASES)
def test_constants_take_no_gradient(case):
    name, options = CASES[case]
    tensors = inputs_of(LOSSES[name])
    for value in tensors.values():
        value.requires_grad_(value.is_floating_point())
    LOSSES[name].function(**tensors, **options).sum().backward()
    for key, value in tensors.items():
        assert (value.grad is not None) == key.startswith("policy_"), key


def same_item(loss):
    """(ROWS, ROWS) bool: rows that may feel each other's log-probs in their gradient, by the declared class."""
    if loss.pass_class == "D":
        return torch.ones(ROWS, ROWS, dtype=torch.bool)
    if loss.item == "group":
        return GROUP_IDS[:, None] == GROUP_IDS
    return torch.eye(ROWS, dtype=torch.bool)


@pytest.mark.parametrize("case", CASES)
def test_pass_class_is_true(case):
    """A: the gradient does not know the log-probs. C: it does, within the item. D: across the batch as well."""
    loss = LOSSES[CASES[case][0]]
    felt = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    for seed in range(8):  # a hinge is flat in places
        tensors = inputs_of(loss, seed)
        base = policy_gradient(case, tensors)
        for key in base:
            for row in range(ROWS):
                moved = {**tensors, key: tensors[key].clone()}
                moved[key][row] += 8.0
                after = policy_gradient(case, moved)
                for name in base:
                    felt[:, row] |= (after[name] - base[name]).abs() > 1e-9 * base[name].abs().max()
    allowed = same_item(loss)
    if loss.pass_class == "A":
        assert not felt.any()
        return
    assert not felt[~allowed].any(), "coupled beyond its item: a stronger class"
    alone = torch.tensor([(allowed[row].sum() == 1).item() for row in range(ROWS)])
    own = felt.diagonal() | (alone if loss.item == "group" else False)  # a group of one has nothing to compare
    assert own.all(), "constant: a weaker class would do"
    if allowed.sum() > ROWS:
        others = felt[allowed & ~torch.eye(ROWS, dtype=torch.bool)].any()
        assert others != (loss.name == "nca"), "rows do not feel each other"  # NCA's do by their rewards alone


@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_nats(case):
    name, options = CASES[case]
    loss = LOSSES[name]
    extremes = torch.tensor([-1e4, 0.0, -1e4, -1.0, 0.0, -1e4])
    for dtype in (torch.float32, torch.float64):
        tensors = inputs_of(loss, dtype=dtype)
        for turn, key in enumerate(tensors):
            if key.endswith("logp"):  # margins of +-1e4 and +-2e4, and of 0
                tensors[key] = extremes.roll(turn).to(dtype)
        got = loss.function(**tensors, **options)
        assert got.isfinite().all()
        for key, gradient in policy_gradient(case, tensors).items():
            assert gradient.isfinite().all(), key


@pytest.mark.parametrize("case", CASES)
def test_a_rank_without_rows(case):
    name, options = CASES[case]
    tensors = {key: value[:0] for key, value in inputs_of(LOSSES[name]).items()}
    assert LOSSES[name].function(**tensors, **options).shape == (0,)
    assert all(gradient.shape == (0,) for gradient in policy_gradient(case, tensors).values())


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_option_is_checked(case):
    name, options = CASES[case]
    loss = LOSSES[name]
    tensors = inputs_of(loss)
    unused = (
        options.get("token_reduction", "mean" if name in ("ipo", "simpo", "orpo", "gspo", "iw_sft") else "sum") == "sum"
    )
    used = {key: value for key, value in tensors.items() if not (unused and key.endswith("lengths"))}
    for key, value in used.items():
        mistakes = [([0.0] * ROWS, TypeError), (value.cfloat(), TypeError)]
        if key not in loss.optional_tensors:
            mistakes.append((None, (TypeError, ValueError)))
        if len(used) > 1:  # else any number of rows is right
            mistakes.append((value[:2], ValueError))
        for wrong, error in mistakes:
            with pytest.raises(error, match=" must be "):
                loss.function(**{**tensors, key: wrong}, **options)
    for key, value in options.items():
        for wrong in (float("nan"), -1.0) if isinstance(value, float) else ("neither",):
            with pytest.raises(ValueError, match=f"{key} must be "):
                loss.function(**tensors, **{**options, key: wrong})
