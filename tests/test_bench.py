"""What ``make bench`` and the CPU benchmarks print: names that can be read, memory beside time."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import conftest
from tests.ranks import HANG

ROOT = Path(__file__).parents[1]


def bench(*words: str) -> subprocess.CompletedProcess:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--benchmark-columns=median", *words]
    # Under pytest-xdist the benchmarks would take themselves for one of its workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)


def test_bench_prints_names_memory_and_a_shape_of_ones_own():
    done = bench("--shape", "64,32,3000", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "loss of N tokens, hidden size D, vocabulary V" in done.stdout
    groups = re.findall(r"benchmark '(.*)': (\d) tests", done.stdout)
    kinds = {"loss and gradients": "4", "log-probs alone": "2", "frozen head": "2"}
    wanted = {(f"{k}, N x D x V = 64 x 32 x 3000, {t}", n) for k, n in kinds.items() for t in ("fp32", "bf16")}
    assert set(groups) == wanted
    rows = re.findall(
        r"^(plain|fused[\w, -]*?)(?:, \d+ MiB)? +([\d,]+) MiB +[\d.,]+ \([\d.]+\)", done.stdout, re.MULTILINE
    )
    assert len(rows) == 16
    assert {name.strip() for name, _ in rows} >= {"plain", "fused", "fused, as called", "fused, one pass"}


WRONG = "--shape must be N,D,V: three positive integers, got "


@pytest.mark.parametrize("shape", ["64,32", "64,32,x", "64,32,0", "64,32,-1"])
def test_what_a_shape_must_be(shape):
    config = SimpleNamespace(getoption=lambda _: [shape])
    with pytest.raises(pytest.UsageError, match=f"{WRONG}{shape}$"):
        conftest.pytest_generate_tests(SimpleNamespace(fixturenames=["shape"], config=config))


def test_cpu_losses_prints_what_it_wrote(tmp_path, capsys):
    from benchmarks.cpu_losses import show

    path = tmp_path / "loss-2x3x4-float32.csv"
    path.write_text(
        "# machine\nn,d,v,dtype,provider,mode,ms,p20,p80,of_the_gemms,peak_mib\n"
        "2,3,4,float32,bare GEMMs,forward,10.0,9,11,1.000,0.5\n"
        '2,3,4,float32,"var_kernels, fp32 logits",forward,8.0,7,9,0.800,1.5\n'
    )
    show(path)
    out = capsys.readouterr().out
    assert "2 tokens x 3 hidden x 4 vocabulary, float32" in out
    ours, bare = out.index("var_kernels, fp32 logits"), out.index("bare GEMMs")
    assert ours < bare
    assert re.search(r"var_kernels, fp32 logits +1 +8\.0 +0\.80 +2\n", out)


def test_cpu_losses_takes_turns_between_numbers_of_threads(tmp_path):
    from benchmarks.cpu_losses import MODES

    out = ["--shape", "32,16,100", "--dtype", "float32", "--runs", "1", "--out", str(tmp_path)]
    asked = ["--threads", "1,2", "--busy", "--only", "bare GEMMs,fp32 logits"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_losses", *out, *asked], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "busy-32x16x100-float32.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert {(row["threads"], row["mode"]) for row in rows} == {(t, m) for t in "12" for m in MODES}
    assert all(float(row[column]) >= 0 for row in rows for column in ("ms", "wall_ms", "of_the_gemms", "peak_mib"))
