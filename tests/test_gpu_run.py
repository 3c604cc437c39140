"""The GPU measurement, dry: every section on tiny shapes on a CPU, resumable, and honest about failures."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_run.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def table(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# dry run on a CPU")
    return list(csv.DictReader(lines[1:]))


def test_dry_run_and_resume(tmp_path):
    first = run("--dry-run", str(tmp_path))
    assert first.returncode == 0, first.stderr[-3000:]
    roofs, primitives, compare = (table(tmp_path / f"{name}.csv") for name in ("roofs", "primitives", "compare"))
    assert {row["unit"] for row in roofs} == {"GB/s", "TFLOP/s"}
    assert len(primitives) >= 12
    measured = {row["provider"] for row in compare if not row["note"] or row["note"].startswith("logp error")}
    assert {"plain", "ours, one pass", "ours, two passes", "ours, frozen head", "ours, forward"} <= measured
    assert {f"bare GEMMs, {count}" for count in (1, 2, 3, 4)} <= measured
    assert all(float(row["ms"]) > 0 for row in (*roofs, *primitives))

    (tmp_path / "roofs.csv").unlink()
    before = (tmp_path / "compare.csv").stat().st_mtime_ns
    again = run("--dry-run", str(tmp_path))
    assert "compare: done before" in again.stdout
    assert (tmp_path / "roofs.csv").exists()
    assert (tmp_path / "compare.csv").stat().st_mtime_ns == before


def test_without_a_gpu_it_says_so(tmp_path):
    code = (
        f"import sys; sys.argv = ['x', '--out', {str(tmp_path)!r}]; from benchmarks import gpu_bench; gpu_bench.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2
    assert "no CUDA device; --dry-run" in result.stderr
    assert not list(tmp_path.iterdir())
