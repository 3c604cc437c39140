"""Ours and others on the same inputs: time of each pass beside the bare GEMMs, peak memory, error against fp64."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import divergences
from benchmarks.gpu_providers import FEW, IGNORED, LATER, OURS, PEERS, PROVIDERS, obstacle
from benchmarks.gpu_timing import MIB, Item, bare_gemms, products_run

SHAPES = (
    (8192, 4096, 128256),
    (8192, 896, 151936),
    (4096, 2048, 32000),
    (8192, 4096, 151936),
    (8192, 2304, 256000),
    (32768, 4096, 128256),
)
# What hurts the peers: vocabularies that are a multiple of nothing, hardly any rows, very many, a wide head.
HARD = (
    (8192, 768, 50257),
    (8192, 896, 151643 + 293),
    (8192, 896, 151643),
    (1, 4096, 128256),
    (17, 4096, 128256),
    (100000, 896, 151936),
    (4096, 8192, 256000),
)
CURVE = tuple((n, 4096, 128256) for n in (1024, 2048, 4096, 16384, 65536))
TINY = (48, 16, 200)
SAMPLE = 16
# Elements of a block of fp64 logits.
_BLOCK = 1 << 27


@dataclass
class Problem:
    """hidden, weight (leaves), labels, token_weight, and the fp64 truth of a sample of rows and of vocabulary ids."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weight: Tensor

    def inputs(self, weighted: bool) -> tuple[Tensor, ...]:
        ones = self.token_weight if weighted else torch.ones_like(self.token_weight)
        return self.hidden, self.weight, self.labels, ones

    @functools.cached_property
    def rows(self) -> Tensor:
        return torch.linspace(0, self.hidden.shape[0] - 1, SAMPLE, device=self.hidden.device).long()

    @functools.cached_property
    def ids(self) -> Tensor:
        """Labels of half the sample, and ids spread over the vocabulary."""
        spread = torch.linspace(0, self.weight.shape[0] - 1, SAMPLE // 2, device=self.hidden.device).long()
        return torch.cat([self.labels[self.rows[::2]].clamp(min=0), spread])

    @functools.cached_property
    def _lse(self) -> Tensor:
        """(N,) fp64, block by block."""
        n, v = self.hidden.shape[0], self.weight.shape[0]
        lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=self.hidden.device)
        for v_start in range(0, v, 16384):
            weight_vd = self.weight[v_start : v_start + 16384].detach().double()
            step = max(1, _BLOCK // weight_vd.shape[0])
            for start in range(0, n, step):
                logits_nv = self.hidden[start : start + step].detach().double() @ weight_vd.t()
                lse[start : start + step] = torch.logaddexp(lse[start : start + step], logits_nv.logsumexp(1))
        return lse

    @functools.cached_property
    def logp(self) -> Tensor:
        """(N,) fp64, 0 where ignored."""
        label = (self.hidden.detach().double() * self.weight.detach()[self.labels.clamp(min=0)].double()).sum(1)
        return (label - self._lse).where(self.labels != IGNORED, 0.0)

    def gradients(self, token_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of dhidden at ``rows`` and of dweight at ``ids``, fp64, of the loss sum_n w_n (-logp_n)."""
        token_weight = token_weight.double().where(self.labels != IGNORED, 0.0)
        rows, ids = self.rows, self.ids
        dhidden = 0.0
        for v_start in range(0, self.weight.shape[0], 16384):
            weight_vd = self.weight[v_start : v_start + 16384].detach().double()
            p_nv = (self.hidden[rows].detach().double() @ weight_vd.t() - self._lse[rows, None]).exp()
            dhidden = dhidden + p_nv @ weight_vd
        dhidden = (dhidden - self.weight[self.labels[rows].clamp(min=0)].detach().double()) * token_weight[rows, None]
        hidden = self.hidden.detach().double()
        p_ni = (hidden @ self.weight[ids].detach().double().t() - self._lse[:, None]).exp()
        p_ni -= (self.labels[:, None] == ids).double()
        return dhidden, (p_ni * token_weight[:, None]).t() @ hidden


@functools.lru_cache(maxsize=1)
def problem(bench, n: int, d: int, v: int, masked: float = 0.0) -> Problem:
    """Logits of deviation 2 with the label's raised so that its probability is spread around 1/2, as a trained model's;
    a given share of rows ignored.
    """
    torch.manual_seed(n + d + v)
    weight = bench.randn(v, d, scale=2 / d**0.5)
    labels = torch.randint(0, v, (n,), device=bench.device)
    lift = torch.randn(n, 1, device=bench.device) * 3 + torch.log(torch.tensor(float(v))).item() + 2
    hidden = (torch.randn(n, d, device=bench.device) + weight[labels].float() * lift / 4).bfloat16()
    labels = labels.masked_fill(torch.rand(n, device=bench.device) < masked, IGNORED)
    token_weight = torch.rand(n, device=bench.device) + 0.5
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), labels, token_weight)


def _relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def _errors(at: Problem, provider, loss: Tensor) -> dict[str, float]:
    """Of the scalar loss and of a sample of both gradients, relative."""
    token_weight = at.inputs(provider.weighted)[3]
    truth = -(at.logp * token_weight).sum()
    dhidden, dweight = at.gradients(token_weight)
    errors = {
        "loss_error": _relative(loss.detach(), truth),
        "dhidden_error": _relative(at.hidden.grad[at.rows], dhidden),
    }
    if not provider.frozen:
        errors["dweight_error"] = _relative(at.weight.grad[at.ids], dweight)
    return errors


def _ran(provider, gemms: int, step, at: Problem) -> tuple[dict, float]:
    """(column, number of bare GEMMs to compare with): those that the method needs, but no more than it ran; it runs
    fewer where the budget held the logits. Those of other libraries, and of a kernel that is a GEMM itself, are not
    counted.
    """
    if provider.other:
        return {}, gemms
    ran = round(products_run(step, at.hidden.shape[0], *reversed(at.weight.shape)), 4)
    return {"gemms_run": ran}, min(gemms, ran) if ran else gemms


def _against_gemms(timing: dict, bare: dict, gemms: int, basis: float) -> dict:
    """The ratios to ``basis`` bare GEMMs, from the time of ``gemms`` of them."""
    share = basis / gemms
    return {
        "gemms": basis,
        "gemm_ms": share * bare["ms"],
        "of_gemms": timing["ms"] / (share * bare["ms"]),
        "queued_of_gemms": timing["queued_ms"] / (share * bare["queued_ms"]),
    }


def measure_training(bench, at: Problem, provider) -> list[dict]:
    """Rows for the forward, the backward and both, beside the bare GEMMs of the same number, in the same rounds."""
    hidden, weight, labels, token_weight = at.inputs(provider.weighted)
    weight_leaf = weight.detach() if provider.frozen else weight

    def step():
        hidden.grad = weight.grad = None
        loss = provider.loss(hidden, weight_leaf, labels, token_weight)

        def backward():
            loss.backward()

        return backward

    hidden.grad = weight.grad = None
    loss = provider.loss(hidden, weight_leaf, labels, token_weight)
    loss.backward()
    errors = _errors(at, provider, loss)
    del loss
    hidden.grad = weight.grad = None
    peak = bench.peak_mib(step)
    hidden.grad = weight.grad = None
    ran, basis = _ran(provider, provider.gemms, step, at)
    hidden.grad = weight.grad = None
    gemms = bare_gemms(provider.gemms, hidden.detach(), weight.detach())
    timings = bench.times({"ours": step, "gemms": gemms})
    hidden.grad = weight.grad = None
    flop = 2 * basis * hidden.shape[0] * weight.numel()
    returned = hidden.nbytes + (0 if provider.frozen else weight.nbytes)
    (both, forward, backward), bare = timings["ours"], timings["gemms"][0]
    whole = {
        "pass": "both",
        **both,
        **ran,
        **_against_gemms(both, bare, provider.gemms, basis),
        "roof_percent": bench.percent_of_roof(flop, both["ms"]),
        "peak_mib": peak,
        "peak_less_gradients_mib": peak - returned / MIB,
        **errors,
    }
    return [whole, {"pass": "forward", **forward}, {"pass": "backward", **backward}]


def measure_scoring(bench, at: Problem, provider) -> list[dict]:
    """The forward alone, without gradients; the error of the log-probs where they come one a token."""
    hidden, weight, labels = at.hidden.detach(), at.weight.detach(), at.labels

    def step():
        with torch.no_grad():
            provider.score(hidden, weight, labels)

    with torch.no_grad():
        scored = provider.score(hidden, weight, labels)
    scored = scored[0] if isinstance(scored, tuple) else scored
    error = {}
    if scored.shape == labels.shape:
        # Losses are their negative.
        error["logp_error"] = (scored.double().abs() - at.logp.abs()).abs().max().item()
    else:
        error["loss_error"] = _relative(scored.abs(), at.logp.abs().sum())
    del scored
    peak = bench.peak_mib(step)
    ran, basis = _ran(provider, 1, step, at)
    timings = bench.total({"ours": step, "gemm": bare_gemms(1, hidden, weight)})
    ms, gemm = timings["ours"], timings["gemm"]
    flop = 2 * hidden.shape[0] * weight.numel()
    return [
        {
            "pass": "score",
            **ms,
            **ran,
            **_against_gemms(ms, gemm, 1, basis),
            "roof_percent": bench.percent_of_roof(flop, ms["ms"]),
            "peak_mib": peak,
            "peak_less_gradients_mib": peak,
            **error,
        }
    ]


def _measure(bench, shape, name: str) -> list[dict]:
    about = {"shape": "x".join(map(str, shape)), "provider": name}
    why = obstacle(name, bench.dry_run)
    if why:
        return [{**about, "pass": "", "note": f"not here: {why}"}]
    provider, at = PROVIDERS[name], problem(bench, *shape)
    rows = []
    for wanted, measure in ((provider.loss, measure_training), (provider.score, measure_scoring)):
        try:
            rows += measure(bench, at, provider) if wanted else []
        except torch.cuda.OutOfMemoryError:
            rows.append({"pass": "score" if measure is measure_scoring else "both", "note": "out of memory"})
        finally:
            at.hidden.grad = at.weight.grad = None
    return [{**about, **row} for row in rows]


def seconds_for(shape, name: str) -> float:
    """At 550 TFLOP/s, which the slower peers do not reach: compilation, errors, the rounds of ``Bench.times``."""
    n, d, v = shape
    provider = PROVIDERS[name]
    gemm = 2 * n * d * v / 550e12

    def rounds(each: float) -> float:
        return max(1.0, 5 * each) + 4 * each + 7 * (each + 0.02)

    training = rounds(2 * provider.gemms * gemm) if provider.loss else 0.0
    scoring = rounds(2 * gemm) if provider.score else 0.0
    first = shape == SHAPES[0]
    compiles = {"torch.compile": 10, "quack": 15 if first else 3, "liger, scaled": 15 if first else 3}
    return compiles.get(name, 1.5 if first else 0.5) + training + scoring


def _rank(shape, name: str) -> int:
    """At the shapes of the bars ours first, then the few peers."""
    if shape in (*SHAPES[:2], TINY):
        return 0 if name in OURS and name not in LATER else 1 if name in (*LATER, *PEERS) else 3
    return 2 if name in FEW else 3


def _items(section: str, shapes, names, dry_run: bool) -> list[Item]:
    return [
        Item(
            section,
            f"{'x'.join(map(str, shape))} {name}",
            functools.partial(_measure, shape=shape, name=name),
            0.0 if dry_run else seconds_for(shape, name),
            PROVIDERS[name].other,
            _rank(shape, name) if section == "compare" else 3,
        )
        for shape in ([TINY] if dry_run else shapes)
        for name in names
    ]


def compare(dry_run: bool) -> list[Item]:
    return _items("compare", SHAPES, PROVIDERS, dry_run)


def hard(dry_run: bool) -> list[Item]:
    return _items("hard", HARD, FEW[:-1], dry_run)


def curve(dry_run: bool) -> list[Item]:
    return _items("curve", CURVE, FEW[:-1], dry_run)


def _masked(bench, shape, name: str) -> list[dict]:
    """The time of a batch of which half the rows are ignored, over that of the same batch without ignored rows."""
    about = {"shape": "x".join(map(str, shape)), "provider": name}
    why = obstacle(name, bench.dry_run)
    if why:
        return [{**about, "note": f"not here: {why}"}]
    provider, at = PROVIDERS[name], problem(bench, *shape)
    half = at.labels.clone()
    half[::2] = IGNORED
    hidden, weight, _, token_weight = at.inputs(provider.weighted)
    leaf = weight.detach() if provider.frozen else weight

    def training(labels):
        def step():
            hidden.grad = weight.grad = None
            provider.loss(hidden, leaf, labels, token_weight).backward()

        return step

    timings = bench.total({"full": training(at.labels), "half": training(half)})
    hidden.grad = weight.grad = None
    full, masked = timings["full"], timings["half"]
    return [{**about, "full_ms": full["ms"], **masked, "of_full": masked["ms"] / full["ms"]}]


MASKED = (
    "ours, one pass",
    "ours, one pass, num_active",
    "ours, any gradient, 512 MB",
    "ours, frozen head",
    "plain",
    "liger, factor 16",
    "cce",
    "trl",
)


def masked(dry_run: bool) -> list[Item]:
    shapes = [TINY] if dry_run else [SHAPES[0], SHAPES[1]]
    return [
        Item(
            "masked",
            f"{'x'.join(map(str, shape))} {name}",
            functools.partial(_masked, shape=shape, name=name),
            0.0 if dry_run else seconds_for(shape, name),
            PROVIDERS[name].other,
            0 if shape == shapes[0] and name in MASKED[:3] else 2,
        )
        for shape in shapes
        for name in MASKED
    ]


def _divergence(bench, shape, name: str) -> list[dict]:
    """Forward and backward of a divergence of two heads, beside its bare GEMMs; errors on a sample of rows."""
    side, about = divergences.SIDES[name], {"shape": "x".join(map(str, shape)), "provider": name}
    why = divergences.obstacle(name, bench.dry_run)
    if why:
        return [{**about, "note": f"not here: {why}"}]
    hidden, weight, ref_hidden, ref_weight = divergences.two_heads(*shape, torch.bfloat16, bench.device)
    sample = (hidden[:SAMPLE].detach().requires_grad_(), weight, ref_hidden[:SAMPLE], ref_weight)
    errors = divergences.errors(name, sample)

    def step():
        torch.autograd.grad(side.loss(hidden, weight, ref_hidden, ref_weight), (hidden, weight))

    peak, bare = bench.peak_mib(step), bare_gemms(divergences.GEMMS, hidden.detach(), weight.detach())
    timings = bench.total({"ours": step, "gemms": bare})
    ms, gemms = timings["ours"], timings["gemms"]
    returned = (hidden.nbytes + weight.nbytes) / MIB
    ratios = _against_gemms(ms, gemms, divergences.GEMMS, divergences.GEMMS)
    return [
        {
            **about,
            "pass": "both",
            **ms,
            **ratios,
            "peak_mib": peak,
            "peak_less_gradients_mib": peak - returned,
            **errors,
        }
    ]


def divergence(dry_run: bool) -> list[Item]:
    """The reference as wide as the policy, so that the bare GEMMs are as many of one size."""

    def seconds(shape) -> float:
        n, d, v = shape
        return 0.0 if dry_run else 4 + 16 * 3 * divergences.GEMMS * 2 * n * d * v / 550e12

    return [
        Item(
            "divergence",
            f"{'x'.join(map(str, shape))} {name}",
            functools.partial(_divergence, shape=shape, name=name),
            seconds(shape),
            side.module is not None,
            3,
        )
        for shape in ([TINY] if dry_run else SHAPES[:2])
        for name, side in divergences.SIDES.items()
    ]


SECTIONS = {"compare": compare, "masked": masked, "divergence": divergence, "hard": hard, "curve": curve}
