"""Log-probs at the edge, for every loss of the registry: a label that the policy forbids (-inf) gives the limit and no
NaN, whatever the options leave out; a thousand nats overflow nothing, in any dtype."""

import inspect

import pytest
import torch

from var_kernels.losses import LOSSES

NEEDED = {"beta": 0.3, "tau": 0.4, "delta": 2.0, "target_weight": 0.2, "gamma": 0.5, "odds_weight": 0.3, "eta": 0.7,
          "reward_temperature": 0.8, "temperature": 9.0, "label_smoothing": 0.1}  # fmt: skip
# terms that an option leaves out, and weights that become 0
EDGES = {"label_smoothing": 0.0, "target_weight": 0.0, "odds_weight": 0.0, "squared_coef": 0.0, "score_coef": 0.0,
         "lam": 0.0, "contrast": 0.0, "clip_range": 1.0, "min_prob": 0.0}  # fmt: skip
ROWS, T = 4, 5
HIT = 1  # the row, or token, at the edge


def options_of(loss, edge: bool) -> dict:
    options = {key: NEEDED[key] for key, value in loss.options.items() if value is inspect.Parameter.empty}
    options |= {key: value for key, value in EDGES.items() if edge and key in loss.options}
    return options | ({"gamma": 0.0} if edge and loss.name.startswith("ava") else {})


def inputs_of(loss, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, T) if loss.reads_tokens else (ROWS,)
    tensors = {}
    for name in loss.tensors:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "group_ids":
            tensors[name] = torch.tensor([0, 0, 1, 1])
        elif name in ("desirable", "counted"):
            tensors[name] = torch.tensor([True, False, True, False])
        elif name.endswith("mask"):
            tensors[name] = torch.ones(shape, dtype=torch.bool)
        elif name.endswith("lengths"):
            tensors[name] = torch.tensor([3, 5, 1, 2])
        elif name.endswith("logp"):
            tensors[name] = -(3 + values).abs().to(dtype)
        elif name in ("value", "reward") and loss.name.startswith("alol"):
            tensors[name] = torch.tensor([0.5, 9.0 if name == "value" else 0.2, 0.1, 0.2], dtype=dtype)  # A+ = 0 at HIT
        elif name in ("advantage", "sample_weight"):
            tensors[name] = values.abs().to(dtype)
            tensors[name].view(-1)[HIT] = 0.0 if name == "sample_weight" else -3000.0  # AWR's weight underflows
        elif name != "kl_baseline":
            tensors[name] = values.to(dtype)
    return tensors


def policy_names(loss) -> list[str]:
    known = ("policy_logp", "policy_chosen_logp", "policy_rejected_logp", "policy_target_logp")
    return [name for name in loss.tensors if name in (*known, "token_logp", "chosen_token_logp", "rejected_token_logp")]


def run(loss, options, name, value, dtype=torch.float64):
    tensors = inputs_of(loss, dtype)
    tensors[name].view(-1)[HIT] = value
    leaves = {key: tensors[key].requires_grad_() for key in policy_names(loss)}
    items = loss.function(**tensors, **options)
    gradients = torch.autograd.grad(items.sum(), leaves.values(), allow_unused=True)
    return items.detach(), [gradient for gradient in gradients if gradient is not None]


CASES = [
    (name, argument, edge) for name, loss in LOSSES.items() for argument in policy_names(loss) for edge in (False, True)
]
# Infinities of both signs: a TD error between them, and SAIL's score of a winner that cannot have been drawn. The loss
# is not finite then, which is what stops a training (tests/test_not_finite.py).
NO_LIMIT = {("ava_d", "token_logp"), ("ava_p", "rejected_token_logp"), ("ava_p", "chosen_token_logp"),
            ("sail_pr", "policy_chosen_logp"), ("sail_pp", "policy_chosen_logp"), ("gvpo", "policy_logp")}  # fmt: skip


@pytest.mark.parametrize(("name", "argument", "edge"), CASES)
def test_a_forbidden_label_gives_the_limit(name, argument, edge):
    loss = LOSSES[name]
    options = options_of(loss, edge)
    items, gradients = run(loss, options, argument, -torch.inf)
    limit, _ = run(loss, options, argument, -1e30)
    finite = items.isfinite()
    if not all(gradient.isfinite().all() for gradient in gradients):
        assert not finite.all(), "a gradient that would spoil the weights unseen"
    if (name, argument) in NO_LIMIT and not (edge and EDGES.keys() & loss.options.keys()):
        assert not finite.all()
        return
    assert not items.isnan().any()
    torch.testing.assert_close(items[finite], limit[finite])
    assert (limit[~finite].abs() > 1e20).all()
    assert torch.equal(limit[~finite].sign(), items[~finite].sign())
    assert not any(gradient.isnan().any() for gradient in gradients)
    others = [gradient.flatten()[HIT + 1 :] for gradient in gradients]
    assert all(gradient.isfinite().all() for gradient in others)


@pytest.mark.parametrize(("name", "argument", "edge"), CASES)
def test_nan_is_never_hidden(name, argument, edge):
    """The loss is what stops a training: with a finite one, weights of NaN would train on unseen."""
    loss = LOSSES[name]
    options = options_of(loss, edge)
    items, _ = run(loss, options, argument, torch.nan)
    if items.isfinite().all():  # where the loss gives it no weight
        moved = (run(loss, options, argument, value)[0] for value in (-2.0, -2.5))
        assert torch.equal(*moved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("name", "argument", "edge"), CASES)
def test_a_thousand_nats_overflow_nothing(name, argument, edge, dtype):
    for value in (-1e3, -1e4, 0.0):
        items, gradients = run(LOSSES[name], options_of(LOSSES[name], edge), argument, value, dtype)
        assert items.dtype == torch.float32
        assert items.isfinite().all()
        if dtype != torch.float16:  # whose own range ends at 65504
            assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_nothing_and_one_item(name):
    """No rows at all; and one item alone gives what it gives among others, where the loss does not span the batch."""
    loss = LOSSES[name]
    options, tensors = options_of(loss, False), inputs_of(loss)
    none = loss.function(**{key: value[:0] for key, value in tensors.items()}, **options)
    assert none.shape[0] == 0
    whole = loss.function(**tensors, **options)
    if loss.pass_class == "D":
        tensors["kl_baseline"] = torch.tensor(0.25, dtype=torch.float64)
        whole = loss.function(**tensors, **options)
    size = 2 if loss.item == "group" else 1
    one = {key: value[:size] if value.dim() else value for key, value in tensors.items()}
    torch.testing.assert_close(loss.function(**one, **options), whole[:size])
