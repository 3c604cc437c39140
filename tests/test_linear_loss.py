"""Every loss of the registry from hidden states: equal to full logits, on the engine that its class allows, within the
budget, and refused where it is given something else."""

import inspect

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.tolerance import assert_gradient, assert_result
from var_kernels import linear_loss
from var_kernels.kernels import rows_torch
from var_kernels.losses import LOSSES
from var_kernels.losses.registry import single_name
from var_kernels.measure import peak_extra_bytes
from var_kernels.reference import linear_logprob_ref

B, T, D, V = 8, 7, 24, 507
# For options that have no default.
NEEDED = {"beta": 0.3, "tau": 0.4, "delta": 2.0, "target_weight": 0.2, "gamma": 0.5, "odds_weight": 0.3, "eta": 0.7,
          "reward_temperature": 0.8, "temperature": 9.0, "label_smoothing": 0.1}  # fmt: skip
NAMES = sorted(LOSSES)
ONE_PASS = [name for name in NAMES if LOSSES[name].pass_class in "AB"]
TWO_PASS = [name for name in NAMES if LOSSES[name].pass_class in "CD"]


def problem(name, dtype=torch.float32, b=B, t=T, v=V, d=D):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = randn(b, t, d).to(dtype).requires_grad_()
    weight = (randn(v, d) * 0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (b, t), generator=generator)
    labels[:, :2] = -100
    labels[1::3, 4:] = -100
    wide = torch.promote_types(dtype, torch.float32)
    values = {
        "reward": randn(b),
        "ref_logp": -40 + 3 * randn(b),
        "old_logp": -40 + 3 * randn(b),
        "value": 0.3 * randn(b),
        "group_ids": torch.arange(b) // 4,
        "desirable": randn(b) > 0,
        "sample_weight": randn(b).abs(),
        "advantage": randn(b, t) if LOSSES[name].item == "token" else randn(b),
        "old_token_logp": -8 + randn(b, t),
        "ref_token_logp": -8 + randn(b, t),
        "mu": randn(b, t),
        "log_sigma": 0.2 * randn(b, t),
    }
    inputs = {
        key: x.to(wide) if x.is_floating_point() else x for key, x in values.items() if key in LOSSES[name].inputs
    }
    items = b // 2 if LOSSES[name].item == "pair" else b
    item_weight = (0.5 + randn(items).abs()).to(wide)
    options = {k: NEEDED[k] for k, default in LOSSES[name].options.items() if default is inspect.Parameter.empty}
    return hidden, weight, labels, inputs, item_weight, options


