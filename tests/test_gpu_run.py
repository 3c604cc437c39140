"""The GPU measurement, dry: every section on tiny shapes on a CPU, resumable, and honest about failures."""

import csv
import itertools
import os
import shlex
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import divergences, gpu_bench, gpu_compare, gpu_providers, gpu_report, gpu_training
from benchmarks.gpu_timing import Bench, products_run
from tests.ranks import HANG
from var_kernels.ops.backend import use_backend

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    given = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    given.pop("TRITON_INTERPRET", None)  # of these tests: the other libraries' kernels do not run in it
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HANG, env=given)


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
    at_the_bars_memory = ("ours, one pass, 1.1 GB", "ours, any gradient, 512 MB", "ours, any gradient, 256 MB")
    for provider in (
        "plain",
        "ours, one pass",
        "ours, any gradient",
        "ours, one pass, num_active",
        *at_the_bars_memory,
    ):
        assert {(provider, name) for name in ("both", "forward", "backward")} <= measured
    assert {("plain", "score"), ("ours, any gradient", "score"), ("ours, with entropy", "score")} <= measured
    assert {row["provider"] for row in found["compare"]} == set(gpu_providers.PROVIDERS)
    assert len(found["primitives"]) >= 12
    assert {row["unit"] for row in found["roofs"]} == {"GB/s", "TFLOP/s"}
    assert all(row["queued_ms"] for row in found["compare"] if row["pass"] in ("both", "score") and row["ms"])
    begun = [line.split(" left: ")[1].split()[0] for line in first.stdout.splitlines() if " left: " in line]
    order = "roofs compare masked rowkernels forward primitives crossover compare masked step batch compare"
    assert [name for name, _ in itertools.groupby(begun)] == [*order.split(), "divergence", "hard", "curve"]
    assert {row["provider"] for row in found["divergence"]} == set(divergences.SIDES)
    own = [row for row in found["divergence"] if row["provider"].startswith(("ours", "plain"))]
    assert all(float(row["of_gemms"]) and float(row["dweight_error"]) < 2**-6 for row in own)
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
    assert "\n2 items to measure\n" in again.stdout
    assert len(table(tmp_path / "roofs.csv")) == 2
    assert (tmp_path / "compare.csv").read_bytes() == before


BROKEN = """
    import os, sys, time
    from benchmarks import gpu_bench

    def raises(bench):
        raise RuntimeError("no such luck")

    def hangs(bench):
        time.sleep(100)

    def fine(bench):
        return [{"ms": 1.5}]

    def items(dry_run):
        from benchmarks.gpu_timing import Item

        class Impatient(Item):
            limit = 1.0

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

    lost = []

    def breaks(bench):
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def fine(bench):
        assert not lost, "the same process"
        return [{"ms": 1.5}]

    gpu_bench.device_answers = lambda bench: not lost
    def items(dry_run):
        from benchmarks.gpu_timing import Item

        return [Item("roofs", "breaks", breaks, 0.0), Item("roofs", "fine", fine, 0.0)]

    gpu_bench.all_sections = lambda: {"roofs": items}
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


def planned(*options):
    return gpu_bench.todo(gpu_bench.arguments(["--out", "/nonexistent", "--plan", *options]), gpu_bench.all_sections())


def test_the_plan_of_one_call(tmp_path):
    """A first call has the seconds for the bars, the large tests and what decides the defaults; three have them for all
    but the least telling rows.
    """
    result = run(sys.executable, ROOT / "benchmarks" / "gpu_bench.py", "--out", tmp_path, "--plan")
    assert result.returncode == 0, result.stderr
    assert {line.split()[0] for line in result.stdout.splitlines()[1:]} == set(gpu_bench.ORDER)
    items = planned()
    assert len({(item.section, item.key) for item in items}) == len(items)
    start, scale, tests, call = 60, 60, 150, 9 * 60 - 20  # seconds
    decided = [item for item in items if item.rank == 0 or (item.rank == 1 and item.section != "compare")]
    assert sum(item.seconds for item in decided) < call - start - scale
    assert sum(item.seconds for item in items if item.rank <= 2) < 3 * (call - start) - scale - tests


def test_the_order_of_a_first_call():
    """Roofs; ours at the two shapes of the bars; what decides defaults; a few others there; other shapes; the rest."""
    items = planned()
    compared = [item for item in items if item.section == "compare"]
    bars = ("8192x4096x128256", "8192x896x151936")
    first = [item for item in compared if item.rank == 0]
    assert {item.key.split()[0] for item in first} == set(bars)
    assert not [item for item in first if item.other or " plain" in item.key]
    for provider in (*gpu_providers.OURS, *gpu_providers.PEERS):
        for shape in bars:
            assert next(item.rank for item in compared if item.key == f"{shape} {provider}") <= 1
    assert not [item for item in compared if item.rank <= 1 and item.key.split()[0] not in bars]
    about = [(item.rank, item.section) for item in items]
    assert list(dict.fromkeys(about))[:8] == [
        *((0, name) for name in ("roofs", "compare", "masked")),
        *((1, name) for name in ("rowkernels", "forward", "primitives", "crossover", "compare")),
    ]
    assert {item.rank for item in planned("--rank", "0")} == {0}


def test_rows_at_the_memory_of_the_bars():
    """The budgets of the rows are the bars' bytes; the row kernels and one pass are measured where they may be slow."""
    keys = {item.section: set() for item in planned()}
    for item in planned():
        keys[item.section].add(item.key)
    for shape in ("8192x4096x128256", "8192x896x151936"):
        assert {f"{shape} one_pass {rows}" for rows in (128, 256, 512, 1024, 2048)} <= keys["crossover"]
    given = {}

    def record(name):
        return lambda *tensors, **options: given.update({name: options.get("workspace_mb")}) or tensors[0].sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_providers, "linear_logprob", record("two"))
        patch.setattr(gpu_providers, "linear_weighted_nll", record("one"))
        tensors = (torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.long), torch.ones(3))
        for name, passes, expected in (
            ("ours, one pass, 1.1 GB", "one", 1.1e9 + 4 * 7 * 4),
            ("ours, any gradient, 512 MB", "two", 512e6),
            ("ours, any gradient, 256 MB", "two", 256e6),
        ):
            gpu_providers.PROVIDERS[name].loss(*tensors)
            assert given[passes] * 2**20 == pytest.approx(expected), name


