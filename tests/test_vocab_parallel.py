"""A vocabulary spread over two and three ranks, in slices of different size: forward and backward equal one process."""

import contextlib
import functools
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kl_cases import KLCase
from tests.op_cases import Case
from tests.ranks import run_ranks
from tests.tolerance import assert_gradient, assert_result
from var_kernels import linear_logprob, linear_token_kl
from var_kernels.kernels import rows_native, rows_torch
from var_kernels.ops import checks, plan, vocab_parallel, vocab_parallel_logprob, vocab_parallel_token_kl
from var_kernels.ops.backend import use_backend
from var_kernels.ops.signatures import DIRECTIONS
from var_kernels.reference import linear_logprob_ref, linear_token_kl_ref

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
OTHER_SPLITS = {2: (500, 3), 3: (100, 300, 60)}  # rank 0 has as many rows
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


KL_CASES = [
    KLCase("plain"),
    KLCase("every option", Case("", bias=True, options={"softcap": 5.0, "temperature": 1.3}), ref_bias=True,
           ref_options={"softcap": 3.0}, ref_factors=torch.float32, factors=torch.float32),
    KLCase("below zero", Case("", bias=True, offset=-1e4), ref_bias=True),
    KLCase("confident", Case("", logits=30.0)),
    KLCase("ragged tiles", Case("", bias=True), workspace_mb=0.15),
    KLCase("bf16", Case("", dtype=torch.bfloat16)),
    KLCase("frozen weight", Case("", frozen=("weight",))),
    KLCase("all ignored", Case("", ignored=1.0)),
]  # fmt: skip


@contextlib.contextmanager
def small_tiles():
    with mock.patch.multiple(plan, _MIN_COLUMNS=50, _MIN_ROWS=4), mock.patch.object(rows_torch, "BLOCK_ELEMENTS", 700):
        yield


def run_kl(op, case, direction, rows=slice(None), dtype=None, **options):
    """Values and gradients; ``rows`` of the vocabulary of everything that has one."""
    hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias = case.inputs("cpu")
    left, right, ref_left, ref_right = case.low_rank("cpu")

    def leaf(t, learns=False, spread=True):
        if t is None:
            return None
        t = t.detach()[rows].clone() if spread else t.detach()
        return t.to(dtype or t.dtype).requires_grad_(learns)

    leaves = {"dhidden": leaf(hidden, True, False), "dweight": leaf(weight, weight.requires_grad)}
    leaves |= {"dbias": leaf(bias, True), "dleft": leaf(left, True, False), "dright": leaf(right, True)}
    given = (leaves["dhidden"], leaves["dweight"], leaf(ref_hidden, spread=False), leaf(ref_weight), labels)
    if left is not None:
        options |= {"low_rank": (leaves["dleft"], leaves["dright"])}
        options |= {"ref_low_rank": (leaf(ref_left, spread=False), leaf(ref_right))}
    options |= {**case.policy.options, **{f"ref_{name}": value for name, value in case.ref_options.items()}}
    if dtype is None and case.workspace_mb is not None:
        options["workspace_mb"] = case.workspace_mb
    value = op(*given, leaves["dbias"], leaf(ref_bias), direction=direction, beta=0.3, **options)
    (value * torch.linspace(-1, 2, labels.numel(), dtype=value.dtype)).sum().backward()
    return value.detach(), {name: t.grad for name, t in leaves.items() if t is not None}


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
        for kl_case, direction in itertools.product(KL_CASES if name == "plain" else (), DIRECTIONS):
            op = functools.partial(vocab_parallel_token_kl, process_group=dist.group.WORLD)
            with use_backend(backend), small_tiles():
                results[kl_case.id, direction, backend] = run_kl(op, kl_case, direction, rows)
    results["bytes"] = bytes_sent(rows)
    for direction in DIRECTIONS:
        op = functools.partial(vocab_parallel_token_kl, process_group=dist.group.WORLD)
        with counted() as results["bytes", direction]:
            results["forbidden", direction] = forbidden(op, direction, rows)
    hidden, weight, labels, _ = Case("").inputs()
    labels[3] = 507
    try:
        vocab_parallel_logprob(hidden, weight.detach()[rows], labels, process_group=dist.group.WORLD)
    except ValueError as error:
        results["refusal"] = str(error)
    results["DTensor"] = refused_dtensors(world)
    results["accelerator"] = on_an_accelerator(rank, world)
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


