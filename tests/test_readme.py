"""The figures of the README and of the pages are those of the CSVs that they name (their code: test_docs.py)."""

import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import HANG
from var_kernels.kernels import rows_native
from var_kernels.ops import head as ops_head

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["loss_module.py", "own_trainer.py"])
def test_example_runs(name):
    run = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, timeout=HANG)
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"loss'?:? '?(\d+\.\d+)", run.stdout)]
    assert len(losses) >= 4
    assert re.search(r"no logits made: loss \d+\.\d+ -> \d+\.\d+$", run.stdout.strip())


def measured(path: Path | str) -> list[dict]:
    lines = (ROOT / "benchmarks" / "results" / path).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_memory_figures_are_measured():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.memory import ROOT, sentence

    assert sentence(ROOT / "benchmarks" / "results" / "cpu-2-cores") in README


@pytest.mark.skipif(rows_native.obstacle() is not None, reason="the figures are those of the C++ kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_figures_are_those_of_this_commit(dtype, monkeypatch):
    """Exact on every CPU: another default workspace turns this red, and benchmarks/memory.py --update mends it."""
    monkeypatch.setattr(ops_head, "_cpu_memory", lambda: 16 << 30)  # the default follows it
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.memory import RESULTS, Problem

    problem = Problem(dtype=dtype)
    fused = (problem.peak("fused") - problem.gradients) / 2**20
    written = {row["loss"]: float(row["peak_less_gradients_mib"]) for row in measured(f"cpu-2-cores/{RESULTS[dtype]}")}
    assert fused == pytest.approx(written["fused"], rel=0.02)  # packed operands of AMX differ by less


def test_an_update_writes_the_sentence_of_the_files(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.memory import sentence, update_readme

    for name, fused in (("memory-fp32.csv", 1040.26), ("memory-bf16.csv", 52.0)):
        (tmp_path / name).write_text(f"# x\nloss,peak_less_gradients_mib\nplain,2080.52\nfused,{fused}\n")
    old = "1 MiB instead of\n  2 MiB in fp32 (2.0x less), 3 MiB\n instead of 12,345 MiB in bf16\n (4.1x less)"
    (tmp_path / "README.md").write_text(f"before {old} after")
    update_readme(tmp_path / "README.md", tmp_path)
    new = "1,040 MiB instead of 2,081 MiB in fp32 (2.0x less), 52 MiB instead of 2,081 MiB in bf16 (40.0x less)"
    assert (tmp_path / "README.md").read_text() == f"before {new} after"
    assert sentence(tmp_path) == new
    (tmp_path / "README.md").write_text("without it")
    with pytest.raises(SystemExit, match="found 0"):
        update_readme(tmp_path / "README.md", tmp_path)


def test_times_are_measured():
    """README's table, cell by cell; what has no line in the files is said to be missing."""
    ours = "var_kernels, fp32 logits"
    rows = {
        "fp32, called without options": ("cpu-avx-512/loss", "float32", f"{ours}, default"),
        "bf16, one pass with a workspace for it": ("cpu-avx-512/loss", "bfloat16", ours),
        "the same on a CPU with AMX": ("cpu-amx/loss", "bfloat16", ours),
        "bf16, called without options, AMD EPYC with AVX-512 BF16": (
            "cpu-avx-512-bf16/threads",
            "bfloat16",
            f"{ours}, default",
        ),
    }
    lines = [line.strip(" |").split(" | ") for line in README.splitlines() if line.startswith("  |")]
    shapes = [shape.replace(" ", "") for shape in lines[0][1:]]
    assert len(shapes) == 4
    assert [line[0] for line in lines[2:]] == list(rows)
    for line in lines[2:]:
        files, dtype, provider = rows[line[0]]
        for shape, cell in zip(shapes, line[1:], strict=True):
            found = [row for row in measured(f"{files}-{shape}-{dtype}.csv") if row.get("threads") in (None, "1")]
            ms = {(row["provider"], row["mode"]): float(row["ms"]) for row in found}
            found = ms.get((provider, "one pass"))
            wanted = "not measured" if found is None else f"{found / ms[BASELINE]:.2f}"
            assert cell == wanted, (line[0], shape)


BASELINE = ("transformers' loss", "two passes")


def test_figures_of_trl_are_measured():
    rows = {(r["dtype"], r["weights"], r["head"]): r for r in measured("cpu-avx-512-bf16/trl.csv")}
    text = " ".join(README.split())
    for dtype, unit in (("bfloat16", " tokens/s"), ("float32", "")):
        for head in ("TRL", "FusedHeadMixin"):
            row = rows[dtype, "full", head]
            assert f"{int(row['tokens_per_s']):,}{unit} in {int(row['peak_mib']):,} MiB" in text


def test_figures_of_the_demo_are_measured():
    """Those of a run that was kept, by ``python -m benchmarks.demo.page``; without one README has none."""
    from benchmarks.demo.page import MARKS, PICTURE, RESULTS, block, settings

    text = " ".join(README.split())
    _, _, rest = README.partition(MARKS[0])
    assert rest.partition(MARKS[1])[0] == block(RESULTS)
    study = (ROOT / "docs" / "study.md").read_text()
    for name, value in (("VAR", "0.94 ± 0.13"), ("DPO", "0.82 ± 0.17")):
        assert f"{name} | {value} |" in study
        assert f"{name} {'has ' if name == 'VAR' else ''}{value}" in text
    if not block(RESULTS):
        return
    assert PICTURE.is_file()
    lam = float(settings(RESULTS)["lam"])
    for row in measured(RESULTS / "demo-models.csv"):
        assert float(row["objective"]) == pytest.approx(float(row["reward"]) - lam * float(row["kl"]), abs=2e-4)
    gain, error = (float(row[key]) for key in ("gain", "gain_error"))  # of the last one, VAR
    assert gain > 3 * error


def test_figures_on_real_weights_are_measured():
    """``python -m benchmarks.real page`` writes them."""
    from benchmarks.real.tables import PAGE, headline, read, tables

    page = PAGE.read_text()
    steps = ROOT / "benchmarks" / "results" / "cpu-avx-512-bf16" / "real-steps.csv"
    assert f"<!-- real-steps -->\n{headline(read(steps))}<!-- end of real-steps -->\n" in README
    for name, table in tables(ROOT / "benchmarks" / "results" / "cpu-avx-512-bf16").items():
        assert f"<!-- {name} -->\n{table}<!-- end of {name} -->\n" in page
    peak = {
        tuple(row[key] for key in ("model", "dtype", "tokens", "head")): float(row["peak_mib"])
        for row in measured("cpu-avx-512-bf16/real-steps.csv")
        if row["peak_mib"] and row["checkpointing"] == "0"
    }
    holds = {
        tuple(row[key] for key in ("model", "tokens", "head")): f"{float(row['peak_mib']):,.0f}"
        for row in measured("cpu-avx-512-bf16/real-steps.csv")
        if row["peak_mib"] and row["checkpointing"] == "1"
    }
    small, large, gemma = (
        tuple(holds[(*setting, head)] for head in ("transformers", "var_kernels"))
        for setting in (("smollm2", "4096"), ("smollm2", "16384"), ("gemma", "4096"))
    )
    told = (
        f"a step of SmolLM2 holds {small[0]} MiB with transformers' loss, {small[1]} with ours at 4,096 tokens, "
        f"{large[0]} and {large[1]} at 16,384; one of Gemma {gemma[0]} and {gemma[1]} at 4,096."
    )
    assert told in " ".join(page.split())
    for setting, told in {
        ("smollm2", "float32", "1024"): "491 MiB in fp32 at 1,024 tokens, ours -2;",
        ("smollm2", "bfloat16", "4096"): "in bf16 at 4,096 tokens 2,208 and 9.",
        ("gemma", "float32", "1024"): "2,422 MiB in fp32 and 2,564 in bf16, ours 710 and 503",
    }.items():
        for head in ("transformers", "var_kernels"):
            added = f"{peak[(*setting, head)] - peak[(*setting, 'none')]:,.0f}"
            assert added in told
        assert told in " ".join(page.split())
    distilled = measured("cpu-avx-512-bf16/real-distill.csv")[0]
    assert f"by {float(distilled['fall']):.2f} +- {float(distilled['fall_error']):.2f}" in page


def test_the_picture_of_steps_has_the_longest_of_each_model(tmp_path, monkeypatch):
    from benchmarks.real import plots

    drawn = []
    monkeypatch.setattr(plots, "STEPS", tmp_path / "steps.png")
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    step = {"model": "gemma", "dtype": "bfloat16", "checkpointing": "1", "peak_mib": "2048", "head": "transformers"}
    rows = [
        {**step, "tokens": tokens, "head": head, "peak_mib": peak}
        for tokens, head, peak in (
            ("1024", "transformers", "2048"),
            ("1024", "var_kernels", "1024"),
            ("4096", "transformers", "5120"),
            ("4096", "var_kernels", "1536"),
            ("4096", "none", "1000"),
            ("16384", "var_kernels", "4096"),  # alone: nothing to compare it with
        )
    ]
    plots.write_steps([*rows, {**rows[0], "dtype": "float32", "tokens": "8192"}])
    (figure,) = drawn
    (axis,) = figure.axes
    assert axis.get_title(loc="left") == "Gemma, 4,096 tokens, checkpointing"
    assert [text.get_text() for text in axis.texts] == ["1.5", "5.0"]
    assert [bar.get_width() for bar in axis.patches] == [1.5, 5.0]
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_tables_of_real_weights_by_hand():
    from benchmarks.real.tables import errors, sparsity, steps, study

    row = {"model": "gemma", "dtype": "bfloat16", "tokens": "510"}
    figures = {"loss": "4.169214", "loss_error": "-0.00131", "logp_rms": "", "dhidden_rms": "", "dweight_rms": "2e-6"}
    assert errors([{**row, "head": "plain", **figures}]).splitlines()[2] == (
        "| Gemma | bf16 | 510 | plain | 4.16921 | -1.3e-03 | | | 2.0e-06 |"
    )
    tiles = {"tiles": "384", "kept": "382", "kept_share": "0.994792", "median_p_y": "0.129"}
    assert sparsity([{**row, **tiles}]).splitlines()[2] == "| Gemma | 510 | 384 | 382 | 99.5 % | 0.13 |"
    measured = {
        **row,
        "checkpointing": "1",
        "head": "none",
        "peak_mib": "3146.9",
        "tokens_per_s": "81.3",
        "missing": "",
    }
    absent = {**measured, "head": "Liger", "peak_mib": "", "missing": "not installed"}
    none = {**measured, "head": "TRL", "tokens": "1024", "peak_mib": "", "missing": "needs more than 3.0 GiB"}
    found = steps([measured, absent, none, {**measured, "head": "TRL"}])
    assert found.splitlines()[0] == "| model | weights | tokens | checkpointing | body alone | TRL |"
    assert found.splitlines()[2] == "| Gemma | bf16 | 510 | yes | 3,147 MiB, 81/s | 3,147 MiB, 81/s |"
    assert found.splitlines()[3] == "| Gemma | bf16 | 1,024 | yes | | needs more than 3.0 GiB |"
    names = ("weighted_nll", "lift", "pair_accuracy", "kl", "ess_share", "seconds")
    runs = [(2.0, 0.0, 0.5, 0.0, "", ""), (1.5, 0.02, 0.6, 3.0, 0.4, 30.0), (1.7, 0.04, 0.6, 5.0, 0.6, 40.0)]
    rows = [dict(zip(names, map(str, run), strict=True)) for run in runs]
    rows = [{"method": "VAR", **made} for made in rows]
    rows[0]["method"] = "reference"
    assert study(rows).splitlines()[2] == (
        "| VAR | 0.400 ± 0.100 | 0.200 | 0.030 ± 0.010 | 0.015 | 0.600 ± 0.000 | 4.00 ± 1.00 | 0.50 ± 0.10 | 35 ± 5 |"
    )


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried", "needs more than 2.0 GiB"),
        (1, "MemoryError", "needs more than 2.0 GiB"),
        (-9, "", "needs more than 2.0 GiB"),
        (1, "Traceback\nModuleNotFoundError: No module named 'x'\n", "ModuleNotFoundError: No module named 'x'"),
        (-11, "", "ended with status -11"),
    ],
)
def test_a_step_that_could_not_run_says_why(code, said, reason):
    from subprocess import CompletedProcess

    from benchmarks.real.steps import _reason

    assert _reason(CompletedProcess([], code, "", said), 2 * 2**30) == reason


