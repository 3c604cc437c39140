"""The fused forward kernel (no workspace): statistics and public results, every tile, hazards, mistakes it refuses."""

import functools
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import TARGETS
from tests.mutation import mutant_of
from tests.op_cases import ALL_OUTPUTS, BF16, CASES, SMALL, Case
from tests.tolerance import assert_result
from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.kernels.rows import LogitTransform, RowStats
from var_kernels.measure import peak_extra_bytes
from var_kernels.reference import linear_logprob_ref, linear_weighted_nll_ref

triton = pytest.importorskip("triton", reason="triton is not installed")
from var_kernels.kernels import forward_triton  # noqa: E402
from var_kernels.kernels.forward_triton import TILES, Tile, choose_splits, fused_forward  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
on_triton = pytest.mark.parametrize("target", [p for p in TARGETS if "triton" in p.id], indirect=True)
interpreted = pytest.mark.parametrize("target", [p for p in TARGETS if p.id == "cpu-triton"], indirect=True)
# Small enough for SMALL to need several blocks of rows, tiles of columns, steps of depth and parts, all ragged.
TINY = Tile(32, 64, 32, 32, 4, 2)
EVERYTHING = {"softcap": 3.0, "logit_scale": 0.5, "temperature": 1.3}


def raw_inputs(case: Case, device: str):
    """hidden, lm_head_weight, bias, labels (N, K) of a case in which every label counts."""
    hidden, weight, labels, bias = case.inputs(device)
    return hidden.detach(), weight.detach(), None if bias is None else bias.detach(), labels.view(hidden.shape[0], -1)


def statistics(case: Case, device: str, op=fused_forward, all_of_them=True, **plan) -> RowStats:
    hidden, weight, bias, labels = raw_inputs(case, device)
    flags = dict.fromkeys(("entropy", "mean", "argmax"), all_of_them)
    stats = RowStats.empty(hidden.shape[0], labels.shape[1], hidden, **flags)
    transform = LogitTransform(**{"logit_scale": 1.0, "softcap": None, "temperature": 1.0, **case.options})
    op(hidden, weight, bias, labels, stats, transform, **plan)
    return stats


def check_statistics(case: Case, device: str, op=fused_forward, **plan) -> None:
    """What the statistics are for: logp, lse, entropy, the mean logit, the argmax."""
    got = statistics(case, device, op, **plan)
    hidden, weight, bias, labels = raw_inputs(case, device)
    logp, lse, entropy, argmax = linear_logprob_ref(
        hidden, weight, labels, bias, return_lse=True, return_entropy=True, return_argmax=True, **case.options
    )
    smoothed = linear_logprob_ref(hidden, weight, labels, bias, label_smoothing=0.1, **case.options)
    v = weight.shape[0]
    assert_result(got.logp_NK(0.0, v), logp, "logp", case.largest_logit)
    assert_result(got.logp_NK(0.1, v), smoothed, "logp, smoothed", case.largest_logit)
    assert_result(got.lse_N, lse, "lse", case.largest_logit)
    assert_result(got.entropy_N, entropy, "entropy", case.largest_logit)
    assert torch.equal(got.argmax_N, argmax)
    assert (got.logp_NK(0.0, v) <= 0).all()


# -- the public op -------------------------------------------------------------------------------------------------

FORWARD_CASES = [case for case in CASES if not case.frozen and case.dtype != torch.float64]


@on_triton
@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: case.id)
def test_equals_the_reference(case, target):
    hidden, weight, labels, bias = case.inputs(target.device)
    asked = {f"return_{name}": True for name in ALL_OUTPUTS}
    with torch.no_grad():
        outputs = linear_logprob(hidden, weight, labels, bias, **asked, **case.options, workspace_mb=0)
    truth = linear_logprob_ref(hidden, weight, labels, bias, **asked, **case.options)
    for name, got, expected in zip(("logp", *ALL_OUTPUTS), outputs, truth, strict=True):
        if name == "argmax":
            assert torch.equal(got, expected)
        else:
            assert_result(got, expected.detach(), name, case.largest_logit)