def naive(name, hidden, weight, labels, inputs, item_weight, options, dtype):
    """By full logits and the pure function; per-token losses where labels are ignored count nothing."""
    loss, kept = LOSSES[name], labels != -100
    logp, entropy = linear_logprob_ref(hidden, weight, labels, dtype=dtype, return_entropy=True)
    wide = {key: x.to(logp.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    known = {
        "token_logp": logp,
        "entropy": entropy,
        "policy_logp": logp.sum(1),
        "mask": kept,
        "lengths": kept.sum(1),
        **wide,
    }
    arguments = {}
    for argument in loss.tensors:
        single, row = single_name(argument)
        if single in known:
            arguments[argument] = known[single] if row is None else known[single][row::2]
    items = loss.function(**arguments, **options)
    if loss.item == "token":
        items = items.where(kept, 0.0).sum(1)
    return (items * item_weight.to(items.dtype)).sum()


def gradients(loss, leaves):
    return torch.autograd.grad(1.7 * loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_full_logits(name, dtype):
    hidden, weight, labels, inputs, item_weight, options = problem(name, dtype)
    loss = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)
    assert loss.dtype == dtype
    got = gradients(loss, (hidden, weight))
    truth_leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = naive(name, *truth_leaves, labels, inputs, item_weight, options, torch.float64)
    own_leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    own = naive(name, *own_leaves, labels, inputs, item_weight, options, dtype)
    scale = 40.0 * B  # sums of log-probs of 40 nats
    assert_result(loss / scale, truth / scale, "loss")
    expected, baseline = gradients(truth, truth_leaves), gradients(own, own_leaves)
    for g, t, o in zip(got, expected, baseline, strict=True):
        assert t.abs().max() > 0
        assert_gradient(g, t, o, name)


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", ONE_PASS)
def test_both_engines_serve_classes_a_and_b(name, engine):
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    auto, forced = (
        linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, engine=e, **options)
        for e in ("auto", engine)
    )
    torch.testing.assert_close(forced, auto, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(forced, (hidden, weight)), gradients(auto, (hidden, weight)), strict=True):
        assert_gradient(a, b.double(), b)


@pytest.mark.parametrize("name", TWO_PASS)
def test_one_pass_is_refused_for_classes_c_and_d(name):
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    with pytest.raises(
        ValueError, match=f"engine must be 'auto' or 'two_pass' for '{name}', got 'one_pass'; a gradient of class"
    ):
        linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, engine="one_pass", **options)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_never_materialised(name, monkeypatch):
    """N V = 40 times the budget: forward and backward stay within the budget, the per-token rows and dH."""
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 1 << 14)  # the temporaries of its usual blocks take 2 MiB
    b, t, v, d = 8, 64, 16000, 16
    hidden, weight, labels, inputs, item_weight, options = problem(name, b=b, t=t, v=v, d=d)
    head_options = {"workspace_mb": 1.0}

    def step():
        loss = linear_loss(
            name, hidden, weight, labels, inputs, item_weight=item_weight, head_options=head_options, **options
        )
        return gradients(loss, (hidden, weight))

    peak = peak_extra_bytes(step)
    returned = hidden.nbytes + weight.nbytes
    allowed = returned + 2**20 + 4 * hidden.nbytes + 60 * 8 * b * t
    assert peak <= allowed, f"{peak:,} bytes, allowed {allowed:,}; logits would take {4 * b * t * v:,}"


@pytest.mark.parametrize("name", [n for n in NAMES if LOSSES[n].inputs])
def test_a_missing_input_is_named(name):
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    first = LOSSES[name].inputs[0]
    inputs.pop(first)
    with pytest.raises(ValueError, match=f"'{name}' needs inputs '{first}'"):
        linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)


def call(name="ipo", labels=None, inputs=None, item_weight=None, **options):
    hidden, weight, its_labels, its_inputs, _, needed = problem("ipo")
    return linear_loss(
        name, hidden, weight, its_labels if labels is None else labels, its_inputs if inputs is None else inputs,
        item_weight=item_weight, **{**needed, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "dop"}, "loss must be one of .*, got 'dop'"),
        ({"lam": 1.0}, "options of 'ipo' must be among tau, token_reduction, got 'lam'"),
        ({"softcap": 5.0}, "softcap must be in head_options, got as an option of the loss 'ipo'"),
        ({"engine": "three_pass"}, "engine must be"),
        (
            {"inputs": {"ref_logp": torch.zeros(B), "wage": torch.zeros(B)}},
            "inputs of 'ipo' must be among 'ref_logp', got 'wage'",
        ),
        ({"inputs": [0.0] * B}, "inputs must be a mapping from names to tensors, got list"),
        ({"inputs": {"ref_logp": [0.0] * B}}, r"inputs\['ref_logp'\] must be a tensor, got list"),
        ({"item_weight": torch.ones(B)}, r"item_weight must be \(4,\), one per pair of 'ipo', got \(8,\)"),
        ({"item_weight": torch.ones(B, 1)}, r"item_weight must be \(4,\), one per pair of 'ipo', got \(8, 1\)"),
        ({"labels": torch.zeros(B * T, dtype=torch.int64)}, r"labels must be padded \(B, T\)"),
        ({"tau": -1.0}, "tau must be"),
        ({"labels": [1, 2]}, "labels must be a torch.Tensor, got list"),
        ({"item_weight": [1.0] * 4}, "item_weight must be a torch.Tensor, got list"),
        ({"head_options": ["softcap"]}, "head_options must be a mapping from names to values, got list"),
        ({"label_generator": torch.Generator()}, "label_generator must be None for 'ipo', whose labels are the data's"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(**change)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ppo", {"advantage": torch.ones(1)}, r"advantage'\] must be \(8, 7\), .* or \(8,\), one a row, got \(1,\)"),
        ("ppo", {"old_token_logp": torch.zeros(B)}, r"old_token_logp'\] must be \(8, 7\), one a token, got \(8,\)"),
        ("kto", {"ref_logp": torch.zeros(B - 1)}, r"ref_logp must be \(8,\) like policy_logp, got \(7,\)"),
    ],
)  # fmt: skip
def test_inputs_of_another_shape(name, wrong, message):
    hidden, weight, labels, inputs, _, options = problem(name)
    with pytest.raises(ValueError, match=message):
        linear_loss(name, hidden, weight, labels, {**inputs, **wrong}, **options)


