"""Every shipped Triton configuration compiles for GPUs that are not here: no spills, shared memory within limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.ranks import HANG

KERNELS = ("row_stats", "row_grad", "row_exp", "pair_", "labels: ", "fused_forward", "merge_splits", "var_weights")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_kernels.py"


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=HANG)


def counted(*command: str) -> dict[str, int]:
    """Configurations that compiled, by kernel; a tile that is for another target has an empty cell."""
    result = run(*command)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = [line for line in result.stdout.splitlines() if "/" in line]
    return {kernel: sum(kernel in line for line in compiled) for kernel in KERNELS}


def test_every_configuration_compiles():
    assert counted(str(SCRIPT), "--targets", "sm_90") == {
        **{"row_stats": 9, "row_grad": 15, "row_exp": 9, "pair_": 21, "labels: ": 12},
        **{"fused_forward": 13, "merge_splits": 2, "var_weights": 2},
    }


@pytest.mark.parametrize(("target", "fused"), [("sm_80", 6), ("sm_100", 10), ("gfx942", 6)])
def test_what_needs_most_compiles_for_others(target, fused):
    """With every option, of fp32 and bf16, and the bare row kernels of fp32: other code. fp16 is compiled as bf16 is,
    and an odd V changes no more than on sm_90.
    """
    chosen = r"every option|fp32, bare(, to bf16)?$|var_weights|fused_forward"
    counts = counted(
        "-c",
        f"import re, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv[1:] = ['--targets', {target!r}];"
        "import compile_kernels as script; full = script.configurations();"
        f"chosen = [c for c in full if re.search({chosen!r}, c.name) and 'fp16' not in c.name];"
        "script.configurations = lambda: chosen;"
        "sys.exit(script.main())",
    )
    assert counts == {
        **{"row_stats": 3, "row_grad": 4, "row_exp": 4, "pair_": 7, "labels: ": 6},
        **{"fused_forward": fused, "merge_splits": 2, "var_weights": 2},
    }


REFUSED = """
import contextlib, io, json, sys
sys.path[:0] = [SCRIPTS, FOLDER]
import compile_kernels as script
from scaled_dot import scaled_dot

full = script.configurations()

def told(target, *cases):
    script.configurations = lambda: cases
    sys.argv[1:] = ["--targets", target]
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        status = script.main()
    return status, errors.getvalue()

found = {"fine": told("sm_90", full[0])}
script.rows_triton.BLOCK_COLUMNS = 1 << 15  # far more than the registers of a program hold
found["spill"] = told("sm_90", script.row_configurations()[0])
script.MATRIX_INSTRUCTIONS["sm_80"] = ("wgmma.mma_async",)
found["no wgmma.mma_async"] = told("sm_80", next(c for c in script.forward_configurations() if "sm_80" in c.targets))
types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
scaled = script.Configuration("scaled dot", scaled_dot, types, {"S": 128}, 4, targets=("sm_90",))
found["wgmma with an operand in registers"] = told("sm_90", scaled)
print(json.dumps(found))
"""


def test_what_must_not_ship_is_noticed(tmp_path):
    """A spill, a missing instruction, and a left operand that was computed on, so that it lies in registers."""
    (tmp_path / "scaled_dot.py").write_text(
        "import triton\n"
        "import triton.language as tl\n"
        "@triton.jit\n"
        "def scaled_dot(a_ptr, b_ptr, c_ptr, S: tl.constexpr):\n"
        "    i = tl.arange(0, S)\n"
        "    at = i[:, None] * S + i[None, :]\n"
        "    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at) * 2, tl.load(b_ptr + at)))\n"
    )
    result = run("-c", REFUSED.replace("SCRIPTS", repr(str(SCRIPT.parent))).replace("FOLDER", repr(str(tmp_path))))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.pop("fine") == [0, ""]
    assert len(found) == 3
    for fault, (status, errors) in found.items():
        assert status == 1, fault
        assert fault in errors


LAUNCHES = """
import sys
sys.path[:0] = [SCRIPTS, ROOT]
import torch
import compile_kernels as script
from var_kernels.kernels import forward_triton, rows_triton
from var_kernels.kernels.rows import LogitTransform, RowCoefficients, RowStats, aligned

launched = {}

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **named):
            given = dict(zip(self.kernel.arg_names, args)) | named
            assert given["enable_fp_fusion"] is True
            launched[self.kernel] = {
                p.name: "plain" if p.do_not_specialize
                else "constant" if given[p.name] == 1 else "aligned" if given[p.name] % 16 == 0 else "plain"
                for p in self.kernel.params
                if not p.is_constexpr and type(given[p.name]) is int
            }
        return launch

kernels = {}
for module, names in ((rows_triton, ("_row_stats_kernel", "_row_grad_kernel", "_row_exp_kernel")),
                      (forward_triton, ("_fused_forward_kernel", "_merge_splits_kernel"))):
    for name in names:
        kernels[name] = getattr(module, name)
        setattr(module, name, Recorder(kernels[name]))