@on_triton
@pytest.mark.parametrize("engine", ["auto", "one_pass", "two_pass"])
def test_the_loss_without_gradients(target, engine):
    hidden, weight, labels, bias = Case("", bias=True).inputs(target.device)
    token_weight = torch.linspace(-1, 2, labels.numel(), device=target.device)
    with torch.no_grad():
        loss = linear_weighted_nll(
            hidden, weight, labels, token_weight, bias, z_loss=0.1, engine=engine, workspace_mb=0
        )
    expected = linear_weighted_nll_ref(hidden, weight, labels, token_weight, bias, z_loss=0.1)
    scale = token_weight.abs().sum()
    assert_result(loss / scale, (expected / scale).detach())


@on_triton
def test_no_rows(target):
    hidden, weight, labels, _ = Case("").inputs(target.device)
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, torch.full_like(labels, -100), workspace_mb=0)
    assert logp.shape == labels.shape
    assert logp.count_nonzero() == 0


@on_triton
def test_gradients_are_refused(target):
    hidden, weight, labels, _ = Case("").inputs(target.device)
    with pytest.raises(ValueError, match=r"workspace_mb must be positive for a call that needs gradients.*no_grad"):
        linear_logprob(hidden, weight, labels, workspace_mb=0)


@on_triton
def test_memory_is_a_few_bytes_a_row(target):
    hidden, weight, labels, _ = Case("", shape=(63, 72, 2000), ignored=0.0).inputs(target.device)

    def step():
        with torch.no_grad():
            linear_logprob(hidden, weight, labels, return_entropy=True, workspace_mb=0)

    step()
    peak = peak_extra_bytes(step, target.device)
    assert peak < 63 * 2000 * 4 / 20


# -- tiles and splits ----------------------------------------------------------------------------------------------


def require_tile(tile: Tile, device: str) -> None:
    if tile.descriptors and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no TMA")


@on_triton
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", TILES)
def test_every_tile(target, name, splits):
    require_tile(TILES[name], target.device)
    dtype = torch.float32 if name == "small" else BF16
    case = Case("", dtype=dtype, targets=5, ignored=0.0, bias=True, options=EVERYTHING, shape=(150, 72, 507))
    check_statistics(case, target.device, tile=TILES[name], splits=splits)


REGIMES = [
    Case("flat rows", ignored=0.0, logits=0.1),
    Case("confident rows", ignored=0.0, logits=30.0),
    Case("every logit far below 0", ignored=0.0, bias=True, offset=-1e4),
    Case("every logit far above 0", ignored=0.0, bias=True, offset=1e4),
    Case("logits of 1e4", ignored=0.0, logits=1e4),
    Case("one row", ignored=0.0, shape=(1, 72, 507)),
    Case("one column", ignored=0.0, shape=(17, 72, 1)),
    Case("one dimension", ignored=0.0, shape=(17, 1, 507)),
    Case("exactly full tiles", ignored=0.0, shape=(32, 64, 128)),
    Case("one more than full tiles", ignored=0.0, shape=(33, 65, 129), targets=2),
]


@on_triton
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.id)
def test_every_regime_in_tiny_tiles(target, case, splits):
    check_statistics(case, target.device, tile=TINY, splits=splits)


@on_triton
def test_bare_statistics_are_the_same_bits(target):
    case = Case("", ignored=0.0)
    bare, full = (statistics(case, target.device, all_of_them=flag, tile=TINY, splits=3) for flag in (False, True))
    assert torch.equal(bare.logp_NK(0.0, 507), full.logp_NK(0.0, 507))
    assert bare.shifted_sum_N is bare.logit_sum_N is bare.argmax_N is None


@on_triton
def test_same_bits_twice(target):
    case = Case("", ignored=0.0)
    first, second = (statistics(case, target.device, splits=3) for _ in range(2))
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if a is not None)


