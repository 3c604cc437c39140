"""What needs a GPU's size or its stream: real heads, offsets beyond 2^31, graphs, synchronisations, determinism.

Each body runs on the CPU too, on a shape that is small there.
"""

import pytest
import torch

from var_kernels import linear_logprob, linear_token_loss, linear_weighted_nll
from var_kernels.reference import linear_logprob_ref

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")]
REAL = [(2048, 4096, 128256), (1024, 896, 151936), (1000, 2304, 50257), (1, 4096, 128256), (17, 2048, 151936)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def problem(device, n, d, v, dtype=torch.bfloat16, logits=3.0, grad=True):
    """hidden, lm_head_weight, labels; logits of about the given size, a third of the rows ignored."""
    generator = torch.Generator(device).manual_seed(n + d + v)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    hidden = randn(n, d).to(dtype).requires_grad_(grad)
    weight = (randn(v, d) * (logits / d**0.5)).to(dtype).requires_grad_(grad)
    labels = torch.randint(0, v, (n,), generator=generator, device=device)
    return hidden, weight, labels.where(randn(n) < 0.43, -100)


def shape_here(device, real, small=(63, 72, 507)):
    return real if device == "cuda" else small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=lambda s: "x".join(map(str, s)))
def test_real_heads(device, shape, dtype):
    """Log-probs of a sample of rows against fp64, and both engines' gradients against each other."""
    n, d, v = shape_here(device, shape, (shape[0] % 61 + 1, 72, 507))
    hidden, weight, labels = problem(device, n, d, v, dtype)
    labels[0] = v - 1
    logp = linear_logprob(hidden, weight, labels)
    sample = torch.randperm(n)[:32].to(device)
    with torch.no_grad():
        truth = linear_logprob_ref(hidden[sample], weight, labels[sample])
    assert (logp[sample].double() - truth).abs().max() <= 2**-17 * max(1.0, truth.abs().max().item())

    upstream = torch.linspace(-1, 1, n, device=device)
    two = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))
    one = torch.autograd.grad(
        linear_weighted_nll(hidden, weight, labels, -upstream, engine="one_pass"), (hidden, weight)
    )
    for a, b in zip(one, two, strict=True):
        difference, size = (a.double() - b.double()).norm(), b.double().norm()
        assert a.isfinite().all()
        assert difference <= 2**-7 * size, f"{difference / size:.2g} of the gradient"


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    """N V = 2.6e9 elements of logits: kept as a whole tile where the budget says so, and in slices."""
    n, d, v = 20000, 64, 128256
    hidden, weight, labels = problem("cuda", n, d, v)
    labels[-1] = v - 1
    with torch.no_grad():
        truth = linear_logprob_ref(hidden[-64:], weight, labels[-64:])
    for workspace_mb in (None, 16000, 0):
        with torch.no_grad():
            logp = linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb)
        assert (logp[-64:].double() - truth).abs().max() <= 2**-17 * truth.abs().max(), workspace_mb
    whole = torch.autograd.grad(linear_logprob(hidden, weight, labels, workspace_mb=16000).sum(), (hidden, weight))
    sliced = torch.autograd.grad(linear_logprob(hidden, weight, labels).sum(), (hidden, weight))
    for a, b in zip(whole, sliced, strict=True):
        assert (a.double() - b.double()).norm() <= 2**-7 * b.double().norm()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(device, size):
    n, d, v = shape_here(device, (512, 1024, 50257))
    hidden, weight, labels = problem(device, n, d, v, grad=False)
    bias = torch.full((v,), size, device=device, dtype=torch.bfloat16)
    logp, entropy = linear_logprob(hidden, weight, labels, bias, return_entropy=True)
    truth, true_entropy = linear_logprob_ref(hidden, weight, labels, bias, return_entropy=True)
    assert (logp.double() - truth).abs().max() <= 2**-17 * abs(size)
    assert (entropy.double() - true_entropy).abs().max() <= 2**-17 * abs(size)


@pytest.mark.parametrize("op", ["logprob", "one_pass", "token_loss", "weights"])
def test_twenty_runs_give_the_same_bits(device, op):
    n, d, v = shape_here(device, (1024, 1024, 50257))
    hidden, weight, labels = problem(device, n, d, v)
    upstream = torch.linspace(-1, 1, n, device=device)

    def run():
        if op == "weights":
            from var_kernels import var_weights

            return tuple(var_weights(upstream * 5, upstream.cumsum(0), lam=0.7, normalizer="batch", reference="sum"))
        if op == "logprob":
            loss = (linear_logprob(hidden, weight, labels) * upstream).sum()
        elif op == "one_pass":
            loss = linear_weighted_nll(hidden, weight, labels, upstream, engine="one_pass")
        else:
            loss = linear_token_loss(hidden, weight, labels, lambda logp: -logp.exp(), engine="one_pass")
        return (loss, *torch.autograd.grad(loss, (hidden, weight)))

    first = run()
    for _ in range(19 if device == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_a_step_is_captured_as_a_graph(engine):
    """Replayed with other values in the same tensors, ignored rows elsewhere."""
    n, d, v = 512, 256, 32000
    hidden, weight, labels = problem("cuda", n, d, v)
    static = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(), labels.clone()]

    def step():
        loss = linear_weighted_nll(static[0], static[1], static[2], None, engine=engine)
        return (loss, *torch.autograd.grad(loss, static[:2]))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        with torch.no_grad():
            static[0].copy_(hidden.roll(seed, 0))
            static[2].copy_(labels.roll(seed + 1, 0))
        graph.replay()
        loss = linear_weighted_nll(static[0], static[1], static[2], None, engine=engine)
        for got, expected in zip(captured, (loss, *torch.autograd.grad(loss, static[:2])), strict=True):
            assert (got.double() - expected.double()).norm() <= 2**-7 * expected.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["logprob", "one_pass", "two_pass", "token_loss"])
def test_no_synchronisation_with_a_given_count(op):
    hidden, weight, labels = problem("cuda", 512, 256, 32000)
    count = int((labels != -100).sum())

    def step(count):
        if op == "logprob":
            loss = linear_logprob(hidden, weight, labels, num_active=count).sum()
        elif op == "token_loss":
            loss = linear_token_loss(hidden, weight, labels, lambda logp: -logp.exp(), num_active=count)
        else:
            loss = linear_weighted_nll(hidden, weight, labels, None, num_active=count, engine=op)
        return torch.autograd.grad(loss, (hidden, weight))

    step(count)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(count)
        with pytest.raises(RuntimeError, match="synchroniz"):
            step(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_memory_stays_within_the_budget(engine):
    """Peak above the inputs and the returned gradients: workspace, and fp32 dH where there are two passes."""
    n, d, v = 4096, 2048, 128256
    hidden, weight, labels = problem("cuda", n, d, v)
    labels.clamp_(min=0)
    workspace = 256 if engine == "two_pass" else 256 + 4 * v * d / 2**20

    def step():
        loss = linear_weighted_nll(hidden, weight, labels, None, engine=engine, workspace_mb=workspace)
        return torch.autograd.grad(loss, (hidden, weight))

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    returned = sum(g.nbytes for g in gradients) / 2**20
    allowed = workspace + returned + (4 * n * d / 2**20 if engine == "two_pass" else 0) + 32
    assert peak <= allowed, f"{peak:.0f} MiB, allowed {allowed:.0f}"
