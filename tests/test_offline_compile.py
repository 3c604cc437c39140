"""Every shipped Triton configuration compiles for GPUs that are not here: no spills, shared memory within limits."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
KERNELS = ("row_stats", "row_grad", "fused_forward", "merge_splits", "var_weights")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_kernels.py"


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(("target", "fused"), [("sm_80", 7), ("sm_90", 13), ("sm_100", 13), ("gfx942", 7)])
def test_every_configuration_compiles(target, fused):
    result = run(str(SCRIPT), "--targets", target)
    assert result.returncode == 0, result.stderr[-2000:]
    # A tile that is for another target has an empty cell.
    compiled = [line for line in result.stdout.splitlines() if "/" in line]
    count = {kernel: sum(kernel in line for line in compiled) for kernel in KERNELS}
    assert count == {"row_stats": 6, "row_grad": 10, "fused_forward": fused, "merge_splits": 2, "var_weights": 8}


def test_a_spill_is_noticed():
    """Far more columns a program than its registers hold."""
    result = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv[1:] = ['--targets', 'sm_90'];"
        "import compile_kernels as script; script.rows_triton.BLOCK_COLUMNS = 1 << 16;"
        "full = script.configurations(); script.configurations = lambda: full[:1];"
        "sys.exit(script.main())",
    )
    assert result.returncode == 1
    assert "spill" in result.stderr


def test_a_missing_instruction_is_noticed():
    result = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv[1:] = ['--targets', 'sm_80'];"
        "import compile_kernels as script;"
        "script.MATRIX_INSTRUCTIONS['sm_80'] = ('wgmma.mma_async',);"
        "full = script.forward_configurations();"
        "script.configurations = lambda: [c for c in full if 'sm_80' in c.targets][:1];"
        "sys.exit(script.main())",
    )
    assert result.returncode == 1
    assert "no wgmma.mma_async" in result.stderr


def test_an_operand_in_registers_is_noticed(tmp_path):
    """A left operand that was computed on, so that it lies in registers when it is multiplied."""
    kernel = tmp_path / "scaled_dot.py"
    kernel.write_text(
        "import triton\n"
        "import triton.language as tl\n"
        "@triton.jit\n"
        "def scaled_dot(a_ptr, b_ptr, c_ptr, S: tl.constexpr):\n"
        "    i = tl.arange(0, S)\n"
        "    at = i[:, None] * S + i[None, :]\n"
        "    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at) * 2, tl.load(b_ptr + at)))\n"
    )
    result = run(
        "-c",
        f"import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(tmp_path)!r}]; import compile_kernels as script;"
        "from scaled_dot import scaled_dot;"
        "types = {'a_ptr': '*bf16', 'b_ptr': '*bf16', 'c_ptr': '*fp32'};"
        "case = script.Configuration('scaled dot', scaled_dot, types, {'S': 128}, 4, targets=('sm_90',));"
        "script.configurations = lambda: [case]; sys.argv[1:] = ['--targets', 'sm_90'];"
        "sys.exit(script.main())",
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "wgmma with an operand in registers" in result.stderr
