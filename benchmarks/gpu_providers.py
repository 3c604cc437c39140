"""The sides of the comparison: each takes hidden, weight, labels and token weights and gives a scalar loss."""

import functools
import importlib.util

import torch
import torch.nn.functional as F

from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.measure import peak_extra_bytes

MIB = 2**20
SAMPLE = 64


def plain(hidden, weight, labels, token_weight):
    """As transformers computes it: all logits, upcast."""
    return (F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none") * token_weight).sum()


def bare_gemms(count):
    """What no implementation can beat: the forward, dH and dW products alone (and the recomputed logits)."""

    def run(hidden, weight, labels, token_weight):
        with torch.no_grad():
            logits = hidden @ weight.T
            for _ in range(count - 3):
                torch.mm(hidden, weight.T, out=logits)
            if count >= 2:
                logits @ weight
            if count >= 3:
                logits.T @ hidden

    return run


def ours(engine, precision="fp32"):
    def run(hidden, weight, labels, token_weight):
        return linear_weighted_nll(hidden, weight, labels, token_weight, engine=engine, precision=precision)

    return run


def ours_any_gradient(hidden, weight, labels, token_weight):
    return -(linear_logprob(hidden, weight, labels) * token_weight).sum()


def liger(hidden, weight, labels, token_weight):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")


def cce(hidden, weight, labels, token_weight):
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(hidden, weight, labels, reduction="none") * token_weight).sum()


def torch_own(hidden, weight, labels, token_weight):
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def providers(on_cpu: bool) -> dict:
    found = {
        "ours, one pass": ours("one_pass"),
        "ours, two passes": ours("two_pass"),
        "ours, any gradient": ours_any_gradient,
        "ours, one pass, fast": ours("one_pass", "fast"),
        "plain": plain,
    }
    if not on_cpu:
        found["torch.compile"] = torch.compile(plain)
        others = {"liger": ("liger_kernel", liger), "cce": ("cut_cross_entropy", cce)}
        found |= {name: run for name, (module, run) in others.items() if importlib.util.find_spec(module)}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = torch_own
    return found


def _truth(hidden, weight, labels):
    """log-probs of the sampled rows in fp64."""
    logits = hidden[:SAMPLE].double() @ weight.double().T
    return logits.log_softmax(-1).gather(-1, labels[:SAMPLE, None]).squeeze(-1)


def compare_shape(bench, n: int, d: int, v: int) -> list[dict]:
    """One row a provider; those that fail say why, bare GEMMs give the roof."""
    hidden = bench.randn(n, d).requires_grad_()
    weight = bench.randn(v, d, scale=3 / d**0.5).requires_grad_()
    labels = torch.randint(0, v, (n,), device=bench.device)
    token_weight = torch.rand(n, device=bench.device)
    inputs = (hidden, weight, labels, token_weight)

    def training(run):
        def step():
            hidden.grad = weight.grad = None
            run(*inputs).backward()

        return step

    def scoring():
        with torch.no_grad():
            linear_logprob(hidden, weight, labels)

    shape = f"{n}x{d}x{v}"
    rows, steps = [], {}
    for name, run in providers(bench.dry_run).items():
        step = training(run)
        try:
            step()
        except Exception as error:  # another library, or memory: the rest still counts
            rows.append({"shape": shape, "provider": name, "note": f"{type(error).__name__}: {error}"[:200]})
            torch.cuda.empty_cache()
            continue
        steps[name] = step
    frozen = weight.detach()

    def frozen_head():
        hidden.grad = None
        ours_any_gradient(hidden, frozen, labels, token_weight).backward()

    steps["ours, frozen head"] = frozen_head
    steps["ours, forward"] = scoring
    memory = {}
    for name, step in steps.items():
        hidden.grad = weight.grad = None
        memory[name] = peak_extra_bytes(step, bench.device) / MIB
    hidden.grad = weight.grad = None
    steps |= {f"bare GEMMs, {count}": functools.partial(bare_gemms(count), *inputs) for count in (1, 2, 3, 4)}
    timings = bench.times(steps, 10 if n * d * v < 6e12 else 5)
    with torch.no_grad():
        error = (
            linear_logprob(hidden[:SAMPLE], weight, labels[:SAMPLE]).double() - _truth(hidden, weight, labels)
        ).abs()
    for name, timing in timings.items():
        row = {"shape": shape, "provider": name, **timing, "peak_mib": memory.get(name, ""), "note": ""}
        if name == "ours, forward":
            row["note"] = f"logp error {error.max().item():.2e}"
        rows.append(row)
    return rows
