"""A vocabulary spread over two and three ranks, in slices of different size: forward and backward equal one process."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from tests.op_cases import Case
from tests.ranks import run_ranks
from tests.tolerance import assert_gradient, assert_result
from var_kernels import linear_logprob, linear_token_kl
from var_kernels.kernels import rows_native
from var_kernels.ops import vocab_parallel_logprob
from var_kernels.ops.backend import use_backend
from var_kernels.reference import linear_logprob_ref

ASKED = {"return_lse": True, "return_entropy": True, "return_argmax": True}
CASES = {
    "plain": Case(""),
    "every option": Case("", bias=True, options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3}),
    "several targets": Case("", targets=3),
    "below zero": Case("", bias=True, offset=-1e4),
    "confident": Case("", logits=30.0),
    "bf16": Case("", dtype=torch.bfloat16),
    "frozen weight": Case("", frozen=("weight",)),
    "all ignored": Case("", ignored=1.0),
}
# with factors in fp32, a slice of ``right`` on each rank
CASES |= {f"{name}, low rank": CASES[name] for name in ("plain", "every option", "frozen weight", "bf16")}
SPLITS = {2: (500, 7), 3: (100, 1, 406)}
BACKENDS = ["torch", *([] if rows_native.obstacle() else ["native"])]


def upstream(outputs):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs if t.is_floating_point()]


def tensors_of(name, dtype=None, rows=None):
    """hidden, weight, labels, bias, left, right of a case, leaves; ``rows`` of the vocabulary, None for all of it."""
    case = CASES[name]
    hidden, weight, labels, bias = case.inputs()
    left, right = case.low_rank(torch.float32) if name.endswith("low rank") else (None, None)

    def leaf(t, learns, spread=False):
        if t is None:
            return None
        t = t.detach()[rows].clone() if spread and rows is not None else t.detach()
        return t.to(dtype or t.dtype).requires_grad_(learns)

    weight, bias = leaf(weight, weight.requires_grad, True), leaf(bias, True, True)
    return leaf(hidden, hidden.requires_grad), weight, labels, bias, leaf(left, True), leaf(right, True, True)


def run(op, case, hidden, weight, labels, bias, left, right):
    low_rank = {} if left is None else {"low_rank": (left, right)}
    outputs = op(hidden, weight, labels, bias, **ASKED, **low_rank, **case.options)
    floating = [t for t in outputs if t.is_floating_point()]
    sum((t * g).sum() for t, g in zip(floating, upstream(outputs), strict=True)).backward()
    leaves = {"dhidden": hidden, "dleft": left, "dweight": weight, "dbias": bias, "dright": right}
    return [t.detach() for t in outputs], {name: t.grad for name, t in leaves.items() if t is not None}


def run_rank(rank, world, folder):
    sizes, results = SPLITS[world], {}
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for (name, case), backend in itertools.product(CASES.items(), BACKENDS):
        with use_backend(backend):
            results[name, backend] = run(
                functools.partial(vocab_parallel_logprob, process_group=dist.group.WORLD),
                case,
                *tensors_of(name, rows=rows),
            )
    results["bytes"] = bytes_sent(rows)
    hidden, weight, labels, _ = Case("").inputs()
    labels[3] = 507
    try:
        vocab_parallel_logprob(hidden, weight.detach()[rows], labels, process_group=dist.group.WORLD)
    except ValueError as error:
        results["refusal"] = str(error)
    results["DTensor"] = refused_dtensors(world)
    torch.save(results, f"{folder}/{world}-{rank}.pt")


def refused_dtensors(world):
    hidden, weight, labels, _ = Case("").inputs()
    spread = distribute_tensor(weight.detach(), init_device_mesh("cpu", (world,)), [Shard(0)])
    calls = {
        "logprob": lambda: linear_logprob(hidden, spread, labels),
        "kl": lambda: linear_token_kl(hidden, weight, hidden, spread, labels),
        "low_rank": lambda: linear_logprob(hidden, weight, labels, low_rank=(hidden, spread)),
    }

    def message(call):
        with pytest.raises(TypeError) as refused:
            call()
        return str(refused.value)

    return {name: message(call) for name, call in calls.items()}


def bytes_sent(rows):
    """Of the all-reduces of a forward, and of its backward, without ignored rows."""
    sent, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    hidden, weight, labels, _ = Case("", ignored=0.0).inputs()
    dist.all_reduce = counting
    try:
        logp = vocab_parallel_logprob(hidden, weight[rows], labels, process_group=dist.group.WORLD)
        forward = len(sent)
        logp.sum().backward()
    finally:
        dist.all_reduce = all_reduce
    return sent[:forward], sent[forward:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    for world in SPLITS:
        run_ranks(run_rank, world, folder)
    return {world: [torch.load(folder / f"{world}-{r}.pt") for r in range(world)] for world in SPLITS}


@pytest.mark.parametrize("world", SPLITS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name, backend, world):
    case = CASES[name]
    truth, expected = run(linear_logprob_ref, case, *tensors_of(name, torch.float64))
    _, own = run(linear_logprob, case, *tensors_of(name))
    results = [found[name, backend] for found in ranks[world]]
    for outputs, _ in results:
        for got, true in zip(outputs[:3], truth[:3], strict=True):
            assert_result(got, true, name, case.largest_logit)
        assert torch.equal(outputs[3], truth[3])
    for which, grad in expected.items():
        if grad is None:
            continue
        parts = [gradients[which] for _, gradients in results]
        whole = parts if which in ("dhidden", "dleft") else [torch.cat(parts)]
        for got in whole:
            assert_gradient(got.to(case.dtype), grad, own[which], which)


@pytest.mark.parametrize("world", SPLITS)
def test_what_is_sent_is_what_the_docs_say(ranks, world):
    hidden, _, _labels, _ = Case("").inputs()
    n, d = hidden.shape
    for found in ranks[world]:
        assert found["bytes"] == ([4 * n, 4 * n * 3], [4 * n * d])


@pytest.mark.parametrize("world", SPLITS)
def test_every_rank_has_the_same_results(ranks, world):
    for name, backend in itertools.product(CASES, BACKENDS):
        first = ranks[world][0][name, backend]
        for other in ranks[world][1:]:
            assert all(torch.equal(a, b) for a, b in zip(first[0], other[name, backend][0], strict=True))


def test_labels_beyond_the_whole_vocabulary_are_refused(ranks):
    assert "labels must be in [0, 507)" in ranks[2][1]["refusal"]


def test_a_dtensor_is_refused_by_name(ranks):
    messages = ranks[2][0]["DTensor"]
    for call, name in (("logprob", "lm_head_weight"), ("kl", "ref_lm_head_weight"), ("low_rank", "low_rank's right")):
        assert messages[call].startswith(f"{name} must be a plain tensor, got a DTensor with placements ('S(0)',)")
        assert "full_tensor()" in messages[call]


def test_something_else_than_a_group_is_refused():
    hidden, weight, labels, _ = Case("").inputs()
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup, got int"):
        vocab_parallel_logprob(hidden, weight, labels, process_group=2)