class HostReads(TorchDispatchMode):
    """``count``: numbers of tensors that the block reads, and lists that it would copy to the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "index", "index_put_")
        return func(*args, **(kwargs or {}))


def on_an_accelerator(rank, world):
    """Where values are not free to read: log-probs of two heads of one group in turn, equal on rank 0 in size; host
    reads for a rank's place and for divergences; what each rank is told where the last one has no rows.
    """
    hidden, weight, labels, _ = Case("").inputs()

    def logprob(sizes):
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        known = labels.where(labels < sum(sizes), -100)
        return vocab_parallel_logprob(hidden, weight[rows], known, process_group=dist.group.WORLD).detach()

    with (
        mock.patch.object(vocab_parallel, "values_readable", return_value=False),
        mock.patch.object(checks, "check_values"),
    ):
        heads = [logprob(sizes) for sizes in (SPLITS[world], OTHER_SPLITS[world], SPLITS[world])]
        _, own, _, _, ref_hidden, ref_weight, _ = KLCase("", Case("", ignored=0.0)).inputs("cpu")
        with HostReads() as reads:
            start, _ = vocab_parallel._place(weight[: 3 + rank], dist.group.WORLD)
            for direction in DIRECTIONS:
                given = hidden, own[rank::world], ref_hidden, ref_weight[rank::world]
                vocab_parallel_token_kl(*given, direction=direction, process_group=dist.group.WORLD)
        try:
            logprob((*SPLITS[world][:-1], 0))
        except (ValueError, RuntimeError) as refused:
            error = f"{type(refused).__name__}: {refused}"
    return heads, int(start), reads.count, error


@contextlib.contextmanager
def counted():
    """Bytes of the all-reduces in the block."""
    sent, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counting):
        yield sent


def bytes_sent(rows):
    """Of the all-reduces of a forward, and of its backward, without ignored rows."""
    hidden, weight, labels, _ = Case("", ignored=0.0).inputs()
    with counted() as sent:
        logp = vocab_parallel_logprob(hidden, weight[rows], labels, process_group=dist.group.WORLD)
        forward = len(sent)
        logp.sum().backward()
    return sent[:forward], sent[forward:]


def forbidden(op, direction, rows=slice(None)):
    """Both models forbid what is the last rank's slice."""
    hidden, weight, labels, _, ref_hidden, ref_weight, _ = KLCase("", Case("", ignored=0.0)).inputs("cpu")
    bias = torch.zeros(507).index_fill(0, torch.arange(500, 507), -torch.inf)[rows]
    given = (hidden, weight[rows], ref_hidden, ref_weight[rows], labels, bias, bias)
    value = op(*given, direction=direction)
    return value.detach(), torch.autograd.grad(value.sum(), hidden)[0]


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
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", KL_CASES, ids=lambda case: case.id)
def test_kl_equals_one_process(ranks, case, direction, backend, world):
    truth, expected = run_kl(linear_token_kl_ref, case, direction, dtype=torch.float64)
    with small_tiles():  # as the ranks had
        _, own = run_kl(linear_token_kl, case, direction)
    results = [found[case.id, direction, backend] for found in ranks[world]]
    for value, _ in results:
        assert_result(value, truth, "KL", case.policy.largest_logit)
        assert torch.equal(value, results[0][0])
    for which, grad in expected.items():
        if grad is None:
            continue
        parts = [gradients[which] for _, gradients in results]
        for got in parts if which in ("dhidden", "dleft") else [torch.cat(parts)]:
            dtype = got.dtype if which in ("dleft", "dright") else case.policy.dtype
            assert_gradient(got.to(dtype), grad, own[which], which)


@pytest.mark.parametrize("world", SPLITS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_where_a_rank_has_forbidden_tokens_alone(ranks, direction, world):
    expected = forbidden(linear_token_kl, direction)
    for found in ranks[world]:
        torch.testing.assert_close(found["forbidden", direction], expected)


@pytest.mark.parametrize("world", SPLITS)
def test_what_is_sent_is_what_the_docs_say(ranks, world):
    hidden, _, _labels, _ = Case("").inputs()
    n, d = hidden.shape
    for found in ranks[world]:
        assert found["bytes"] == ([4 * n, 4 * n * 3], [4 * n * d])
        for direction in DIRECTIONS:  # statistics are fp64 on a CPU
            mixture = [8 * n * 2] if direction == "jsd" else []
            assert found["bytes", direction] == [8 * n * 2, 8 * n * 3, *mixture, 4 * n * d]


@pytest.mark.parametrize("world", SPLITS)
def test_every_rank_has_the_same_results(ranks, world):
    for name, backend in itertools.product(CASES, BACKENDS):
        first = ranks[world][0][name, backend]
        for other in ranks[world][1:]:
            assert all(torch.equal(a, b) for a, b in zip(first[0], other[name, backend][0], strict=True))


@pytest.mark.parametrize("world", SPLITS)
def test_an_accelerator_is_not_waited_for_and_heads_may_change(ranks, world):
    hidden, weight, labels, _ = Case("").inputs()
    for rank, found in enumerate(ranks[world]):
        heads, start, reads, error = found["accelerator"]
        assert (start, reads) == (sum(range(3, 3 + rank)), 0)
        for logp, sizes in zip(heads, (SPLITS[world], OTHER_SPLITS[world], SPLITS[world]), strict=True):
            v = sum(sizes)
            truth = linear_logprob_ref(hidden.double(), weight[:v].double(), labels.where(labels < v, -100))
            assert_result(logp, truth, f"{sizes}")
        assert "lm_head_weight must hold rows on every rank of process_group" in error
        if rank == world - 1:
            assert error.startswith("ValueError")
            assert str([*SPLITS[world][:-1], 0]) in error


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