def compiled(prefix):
    "Of the configuration that is named so: how each integer is compiled."
    (found,) = [c for c in all_configurations if c.name == prefix]
    return found.kernel, {
        arg: "constant" if found.constants.get(arg) == 1 and type(found.constants[arg]) is int
        else "aligned" if arg in found.multiples_of_16 else "plain"
        for arg, kind in {**found.types, "K": "i32", "hidden_stride_d": "i32", "weight_stride_d": "i32"}.items()
        if kind in ("i32", "i64") and arg in found.kernel.arg_names
    }

def same(prefix):
    kernel, expected = compiled(prefix)
    found = launched.pop(kernel)
    assert found == expected, f"{prefix}: launched {found}, compiled {expected}"

with_recorders = {}
for name, kernel in kernels.items():
    module = rows_triton if "row_" in name else forward_triton
    with_recorders[name] = getattr(module, name)
    setattr(module, name, kernel)
all_configurations = script.configurations()
for name, recorder in with_recorders.items():
    setattr(rows_triton if "row_" in name else forward_triton, name, recorder)

n = 3
for case, v, targets in (("bare", 128256, 1), ("bare, odd V", 50257, 1), ("every option", 50257, 2)):
    for v_start, stop in ((0, v), (4096, 8192 if case == "bare" else 4096 + 4095)):
        tile = torch.zeros(n, aligned(stop - v_start))[:, : stop - v_start]
        labels = torch.zeros(n, targets, dtype=torch.int64)
        stats = RowStats.empty(n, 1, tile, entropy=False, mean=False, argmax=False)
        rows_triton.row_stats(tile, labels, stats, v_start, None, LogitTransform())
        same(f"row_stats fp32, {case}")
        coefficients = RowCoefficients(torch.ones(n), torch.ones(n, targets))
        norms = torch.ones(2, n)
        rows_triton.row_grad(tile, labels, norms, coefficients, v_start, None, LogitTransform(), torch.bfloat16)
        same(f"row_grad fp32, {case}, to bf16")
        stored = torch.zeros(n, aligned(stop), dtype=torch.bfloat16)[:, :stop]
        stats = RowStats.uninitialised(n, tile, mean=False, argmax=False)
        stats.set_pivots(torch.zeros(n))
        earlier = stored[:, :v_start] if v_start else None
        rows_triton.row_exp(tile, labels[:, :1], stats, v_start, None, LogitTransform(), stored[:, v_start:], earlier)
        same(f"row_exp fp32, {case}, to bf16")

for name, tile in forward_triton.TILES.items():
    for case, (n, d, v, targets) in {"bare": (256, 128, 4096, 1), "every option": (250, 144, 4001, 3)}.items():
        d -= 8 * (name == "small")
        hidden, weight = (torch.zeros(rows, d, dtype=torch.bfloat16) for rows in (n, v))
        stats = RowStats.empty(n, targets, hidden, entropy=False, mean=False, argmax=False)
        labels = torch.zeros(n, targets, dtype=torch.int64)
        forward_triton.fused_forward(hidden, weight, None, labels, stats, LogitTransform(), tile=tile, splits=4)
        same(f"fused_forward bf16, {tile.rows}x{tile.columns}x{tile.depth} ({name}), {case}")
        if case == "bare":
            same("merge_splits 8, every option")

# Another number of rows compiles nothing.
for module in (rows_triton, forward_triton, script.labels_triton, script.pairs_triton, script.weights_triton):
    for name, kernel in {**vars(module), **kernels}.items():
        for p in getattr(kernel, "params", ()) if name.endswith("_kernel") else ():
            assert p.do_not_specialize or p.name not in ("n", "N", "S", "B", "T", "state_stride"), (name, p.name)

# Known spills are of kernels that there are, and may not grow; what is not listed keeps none.
(known, most), *_ = script.KNOWN_SPILLS.items()
assert script.spills_too_much(*known, most + 4) and not script.spills_too_much(*known, most)
assert script.spills_too_much("3.6", *known[1:], 4) and not script.spills_too_much("3.6", *known[1:], 0)
names = {c.name for c in all_configurations}
assert {name for _, _, name in script.KNOWN_SPILLS} <= names, names
assert max(script.KNOWN_SPILLS.values()) <= 64
print("all", flush=True)
"""


def test_what_is_compiled_is_what_is_launched():
    """Triton compiles an integer that is 1, or a multiple of 16, apart: real launches have those of the table. So have
    the known spills.
    """
    script = LAUNCHES.replace("SCRIPTS", repr(str(SCRIPT.parent))).replace("ROOT", repr(str(SCRIPT.parents[1])))
    result = run("-c", script)
    assert result.stdout == "all\n", result.stdout + result.stderr