@on_triton
def test_equal_logits(target):
    """A head of zeros: uniform probabilities, and the first id wins."""
    hidden, weight, _, labels = raw_inputs(Case("", ignored=0.0), target.device)
    stats = RowStats.empty(63, 1, hidden, entropy=True, mean=False, argmax=True)
    fused_forward(hidden, torch.zeros_like(weight), None, labels, stats, LogitTransform(), tile=TINY, splits=3)
    uniform = torch.full((63,), 507.0, dtype=torch.float64).log()
    assert_result(stats.lse_N.cpu(), uniform)
    assert_result(stats.entropy_N.cpu(), uniform)
    assert stats.argmax_N.count_nonzero() == 0


@on_triton
def test_forbidden_tokens(target):
    """Bias -inf over whole splits, and over the labels of some rows: as the smaller vocabulary; no NaN anywhere."""
    hidden, weight, _, labels = raw_inputs(Case("", ignored=0.0), target.device)
    bias = torch.zeros(507, device=target.device)
    bias[:300] = bias[506] = -torch.inf
    labels[5], labels[6] = 3, 506
    stats = RowStats.empty(63, 1, hidden, entropy=True, mean=False, argmax=True)
    fused_forward(hidden, weight, bias, labels, stats, LogitTransform(), tile=TINY, splits=8)
    lse, entropy, argmax = linear_logprob_ref(
        hidden, weight[300:506], labels.squeeze(1) * 0, return_lse=True, return_entropy=True, return_argmax=True
    )[1:]
    assert_result(stats.lse_N, lse)
    assert_result(stats.entropy_N, entropy)
    assert torch.equal(stats.argmax_N, argmax + 300)
    assert (stats.logp_NK(0.0, 507)[5:7] == -torch.inf).all()
    assert not stats.logp_NK(0.0, 507).isnan().any()


@on_triton
def test_any_strides(target):
    """Rows of every other position, a weight whose vocabulary is contiguous, a bias with gaps."""
    case = Case("", ignored=0.0, bias=True)
    hidden, weight, bias, labels = raw_inputs(case, target.device)
    spread = torch.empty(63, 145, device=target.device)[:, 1::2].copy_(hidden)
    gaps = torch.empty(2 * 507, device=target.device)[::2].copy_(bias)
    stats = RowStats.empty(63, 1, hidden, entropy=False, mean=False, argmax=False)
    fused_forward(spread, weight.t().contiguous().t(), gaps, labels, stats, LogitTransform())
    assert_result(stats.logp_NK(0.0, 507), linear_logprob_ref(hidden, weight, labels, bias))


@on_triton
def test_offsets_beyond_int32(target):
    """The last row of the weight begins 2^31 elements behind the first; only the rows themselves are touched."""
    hidden, weight, _, labels = raw_inputs(Case("", dtype=torch.float16, ignored=0.0), target.device)
    stride = 2**31 // 506 + 2
    torch.use_deterministic_algorithms(False)
    far = torch.empty(506 * stride + 72, dtype=torch.float16, device=target.device).as_strided((507, 72), (stride, 1))
    far.copy_(weight)
    stats = RowStats.empty(63, 1, hidden, entropy=False, mean=False, argmax=False)
    fused_forward(hidden, far, None, labels, stats, LogitTransform())
    assert_result(stats.logp_NK(0.0, 507), linear_logprob_ref(hidden, weight, labels))


@pytest.mark.parametrize(
    ("row_blocks", "column_tiles", "processors"),
    [(1, 501, 132), (2, 1002, 132), (32, 501, 132), (64, 501, 132), (256, 594, 108), (1, 3, 132), (7, 1, 132)],
)
def test_splits_keep_the_processors_busy(row_blocks, column_tiles, processors):
    splits = choose_splits(row_blocks, column_tiles, processors)
    assert min(8, column_tiles) <= splits <= column_tiles
    busiest = triton.cdiv(row_blocks * splits, processors) * triton.cdiv(column_tiles, splits)
    ideal = max(1.0, row_blocks * column_tiles / processors)
    assert busiest <= 1.15 * ideal + (ideal < 4)