def test_demo_figures_are_written_from_a_run(tmp_path):
    from benchmarks.demo.page import block, picture, sizes, steps, table, write_csv

    row = dict.fromkeys(("reward_error", "gain_error", "win_rate_error", "kl_error", "objective_error"), 0.021)
    row |= {"reward": 0.5, "gain": 0.2, "win_rate": 0.79, "kl": 0.8, "objective": 0.34, "length": 21, "seconds": 3.0}
    step = {"peak_mib": 1300.0, "seconds": 2.0}
    metrics = {
        "seed": 0,
        "subject": {"name": "a model", "vocabulary": 49152, "dtype": "bfloat16"},
        "environment": {"device": "a CPU", "torch": "2", "transformers": "5", "python": "3"},
        "plan": {"completions": 8, "eval_samples": 1, "lam": 0.2},
        "data": {"prompts": 32, "held_out": 24},
        "table": {"reference": row, "VAR": row},
        "memory": [{"tokens": 1024, "plain": step, "fused": step}, {"tokens": 4096, "plain": None, "fused": step}],
        "seconds": {"all": 1234.5},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    lines = [{"model": model, "reward": reward} for model, reward in (("reference", 0.0), ("VAR", 0.5))]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_csv(tmp_path, tmp_path)
    assert table(tmp_path).splitlines()[2:] == [
        "| reference | +0.50 ± 0.02 | | | |",
        "| **VAR** | +0.50 ± 0.02 | +0.20 ± 0.02 | 79 % ± 2 % | 0.80 ± 0.02 |",
    ]
    assert sizes(tmp_path) == (
        "32 prompts with 8 answers each; 24 held-out prompts with 1 answers each; 1,234 seconds in all"
    )
    assert steps(tmp_path) == (
        "1,300 MiB plain, 1,300 MiB fused at 1,024 tokens; no room plain, 1,300 MiB fused at 4,096 tokens"
    )
    assert table(tmp_path) in block(tmp_path)
    assert steps(tmp_path) in block(tmp_path)
    assert picture(tmp_path).startswith("<svg")


def test_figures_of_the_page_on_var_are_measured():
    page = (ROOT / "docs" / "var.md").read_text()
    ess = {}
    for row in measured("ess.csv"):
        name = f"| {row['normalizer']} (of {row['size']}) | {row['reference']} |"
        ess.setdefault(name, []).append(f"{float(row['ess_median']):.1f}")
    assert len(ess) == 8
    for name, medians in ess.items():
        assert f"{name} {' | '.join(medians)} |" in page
    log_z, distance = {}, {}
    for row in (row for row in measured("estimators.csv") if row["samples"] in ("4", "16", "64", "256")):
        log_z.setdefault(row["estimator"], []).append(f"{float(row['bias']):.3f} ± {float(row['sd']):.3f}")
        distance.setdefault(row["estimator"], []).append(f"{float(row['tv']):.3f}")
    assert len(log_z) == 6
    for name in log_z:
        assert f" | log Z | {' | '.join(log_z[name])} |\n| | TV | {' | '.join(distance[name])} |\n" in page


def test_the_table_of_losses_is_the_registry():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from var_kernels import LOSSES
    from var_kernels.cli.methods import markdown_table, variants_table

    assert f"{len(LOSSES)} losses by name" in README
    page = (ROOT / "docs" / "losses.md").read_text()
    assert markdown_table() in page
    assert variants_table() in page


def test_figures_of_models_are_those_of_the_sweep():
    summary = re.search(
        r"(\d+) pairs of model type and class, (\d+) right, (\d+) refused, (\d+) wrong, (\d+) cannot",
        (ROOT / "docs" / "models.md").read_text(),
    )
    pairs, right, refused, wrong, unbuilt = summary.groups()
    text = " ".join(README.split())
    assert wrong == "0"
    assert f"of the {pairs} language-model classes" in text
    assert f"{right} give their own" in text
    assert f"{refused} are refused with a reason, none is wrong, {unbuilt} could not be built" in text


def test_figures_of_kl_are_measured():
    """The tables of docs/distillation.md: times in bare GEMMs, in brackets MiB, each once."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "distillation.md").read_text().splitlines()]
    sides = {
        "**`linear_token_kl`**: forward, jsd, reverse": ("ours, forward", "ours, jsd", "ours, reverse"),
        "the same, a value each: forward": ("ours, forward, a value each",),
        "`F.kl_div` of full logits: forward": ("plain, forward",),
        "TRL: forward, jsd": ("trl, forward", "trl, jsd"),
        "Liger, chunked: forward, jsd": ("liger, chunked, forward", "liger, chunked, jsd"),
    }
    for short, dtype in (("bf16", "bfloat16"), ("fp32", "float32")):
        at = next(i for i, cells in enumerate(lines) if cells[0] == short and " x " in cells[1])
        table = {cells[0]: cells[1:] for cells in lines[at + 2 : at + 2 + len(sides)]}
        assert table.keys() == sides.keys()
        for place, shape in enumerate(lines[at][1:]):
            name = f"cpu-avx-512-bf16/divergence-{shape.replace(' ', '')}-{dtype}.csv"
            found = {row["side"]: row for row in measured(name)}
            for label, names in sides.items():
                rows = [found[name] for name in names if name in found]
                peaks = dict.fromkeys(f"{float(row['peak_mib']):,.0f}" for row in rows)
                times = ", ".join(f"{float(row['of_gemms']):.2f}" for row in rows)
                assert table[label][place] == f"{times} ({', '.join(peaks)})"


def test_times_of_the_epyc_are_measured():
    """Two tables of docs/performance.md for each dtype, cell by cell."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "performance.md").read_text().splitlines()]
    ours, compiled, plain = "var_kernels, fp32 logits", "torch.compile of it", "transformers' loss"
    losses = {
        "as called, without options": (f"{ours}, default", "one pass"),
        "two passes, all exponentials kept": (f"{ours}, kept", "two passes"),
        "two passes, 64 MiB": (ours, "two passes"),
        "`torch.compile` of `F.linear` + `F.cross_entropy`": (compiled, "two passes"),
        "transformers' loss": (plain, "two passes"),
    }
    threads = {
        "forward": (ours, "forward"),
        "one pass, without options": (f"{ours}, default", "one pass"),
        "two passes, all kept": (f"{ours}, kept", "two passes"),
        "two passes, 64 MiB": (ours, "two passes"),
        "frozen head": (ours, "frozen head"),
    }
    for sides, (number, dtype) in itertools.product((losses, threads), enumerate(("bfloat16", "float32"))):
        labels = [cells[0] for cells in lines]
        first = [i for i in range(len(lines)) if labels[i : i + len(sides)] == list(sides)][number]
        for place, shape in enumerate(lines[first - 2]):
            rows = measured(f"cpu-avx-512-bf16/threads-{shape.replace(' ', '')}-{dtype}.csv")
            found = {(row["provider"], row["mode"], row["threads"]): row for row in rows}
            gemms = float(found["bare GEMMs", "one pass", "1"]["ms"])
            for cells, side in zip(lines[first : first + len(sides)], sides.values(), strict=True):
                one, two = found[(*side, "1")], found[(*side, "2")]
                ms, peak = float(one["ms"]), float(one["peak_mib"])
                sooner = float(one["wall_ms"]) / float(two["wall_ms"])
                of_two = f"{sooner:.2f}x, {float(two['ms']) / ms:.2f}"
                wanted = of_two if sides is threads else f"{ms / gemms:.2f} ({peak:.0f})"
                assert cells[place + 1] == wanted, (side, shape, dtype)