def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "out"
    result = run(sys.executable, ROOT / "benchmarks" / "gpu_bench.py", "--out", out, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert "no CUDA device; --dry-run" in result.stderr
    assert not out.exists()


def test_without_a_gpu_nothing_is_begun(tmp_path):
    """Before the minutes go into tests and measurements that fail for the same reason."""
    result = run("bash", ROOT / "benchmarks" / "gpu_run.sh", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert "no GPU, so nothing was measured" in result.stderr
    assert f"{sys.executable}: torch {torch.__version__} is a build for" in result.stderr
    assert "Traceback" not in result.stderr
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


FAKE_PYTHON = """#!/bin/bash
# Stands for a Python with a GPU: what it is asked to run goes into a log.
case "$*" in
  *gpu_probe.py*)
    echo "probe allocator=${PYTORCH_CUDA_ALLOC_CONF:-none}" >> LOG
    [ -z "$NO_TORCH" ] || { echo "no torch" >&2; exit 3; }
    echo "NVIDIA Fake 1"
    [ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] && [ -n "$REFUSES" ] && exit 1
    exit ${BROKEN:-0} ;;
  *version_info*) exit 0 ;;
  *"-m zipfile"*) exec REAL "$@" ;;
  *) echo "$* path=$PYTHONPATH allocator=${PYTORCH_CUDA_ALLOC_CONF:-none}" >> LOG ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
    """run(**environment): a run of the script on a GPU that is not there; gives the result and what was asked for."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(FAKE_PYTHON.replace("LOG", shlex.quote(str(log))).replace("REAL", shlex.quote(sys.executable)))
    python.chmod(0o755)

    def start(**environment):
        log.write_text("")
        settings = {"PYTHON": str(python), "WHEELS": str(tmp_path / "none"), "NO_TORCH": "", "REFUSES": ""}
        settings = {**settings, "PYTORCH_CUDA_ALLOC_CONF": "", **environment}
        result = run("bash", ROOT / "benchmarks" / "gpu_run.sh", tmp_path / "out", **settings)
        return result, log.read_text().splitlines()

    return start


def test_the_order_of_a_call_on_a_gpu(fake, tmp_path):
    """Probe, ours, the large tests alone, defaults and few peers, tests on 13 processes, the rest, tables, plots."""
    result, asked = fake(PACK=str(tmp_path / "pack.tar"))
    assert result.returncode == 0, result.stdout + result.stderr
    tests, report = ("test_at_scale.py", "test_engines.py"), ("gpu_report.py", "gpu_plots.py")
    wanted = ("probe", "--rank 0", tests[0], "--rank 1", tests[1], "--rank 9", *report)
    assert len(asked) == len(wanted)
    assert all(part in line for part, line in zip(wanted, asked, strict=True)), asked
    assert "-n 1 " in asked[2]
    assert "-n 13 " in asked[4]
    assert all("allocator=expandable_segments:True" in line for line in asked)
    with tarfile.open(tmp_path / "pack.tar") as packed:
        assert "tests-all.finished" in {Path(name).name for name in packed.getnames()}
    assert len(fake()[1]) == len(wanted) - 2  # the tests ended


def test_a_machine_that_refuses_expandable_segments(fake):
    """The first call is tried without them, and so is everything after it."""
    result, asked = fake(REFUSES="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split("=")[1] for line in asked[:2]] == ["expandable_segments:True", "none"]
    assert all("allocator=none" in line for line in asked[2:])
    assert len(asked) == 9


def test_a_first_call_that_fails_ends_the_run(fake):
    result, asked = fake(BROKEN="1")
    assert result.returncode == 1
    assert "the first call on the GPU failed: nothing was measured" in result.stderr
    assert len(asked) == 2  # with expandable segments and without
    result, asked = fake(NO_TORCH="1")
    assert result.returncode == 1
    assert "no torch\nno GPU, so nothing was measured" in result.stderr
    assert len(asked) == 1


def test_wheels_are_unpacked_below_site_packages(fake, tmp_path):
    """Whole wheels and one in parts, from any number of folders; one whose other parts are missing is left out."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    for folder in (whole, split):
        folder.mkdir()
    for name in ("small", "large", "cut"):
        with zipfile.ZipFile(whole / f"{name}-1.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", f"NAME = {name!r}\n" * 200)
    for name in ("large", "cut"):
        data = (whole / f"{name}-1.whl").read_bytes()
        (whole / f"{name}-1.whl").unlink()
        for place, part in enumerate((data[:1000], data[1000:])):
            if (name, place) != ("cut", 1):
                (split / f"{name}-1.whl.part0{place}").write_bytes(part)
    result, asked = fake(WHEELS=f"{whole} {split}")
    assert result.returncode == 0, result.stderr
    assert "cut-1.whl: incomplete, left out" in result.stdout
    assert "Traceback" not in result.stderr
    measured = [line for line in asked if "gpu_bench.py" in line]
    paths = {line.split(" path=")[1].split(" allocator=")[0] for line in measured}
    assert len(paths) == 1
    folder = Path(paths.pop().split(":")[-2])
    assert folder.name == "site-packages"
    assert {path.name for path in folder.iterdir()} == {"small.py", "large.py"}
    assert all("site-packages" not in line for line in asked if line.startswith("-m pytest"))


def test_a_worker_that_dies_between_items_is_replaced_once(tmp_path):
    """After an end without an item: one more; after two in a row without a row: no third."""
    for dies, begun, rows in ((1, 2, 2), (9, 2, 0)):
        folder = tmp_path / str(dies)
        folder.mkdir()
        script = folder / "dies.py"
        script.write_text(
            "import os, sys, pathlib\n"
            "from benchmarks import gpu_bench\n"
            f"starts = pathlib.Path({str(folder / 'starts')!r})\n"
            "def items(dry_run):\n"
            "    from benchmarks.gpu_timing import Item\n"
            "    return [Item('roofs', key, lambda bench: [{'ms': 1.5}], 0.0) for key in ('first', 'second')]\n"
            "gpu_bench.all_sections = lambda: {'roofs': items}\n"
            "if '--worker' in sys.argv:\n"
            "    with starts.open('a') as file: file.write('x')\n"
            f"    if len(starts.read_text()) <= {dies}: os._exit(7)\n"
            "sys.exit(gpu_bench.main())\n"
        )
        result = run(sys.executable, script, "--dry-run", "--out", folder / "out")
        assert result.returncode == 1
        assert "the process ended with status 7" in result.stdout
        assert len((folder / "starts").read_text()) == begun
        assert len(gpu_report.read(folder / "out", "roofs")) == rows


def test_products_are_counted_as_they_run():
    """Three where the budget holds the logits, four where it does not, and between them; two for a frozen head."""
    n, d, v = 512, 64, 4096
    hidden, weight = (torch.randn(size, d).bfloat16().requires_grad_() for size in (n, v))
    labels, ones = torch.randint(0, v, (n,)), torch.ones(n)

    def ran(loss, weight=weight, **options):
        def step():
            with use_backend("torch"):
                value = loss(hidden, weight, labels, ones)
            return lambda: value.backward()

        return products_run(step, n, d, v)

    with use_backend("torch"):
        assert ran(gpu_providers.PROVIDERS["ours, any gradient"].loss) == 3
        assert ran(gpu_providers._logprob(workspace_mb=3)) == 4
        assert ran(gpu_providers.PROVIDERS["ours, one pass"].loss) == 3
        assert ran(gpu_providers.PROVIDERS["ours, frozen head"].loss, weight.detach()) == 2
        assert ran(gpu_providers.plain) == 3
        # What is compared with: no more products than ran.
        bench, at = Bench(dry_run=True), gpu_compare.Problem(hidden, weight, labels, ones)
        rows = gpu_compare.measure_training(bench, at, gpu_providers.PROVIDERS["ours, any gradient"])
    assert rows[0]["gemms_run"] == rows[0]["gemms"] == 3
    assert rows[0]["of_gemms"] == pytest.approx(rows[0]["ms"] / rows[0]["gemm_ms"])


COLUMNS = "key,shape,provider,pass,ms,p20,p80,gemms,gemm_ms,of_gemms,peak_less_gradients_mib,dhidden_error,note"


def write(folder, ratio, provider="ours, one pass, 1.1 GB", memory=900, error=0.002, more=()):
    """A compare.csv with one row of 3 GEMMs of 33 ms in all, and ``more`` (provider, ms)."""
    folder.mkdir()
    row = '"a","8192x4096x128256","{}",both,{},35,37,3,33,{},{},{},'
    rows = [row.format(provider, 33 * ratio, ratio, memory, error)]
    rows += [row.format(name, ms, ms / 33, 900, 0.002) for name, ms in more]
    (folder / "compare.csv").write_text("\n".join(["# made up", COLUMNS, *rows]) + "\n")
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


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"ratio": 1.1}, "| one pass, token weights | {row} | 1.12 | 1.1 |  |  | met |"),
        ({"ratio": 1.2}, "| one pass, token weights | {row} | 1.12 | 1.2 |  |  | missed |"),
        (
            {"ratio": 1.1, "error": 0.3},
            "| one pass, token weights | {row} | 1.12 | 1.1 |  |  | wrong: dhidden_error 0.3 |",
        ),
        (
            {"ratio": 1.1, "error": "nan"},
            "| one pass, token weights | {row} | 1.12 | 1.1 |  |  | wrong: dhidden_error nan |",
        ),
        ({"ratio": 1.1, "memory": 3000}, "MiB beyond inputs and gradients | {row} | 3,053 | 3,000 |  |  | met |"),
        ({"ratio": 1.1, "memory": 3100}, "MiB beyond inputs and gradients | {row} | 3,053 | 3,100 |  |  | missed |"),
    ],
)
def test_summary_says_which_bars_are_met(tmp_path, settings, line):
    """Time, memory, and no bar for a wrong gradient."""
    text = gpu_report.summary(write(tmp_path / "now", **settings))
    assert line.format(row="8192x4096x128256 | ours, one pass, 1.1 GB") in text


def test_summary_names_the_fastest_peer_and_the_missing(tmp_path):
    peers = [("quack", 35), ("cce", 60), ("ours, any gradient", 20)]
    text = gpu_report.summary(write(tmp_path / "now", 1.1, "ours, one pass", more=peers))
    line = next(line for line in text.splitlines() if "fastest other library" in line)
    assert "of quack" in line
    assert "| 1.04 |" in line
    assert "missed, without liger, factor 16" in line
    assert "cce," not in line.split("without")[1].replace("cce, exact", "")


def test_summary_says_where_one_pass_pays(tmp_path):
    """The shortest chunk that beats two passes of no more memory; the clocks of the busy seconds."""
    folder = tmp_path / "now"
    folder.mkdir()
    lines = ["# made up", "key,shape,engine,rows,default,workspace_mib,ms,p20,p80,note"]
    for rows, ms in ((128, 80), (256, 60), (512, 50), (1024, 40), (2048, 36)):
        lines.append(f"a,8x4x100,one_pass,{rows},False,{rows},{ms},{ms},{ms},")
    for workspace, ms in ((128, 48), (1024, 47)):
        lines.append(f"a,8x4x100,two_pass,,False,{workspace},{ms},{ms},{ms},")
    lines.append("a,8x4x100,one_pass,,True,4492,35,35,35,")
    (folder / "crossover.csv").write_text("\n".join(lines) + "\n")
    busy = ["2026/01/01 00:00:00.000, 1980, 3201, 690.1, 60, 100", "2026/01/01 00:00:01.000, 1410, 3201, 700.2, 61, 99"]
    idle = ["2026/01/01 00:00:02.000, 345, 3201, 90.1, 40, 0", "2026/01/01 00:00:03.000, 345"]
    (folder / "clocks.log").write_text("\n".join(busy + idle) + "\n")
    text = gpu_report.summary(folder)
    assert "1024 rows | 1024 rows: 40 ms, two passes 47 | crossover.csv" in text
    assert "While busy (2 of 3 s): SM clock 1980 MHz (1410 to 1980), power 700 W (690 to 700)." in text