def test_splits_are_chosen_once():
    """For one block of rows the search takes a millisecond, the kernel a third of one."""
    choose_splits(1, 1002, 131)
    before = choose_splits.cache_info().hits
    choose_splits(1, 1002, 131)
    assert choose_splits.cache_info().hits == before + 1


# -- mistakes ------------------------------------------------------------------------------------------------------

MUTATED_CASES = {
    "confident": Case("", ignored=0.0, logits=10.0, targets=2),
    "flat": Case("", ignored=0.0, logits=0.1),
    "below": Case("", ignored=0.0, bias=True, offset=-1e4),
}
MUTANTS = {  # id: (source, its replacement, a case that must notice)
    "tail counted": ("inside = (columns < V)", "inside = (columns < V + 5)", "flat"),
    "last column dropped": ("inside = (columns < V)", "inside = (columns < V - 1)", "flat"),
    "maximum from 0": ("tl.constexpr(-1e38)", "tl.constexpr(0.0)", "below"),
    "forgotten rescale": ("sum_n = decay_n * sum_n +", "sum_n = sum_n +", "confident"),
    "forgotten rescale of splits": ("tl.sum(decay_sn * sum_sn, 0)", "tl.sum(sum_sn, 0)", "confident"),
    "halves exchanged": ("first + COLUMNS // 2, rows", "first, rows", "confident"),
    "entropy not shifted": ("shifted_n + tl.maximum(drop_n, -1e30) * sum_n", "shifted_n", "confident"),
    "entropy of splits not shifted": ("shifted_sn + tl.maximum(drop_sn, -1e30) * sum_sn", "shifted_sn", "confident"),
    "depth not masked": ("mask=depth[None, :] < D, other=0.0", "mask=depth[None, :] < D, other=0.01", "flat"),
    "second target lost": ("labels_ptr + rows * K + k", "labels_ptr + rows * K", "confident"),
    "argmax of the last part": (
        "tl.where(part_max > max_n, first_max",
        "tl.where(part_max > LOWEST, first_max",
        "flat",
    ),
}


@interpreted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_refused(target, name, tmp_path):
    before, after, case = MUTANTS[name]
    mutant = mutant_of(forward_triton, before, after, tmp_path)
    assert unchanged_passes(case)
    with pytest.raises(AssertionError):
        check_statistics(MUTATED_CASES[case], target.device, op=mutant.fused_forward, tile=TINY, splits=3)


@functools.cache
def unchanged_passes(name: str) -> bool:
    check_statistics(MUTATED_CASES[name], "cpu", tile=TINY, splits=3)
    return True


def test_cases_are_odd():
    assert all(size % tile for size, tile in zip(SMALL, (TINY.rows, TINY.depth, TINY.columns), strict=True))


@pytest.mark.parametrize(
    ("capability", "wide", "name"),
    [
        ((7, 5), True, "small"),
        ((8, 0), True, "pointers"),
        ((8, 9), True, "pointers"),
        ((9, 0), True, "descriptors"),
        ((10, 0), False, "descriptors, small"),
        ((12, 0), True, "pointers"),
    ],
    ids=str,
)
def test_the_tile_of_each_gpu(capability, wide, name, monkeypatch):
    """By compute capability; what is not aligned, and fp32, takes the small one everywhere."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fits = {"stride": lambda i: (4096, 1)[i], "data_ptr": lambda: 256, "device": torch.device("cuda", 0)}
    hidden = SimpleNamespace(shape=(512, 4096 if wide else 896), dtype=BF16, **fits)
    assert forward_triton.choose_tile(hidden, hidden) == TILES[name]
    hidden.shape = (512, 4095)
    assert forward_triton.choose_tile(hidden, hidden) == TILES["small"]
    hidden.shape = (512, 4096)
    expanded = SimpleNamespace(**vars(hidden) | {"stride": lambda i: (0, 1)[i]})
    assert forward_triton.choose_tile(expanded, hidden) == TILES["small"]
    hidden.shape, hidden.dtype = (512, 4096), torch.float32
    assert forward_triton.choose_tile(hidden, hidden) == TILES["small"]