@pytest.mark.parametrize("name", ["dpo", "weighted_bc", "ppo"])
def test_packed_rows_that_do_not_fit(name):
    hidden, weight, labels, inputs, _, options = problem(name)
    inputs = {key: values.flatten() for key, values in inputs.items()}
    rows = (hidden.flatten(0, 1), weight)
    with pytest.raises(ValueError, match="cu_seqlens must increase from 0 to the number of rows, 56, got"):
        linear_loss(name, *rows, labels.flatten(), inputs, cu_seqlens=torch.arange(1, B + 2) * T, **options)
    with pytest.raises(ValueError, match=r"labels must be \(56,\), one label per row of hidden"):
        linear_loss(name, *rows, labels.flatten().view(-1, 1).repeat(1, 2), inputs, **options)


def test_an_odd_number_of_rows_is_no_pairs():
    hidden, weight, labels, _, _, _ = problem("ipo")
    with pytest.raises(ValueError, match="labels must hold pairs, chosen and rejected in turn, got 7 rows"):
        linear_loss("ipo", hidden[:7], weight, labels[:7], {"ref_logp": torch.zeros(7)}, tau=1.0)


def test_a_required_option_has_to_be_given():
    hidden, weight, labels, inputs, _, _ = problem("dpo")
    with pytest.raises(ValueError, match="'dpo' needs beta=, got none; pass it"):
        linear_loss("dpo", hidden, weight, labels, inputs)


@pytest.mark.parametrize("name", ["dpo", "sft", "dft", "exo"])
def test_packed_rows(name):
    """The same sequences without padding."""
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1::3, 4:] = False
    cu_seqlens = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    padded = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)
    packed = linear_loss(
        name, hidden[keep], weight, labels[keep], inputs, item_weight=item_weight, cu_seqlens=cu_seqlens, **options
    )
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "sft", "dft", "grpo"])
def test_log_probs_and_argmax_come_along(name):
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    asked = {"return_logp": True, "return_argmax": True}
    loss, logp, argmax = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **asked, **options)
    truth = linear_logprob_ref(hidden, weight, labels)
    assert not logp.requires_grad
    assert_result(logp, truth, "logp")
    best = (hidden @ weight.T).argmax(-1)
    assert torch.equal(argmax, best.where(labels != -100, -1))
    assert torch.equal(loss, linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options))


