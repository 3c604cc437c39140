"""Bytes and launches of the engines, counted without a GPU: what the engine promises, and the table in the tree."""

import csv

import pytest
import torch

pytest.importorskip("triton", reason="the backend of a GPU")
from benchmarks import gpu_costs
from benchmarks.gpu_costs import CASES, RESULTS, ROW_KERNELS, Case, computed, run

BY_NAME = {case.name: case for case in CASES}
LARGE, SMALL, LONG = (8192, 4096, 128256), (8192, 896, 151936), (8192, 2304, 256000)
# Of the bare GEMMs, by an account of bytes made before the engine was built.
EXPECTED = {
    ("one pass, default budget", LARGE): 1.05,
    ("one pass, default budget", SMALL): 1.22,
    ("one pass, default budget", LONG): 1.09,
    ("frozen head", LARGE): 1.08,
    ("frozen head", SMALL): 1.33,
    ("frozen head", LONG): 1.13,
}


@pytest.mark.parametrize(("name", "shape"), EXPECTED)
def test_ratios_are_what_the_design_says(name, shape):
    row = computed(BY_NAME[name], shape)
    assert abs(float(row["computed_ratio"]) / EXPECTED[name, shape] - 1) <= 0.03, row
    assert row["row_bytes_a_logit"] == "6"


@pytest.mark.parametrize("shape", [LARGE, SMALL, LONG])
@pytest.mark.parametrize(("name", "gemms", "moved"), [("KL", 4, 18), ("JSD", 4, 26), ("KL, frozen head", 3, 18)])
def test_two_models_read_each_logit_twice(name, gemms, moved, shape):
    """8 bytes for the statistics (JSD: twice), 8 for the gradient, which is written in 2."""
    kind, _, rest = name.partition(",")
    row = computed(BY_NAME[f"{kind} of two models{',' * bool(rest)}{rest}"], shape)
    assert (row["gemms"], row["row_bytes_a_logit"]) == (str(gemms), str(moved))


@pytest.mark.parametrize("name", ["one pass, default budget", "two passes, default budget", "bias learns"])
def test_one_product_writes_dweight_where_the_exponentials_fit(name):
    """No fp32 dW: every result in it is of the operands' dtype, and none is cast."""
    n, d, v = LARGE
    counts = run(BY_NAME[name], n, d, v)
    assert max(size for what, size in counts.kernels + counts.others if what not in ROW_KERNELS) < v * d * 2
    # E^T (s h) reads E and h and writes dW, all in bf16.
    assert (2.0 * n * d * v, 2 * (n * d + n * v + d * v)) in counts.gemms


@pytest.mark.parametrize(
    ("name", "most"),
    [("forward", 10), ("one pass, default budget", 19), ("two passes, default budget", 17), ("frozen head", 15)],
)
def test_small_launches_stay_few(name, most):
    counts = run(BY_NAME[name], *LARGE)
    assert len(counts.others) <= most, [what for what, _ in counts.others]
    assert counts.host_reads == 1  # the number of rows that count


@pytest.mark.parametrize(
    ("shape", "workspace_mb"), [(LARGE, 2260), (SMALL, 775), (SMALL, 1024), (LONG, 2762), (LONG, 3299)]
)
def test_the_engine_that_is_chosen_costs_little(shape, workspace_mb):
    """Budgets around which one pass becomes worth its fp32 dW: at most 1.2 times the other engine's time, whether what
    the GEMMs move hides under them or not.
    """

    def ratios(engine):
        row = computed(Case(engine, 3, engine=engine, workspace_mb=lambda n, d, v: workspace_mb), shape)
        return float(row["computed_ratio"]), float(row["computed_ratio_exposed"])

    chosen = ratios("auto")
    for engine in ("one_pass", "two_pass"):
        assert all(ours <= 1.2 * other for ours, other in zip(chosen, ratios(engine), strict=True))


def test_what_is_counted():
    """A product, an addition, a sum, a gather, and what moves nothing, on tensors that say they are on a GPU."""
    with gpu_costs.counted() as counts:
        left, right = gpu_costs.pretended(8, 4), gpu_costs.pretended(16, 4)
        assert left.device.type == "cuda"
        logits = torch.mm(left, right.t())
        assert logits.device.type == "cuda"
        (logits[2:].view(-1) + 1).sum()
        right[torch.zeros(3, dtype=torch.int64, device="cuda")]
    assert counts.gemms == [(2.0 * 8 * 4 * 16, 2 * (8 * 4 + 4 * 16 + 8 * 16))]
    sizes = dict(counts.others)
    assert sizes["add"] == 2 * 2 * 6 * 16
    assert sizes["sum"] == 2 * 6 * 16 + 2
    assert sizes["index"] == 2 * 3 * 4 * 2 + 3 * 8
    assert not {"view", "slice", "t"} & set(sizes)


def test_the_table_is_that_of_this_code():
    """To 1 %; ``python -m benchmarks.gpu_costs --csv benchmarks/results/computed/h200.csv`` writes it again."""
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["code"] == "now"]
    assert {row["engine"] for row in rows} == set(BY_NAME)
    for row in rows:
        if row["shape"] == "x".join(map(str, SMALL)):
            found = computed(BY_NAME[row["engine"]], SMALL)
            for column in ("gemms", "row_bytes_a_logit", "computed_ratio", "computed_ratio_exposed"):
                assert abs(float(found[column]) / float(row[column]) - 1) <= 0.01, (row["engine"], column)
