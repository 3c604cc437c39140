"""Records a hash of every output and gradient of the ops, to show that a change of structure changes no bit.

    python -m tests.record_bits write before.json      on the commit before
    python -m tests.record_bits compare before.json    on the one after: lists what differs, exit status 1

Cases: those of op_cases.py in a vocabulary of several slices; plain torch, C++ at each level of instructions, Triton
interpreted; budgets of a few rows, of the default and of all logits; eager, and traced by torch.compile. ``--only``
takes the records whose name holds a text.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from tests.op_cases import BF16, CASES, Case
from var_kernels import linear_logprob, linear_token_kl, linear_token_loss, linear_weighted_nll
from var_kernels.kernels import gemm_native, rows_native
from var_kernels.ops.ava_literal import linear_prob_lse
from var_kernels.ops.backend import use_backend

SHAPE = (210, 40, 4001)
BUDGETS = {"tiny": 2.2, "default": None, "all": 256}
KL_CASES = [Case("plain"), Case("softcap", options={"softcap": 5.0}), Case("bf16", dtype=BF16, bias=True)]
LOSS_CASES = [*KL_CASES, Case("frozen head", frozen=("weight",)), Case("fp16", dtype=torch.float16)]
COMPILED_CASES = [*LOSS_CASES, Case("bias", bias=True, outputs=("lse", "entropy", "argmax"))]


def logprob(case: Case, hidden, weight, labels, bias, budget):
    asked = {f"return_{name}": True for name in case.outputs}
    return linear_logprob(hidden, weight, labels, bias, workspace_mb=budget, **asked, **case.options)


def weighted_nll(engine: str):
    def run(case: Case, hidden, weight, labels, bias, budget):
        token_weight = (labels % 7 - 2.5) / 3
        options = {"engine": engine, "workspace_mb": budget, "z_loss": 0.01, **case.options}
        return linear_weighted_nll(hidden, weight, labels, token_weight, bias, **options)

    return run


def token_loss(engine: str):
    def run(case: Case, hidden, weight, labels, bias, budget):
        def clipped(logp, entropy):
            return -logp.exp().clamp(max=1.2) - 0.01 * entropy

        options = {"engine": engine, "workspace_mb": budget, **case.options}
        return linear_token_loss(hidden, weight, labels, clipped, (), bias, entropy=True, **options)

    return run


def token_kl(direction: str):
    def run(case: Case, hidden, weight, labels, bias, budget):
        ref_hidden, ref_weight = (t.detach().roll(1, 0) for t in (hidden, weight))
        options = {"direction": direction, "workspace_mb": budget, **case.options}
        return linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, bias=bias, **options)

    return run


def prob_lse(case: Case, hidden, weight, labels, bias, budget):
    return linear_prob_lse(hidden, weight, labels, bias, alpha=2.0, workspace_mb=budget, **case.options)


def calls() -> Iterator[tuple]:
    """(name, op, case) of every call."""
    yield from (("logprob", logprob, case) for case in CASES)
    for engine in ("one_pass", "two_pass"):
        yield from ((f"weighted_nll {engine}", weighted_nll(engine), case) for case in CASES)
        single = [case for case in LOSS_CASES if case.targets == 1]
        yield from ((f"token_loss {engine}", token_loss(engine), case) for case in single)
    for direction in ("reverse", "forward"):
        yield from ((f"token_kl {direction}", token_kl(direction), case) for case in KL_CASES)
    yield from (("prob_lse", prob_lse, case) for case in KL_CASES)


def backends() -> Iterator[tuple[str, str, int | None, int | None]]:
    """(name, backend, level of the row kernels, level of the GEMM)."""
    yield "torch", "torch", None, None
    if rows_native.obstacle() is None:
        for level in range(rows_native.best_level() + 1):
            yield f"native rows {level}", "native", level, 0
        for level in gemm_native.levels():
            yield f"native gemm {level}", "native", None, level
    yield "triton", "triton", None, None


def digest(tensors) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(b"none" if t is None else str((t.dtype, tuple(t.shape))).encode())
        if t is not None:
            found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return found.hexdigest()[:16]


def record(op, case: Case, budget: float | None) -> str:
    """The hash of outputs and gradients under a non-uniform upstream gradient, or why the call was refused."""
    hidden, weight, labels, bias = case.inputs()
    if case.targets > 1 and op is prob_lse:
        return "skipped"
    try:
        return digest(outputs_and_gradients(op, case, (hidden, weight, labels, bias), budget))
    except ValueError as error:
        return f"refused: {str(error)[:40]}"


def outputs_and_gradients(op, case: Case, inputs, budget: float | None) -> list:
    hidden, weight, _, bias = inputs
    outputs = op(case, *inputs, budget)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    total = 0.0
    for output in outputs:
        if output.is_floating_point() and output.requires_grad:
            upstream = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
            total = total + (output * upstream).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else []
    return [*outputs, *gradients]


def records(only: str) -> Iterator[tuple[str, str]]:
    for backend, name, rows_level, gemm_level in backends():
        rows_native.LEVEL, gemm_native.LEVEL = rows_level, gemm_level
        for (op_name, op, case), budget in product(calls(), BUDGETS):
            interpreted = backend == "triton"
            if interpreted and (case.dtype in (torch.float64, BF16, torch.float16) or budget == "default"):
                continue
            shape = SHAPE if case.shape[0] > 1 and case.shape[2] > 3 else case.shape
            case = replace(case, shape=(12, *shape[1:]) if interpreted and shape == SHAPE else shape)
            key = f"{backend} | {op_name} | {case.id} | {budget}"
            if only in key:
                with use_backend(name):
                    yield key, record(op, case, BUDGETS[budget])
    rows_native.LEVEL = gemm_native.LEVEL = None
    for op_name, op, case in calls():
        key = f"compiled | {op_name} | {case.id}"
        if case in COMPILED_CASES and only in key and not op_name.startswith("token_loss"):
            torch._dynamo.reset()
            compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
            yield key, record(compiled, replace(case, shape=SHAPE), 2.2)


def main() -> int:
    parser = argparse.ArgumentParser(description="hashes of every output and gradient of the ops")
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    found = dict(records(arguments.only))
    if arguments.action == "write":
        with open(arguments.file, "w") as file:
            json.dump(found, file, indent=0)
        print(f"{len(found)} records written")
        return 0
    with open(arguments.file) as file:
        before = {key: value for key, value in json.load(file).items() if arguments.only in key}
    different = [key for key in before if before[key] != found.get(key)]
    print(*different, sep="\n")
    print(f"{len(before) - len(different)} of {len(before)} records have the same bits")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