def test_policy_labels_swap_whole_pairs():
    """With labels that the policy draws, a pair contributes the loss of one order or the other."""
    hidden, weight, labels, inputs, _, options = problem("sail_dp")
    both = []
    for order in (labels, labels.view(-1, 2, T).flip(1).reshape(B, T)):
        swapped = order is not labels
        states = hidden.view(-1, 2, T, D).flip(1).reshape(B, T, D) if swapped else hidden
        ref = inputs["ref_logp"].view(-1, 2).flip(1).reshape(-1) if swapped else inputs["ref_logp"]
        weights = torch.eye(B // 2)
        both.append([
            linear_loss("sail_dp", states, weight, order, {"ref_logp": ref}, item_weight=w, **options).item()
            for w in weights
        ])  # fmt: skip
    seen = set()
    for seed in range(12):
        for pair, w in enumerate(torch.eye(B // 2)):
            generator = torch.Generator().manual_seed(seed)
            value = linear_loss(
                "sail_dp", hidden, weight, labels, inputs, item_weight=w, label_generator=generator, **options
            ).item()
            distances = [abs(value - both[order][pair]) for order in (0, 1)]
            assert min(distances) < 1e-4
            seen.add((pair, distances.index(min(distances))))
    assert len({order for _, order in seen}) == 2


@pytest.mark.parametrize("name", NAMES)
def test_an_item_of_weight_zero_has_no_part_whatever_its_log_prob(name):
    """The head forbids a label of that item (-inf): the others' loss and gradients are what they are without it."""
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    bias, rows = torch.zeros(V), slice(2, 4) if LOSSES[name].item == "pair" else slice(2, 3)
    item_weight[1 if LOSSES[name].item == "pair" else 2] = 0.0
    labels[labels == 3] = 4
    bias[3] = -torch.inf
    kept = labels.clone()
    labels[rows.start, 3] = 3

    def run(labels):
        loss = linear_loss(name, hidden, weight, labels, inputs, bias, item_weight=item_weight, **options)
        return [loss, *gradients(loss, (hidden, weight))]

    if name == "gvpo":  # the row stays in its prompt's mean, which is infinite
        return
    if LOSSES[name].item == "group":  # the row stays among its prompt's: finite is what it must be
        assert all(values.isfinite().all() for values in run(labels))
        return
    for got, want in zip(run(labels), run(kept), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sail_pp", "sail_pr"])
def test_a_pair_of_weight_zero_is_no_part_of_the_baseline(name):
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    options["baseline"] = "leave_one_out"
    item_weight[1] = 0.0
    kept = torch.tensor([0, 1, 4, 5, 6, 7])
    whole = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)
    others = (hidden[kept], weight, labels[kept], {key: values[kept] for key, values in inputs.items()})
    without = linear_loss(name, *others, item_weight=item_weight[[0, 2, 3]], **options)
    torch.testing.assert_close(whole, without)
    for a, b in zip(gradients(whole, (hidden, weight)), gradients(without, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_under_inference_mode(name):
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    trained = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)
    with torch.inference_mode():
        hidden, weight, labels, inputs, item_weight, options = problem(name)
        loss = linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)
    torch.testing.assert_close(loss, trained)


@pytest.mark.parametrize("name", ["alol_kl", "raft", "dft", "dpo"])
@pytest.mark.parametrize("how", ["reentrant", "checkpoint", "save_on_cpu"])
def test_where_saved_tensors_are_hooked(name, how):
    hidden, weight, labels, inputs, item_weight, options = problem(name)

    def loss(hidden, weight):
        return linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)

    if how == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            hooked = loss(hidden, weight)
    else:
        hooked = checkpoint(loss, hidden, weight, use_reentrant=how == "reentrant")
    hooked.backward()
    for leaf, gradient in zip(
        (hidden, weight), torch.autograd.grad(loss(hidden, weight), (hidden, weight)), strict=True
    ):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_call_parses_no_signature(name, monkeypatch):
    """They are parsed as a loss is registered."""
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    monkeypatch.setattr(inspect, "signature", lambda *_: pytest.fail("a signature is parsed"))
    linear_loss(name, hidden, weight, labels, inputs, item_weight=item_weight, **options)


@pytest.mark.parametrize("name", ["dpo", "grpo", "kto"])
def test_compiled_in_one_graph(name):
    """But for class A, whose weights autograd finds on the way."""
    hidden, weight, labels, inputs, item_weight, options = problem(name)
    torch._dynamo.reset()
    compiled = torch.compile(linear_loss, fullgraph=True, backend="aot_eager")
    got, eager = (
        f(name, hidden, weight, labels, inputs, item_weight=item_weight, **options) for f in (compiled, linear_loss)
    )
    torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(got, (hidden, weight)), gradients(eager, (hidden, weight)), strict=True):
        assert_gradient(a, b.double(), b)
