"""The GPU measurement, dry: every section on tiny shapes on a CPU, resumable, and honest about failures."""

import csv
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bench, gpu_compare, gpu_providers, gpu_report, gpu_training
from benchmarks.gpu_timing import Bench

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def table(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# dry run on a CPU")
    return list(csv.DictReader(lines[1:]))


def test_dry_run_of_every_section_and_resume(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    script = ROOT / "benchmarks" / "gpu_run.sh"
    first = run("bash", script, "--dry-run", tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    found = {name: table(tmp_path / f"{name}.csv") for name in gpu_bench.ORDER}
    for name, rows in found.items():
        assert not [row for row in rows if row["note"].startswith("failed")], name
    measured = {(row["provider"], row["pass"]) for row in found["compare"] if row["ms"]}
    for provider in ("plain", "ours, one pass", "ours, two passes", "ours, any gradient", "ours, one pass, fast"):
        assert {(provider, name) for name in ("both", "forward", "backward")} <= measured
    assert {("plain", "score"), ("ours, any gradient", "score"), ("ours, with entropy", "score")} <= measured
    assert {row["provider"] for row in found["compare"]} == set(gpu_providers.PROVIDERS)
    assert len(found["primitives"]) >= 12
    assert {row["unit"] for row in found["roofs"]} == {"GB/s", "TFLOP/s"}
    assert {row["layout"] for row in found["batch"] if row["ms"]} == {"padded", "packed"}
    assert {(row["loss_kind"], row["what"]) for row in found["step"]} == {
        (loss, what) for loss in ("plain", "fused") for what in ("step", "largest batch")
    }
    summary = (tmp_path / "summary.md").read_text()
    assert "ours, one pass" in summary
    assert "not measured" in summary
    assert {path.name for path in tmp_path.glob("*.png")} == {"bars.png", "rows.png", "roofline.png"}

    (tmp_path / "roofs.csv").unlink()
    before = (tmp_path / "compare.csv").read_bytes()
    again = run(sys.executable, ROOT / "benchmarks" / "gpu_bench.py", "--dry-run", "--out", tmp_path)
    assert again.stdout.startswith("2 items to measure")
    assert len(table(tmp_path / "roofs.csv")) == 2
    assert (tmp_path / "compare.csv").read_bytes() == before


BROKEN = """
    import os, sys, time
    from benchmarks import gpu_bench
    from benchmarks.gpu_bench import Item

    def raises(bench):
        raise RuntimeError("no such luck")

    def hangs(bench):
        time.sleep(100)

    def fine(bench):
        return [{"ms": 1.5}]

    class Impatient(Item):
        limit = 1.0

    def items(dry_run):
        return [
            Item("roofs", "raises", raises, 0.0),
            Item("roofs", "dies", lambda bench: os._exit(9), 0.0, other=True),
            Impatient("roofs", "hangs", hangs, 0.0),
            Item("roofs", "too long", fine, 1e6),
            Item("roofs", "fine", fine, 0.0),
        ]

    gpu_bench.all_sections = lambda: {"roofs": items}
    sys.exit(gpu_bench.main())
"""


def test_failures_are_reported_and_the_rest_still_runs(tmp_path):
    """An exception, a dead process and one that hangs; what does not fit the time is left for the next call."""
    script = tmp_path / "broken.py"
    script.write_text(textwrap.dedent(BROKEN))
    result = run(sys.executable, script, "--dry-run", "--out", tmp_path / "out")
    rows = {row["key"]: row for row in table(tmp_path / "out" / "roofs.csv")}
    assert rows["raises"]["note"] == "failed: RuntimeError: no such luck"
    assert rows["dies"]["note"] == "failed: the process ended with status 9"
    assert rows["hangs"]["note"] == "failed: no end after 1 s"
    assert rows["fine"]["ms"] == "1.5"
    assert "too long" not in rows
    assert "1 items left for the next call" in result.stdout
    assert result.returncode == 1
    assert "FAILED: roofs raises; roofs hangs" in result.stdout  # another library's failure is only noted

    retried = run(sys.executable, script, "--dry-run", "--out", tmp_path / "out", "--retry", "--plan")
    assert "4 to do" in retried.stdout


POISONED = """
    import sys
    from benchmarks import gpu_bench
    from benchmarks.gpu_bench import Item

    lost = []

    def breaks(bench):
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def fine(bench):
        assert not lost, "the same process"
        return [{"ms": 1.5}]

    gpu_bench.device_answers = lambda bench: not lost
    gpu_bench.all_sections = lambda: {
        "roofs": lambda dry_run: [Item("roofs", "breaks", breaks, 0.0), Item("roofs", "fine", fine, 0.0)]
    }
    sys.exit(gpu_bench.main())
"""


def test_a_lost_device_costs_one_measurement(tmp_path):
    """A kernel that wrote where it must not leaves a process without a device; a new one measures what is left."""
    script = tmp_path / "poisoned.py"
    script.write_text(textwrap.dedent(POISONED))
    result = run(sys.executable, script, "--dry-run", "--out", tmp_path / "out")
    rows = {row["key"]: row for row in table(tmp_path / "out" / "roofs.csv")}
    assert rows["breaks"]["note"] == "failed: RuntimeError: an illegal memory access was encountered"
    assert rows["fine"]["ms"] == "1.5"
    assert result.returncode == 1


def test_the_plan_of_one_call(tmp_path):
    """What a first call wants most fits into its minutes."""
    result = run(sys.executable, ROOT / "benchmarks" / "gpu_bench.py", "--out", tmp_path, "--plan")
    assert result.returncode == 0, result.stderr
    assert {line.split()[0] for line in result.stdout.splitlines()} == set(gpu_bench.ORDER)
    items = [item for section in gpu_bench.all_sections().values() for item in section(False)]
    assert len({(item.section, item.key) for item in items}) == len(items)
    tests, start = 150, 30  # seconds
    assert sum(item.seconds for item in items if item.rank == 0) < 9 * 60 - tests - start
    assert sum(item.seconds for item in items) < 3 * (9 * 60 - start) - tests


def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "out"
    result = run(sys.executable, ROOT / "benchmarks" / "gpu_bench.py", "--out", out, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert "no CUDA device; --dry-run" in result.stderr
    assert not out.exists()


def test_a_first_call_that_fails_ends_the_run(tmp_path):
    """Before the minutes go into tests and measurements that fail for the same reason."""
    result = run("bash", ROOT / "benchmarks" / "gpu_run.sh", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert "the first call on the GPU failed" in result.stderr
    assert "CUDA" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ours, one pass", "ours, any gradient", "ours, frozen head"])
def test_errors_are_measured_against_the_truth(name):
    """The reported errors are small for the right gradients and not for others."""
    bench = Bench(dry_run=True)
    at = gpu_compare.problem(bench, 40, 16, 130, 0.4)
    provider = gpu_providers.PROVIDERS[name]
    hidden, weight, labels, token_weight = at.inputs(provider.weighted)
    loss = provider.loss(hidden, weight, labels, token_weight)
    loss.backward()
    errors = gpu_compare._errors(at, provider, loss)
    assert max(errors.values()) < 1e-2
    with torch.no_grad():
        hidden.grad[at.rows[1]] *= 1.5
        weight.grad[at.ids[0]] += 0.5
    worse = gpu_compare._errors(at, provider, 1.01 * loss)
    assert all(worse[field] > 3 * errors[field] for field in errors)
    gpu_compare.problem.cache_clear()


def test_largest_batch():
    found, note = gpu_training.largest_batch(lambda n: n <= 21, 2, 10.0)
    assert 19 <= found <= 21
    assert note.endswith("do not")
    assert gpu_training.largest_batch(lambda n: True, 2, -1.0)[1].startswith("at least")


def test_batch_labels_are_aligned_with_the_next_token():
    pairs = [(2, 3), (1, 4)]
    padded = gpu_training.batch_labels(pairs, 50, "cpu", packed=False)
    packed = gpu_training.batch_labels(pairs, 50, "cpu", packed=True)
    assert [(row != -100).sum().item() for row in padded] == [3, 4]
    assert padded[0, 0] == -100
    assert packed.shape == (10,)
    assert (packed != -100).sum() == 7
    assert all(p + c <= 1024 for p, c in gpu_training.lengths(1000))


COLUMNS = "key,shape,provider,pass,ms,p20,p80,gemms,gemm_ms,of_gemms,peak_less_gradients_mib,note"


def write(folder, ratio, provider="ours, one pass"):
    folder.mkdir()
    row = f"a,8192x4096x128256,{provider},both,36,35,37,3,33,{ratio},900,"
    (folder / "compare.csv").write_text(
        f"# made up\n{COLUMNS}\n" + row.replace("ours, one pass", '"ours, one pass"') + "\n"
    )
    return folder


@pytest.mark.parametrize(("ratio", "status"), [(1.10, 0), (1.05, 0), (1.14, 0), (1.17, 1)])
def test_gate(tmp_path, ratio, status):
    now, baseline = write(tmp_path / "now", ratio), write(tmp_path / "baseline", 1.10)
    result = run(sys.executable, ROOT / "benchmarks" / "gpu_report.py", now, "--gate", baseline)
    assert result.returncode == status, result.stdout + result.stderr
    assert ("1.100 of the GEMMs before, 1.170 now" in result.stdout) == bool(status)


def test_gate_refuses_what_it_cannot_compare(tmp_path):
    now, baseline = write(tmp_path / "now", 1.0, "plain"), write(tmp_path / "baseline", 1.1)
    assert "not measured now" in gpu_report.gate(now, baseline, 0.05)[0]
    assert "no row of ours" in gpu_report.gate(baseline, now, 0.05)[0]


def test_summary_says_which_bars_are_met(tmp_path):
    text = gpu_report.summary(write(tmp_path / "now", 1.1))
    assert "| one pass, token weights | 8192x4096x128256 | 1.12 | 1.1 | met |" in text
    text = gpu_report.summary(write(tmp_path / "slower", 1.2))
    assert "| one pass, token weights | 8192x4096x128256 | 1.12 | 1.2 | missed |" in text
