"""Every shipped Triton configuration compiles for GPUs that are not here: no spills, shared memory within limits."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_kernels.py"


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_configuration_compiles(target):
    result = run(str(SCRIPT), "--targets", target)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("row_stats") == 6
    assert result.stdout.count("row_grad") == 10


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
