"""The cases that every op test runs over, and the comparison: our op, the fp64 twin, plain torch on the same inputs."""

from dataclasses import dataclass, field

import torch

from tests.tolerance import assert_gradient, assert_result
from var_kernels.ops import linear_logprob, linear_weighted_nll
from var_kernels.reference import linear_logprob_ref, linear_weighted_nll_ref

SMALL = (63, 72, 507)  # N, D, V: multiples of nothing


@dataclass(frozen=True)
class Case:
    """One regime. logits: their scale (0.1: flat rows, 30: confident ones). tight: a budget of ragged chunks.
    bias_dtype: None is dtype.
    """

    id: str
    dtype: torch.dtype = torch.float32
    shape: tuple[int, int, int] = SMALL
    bias: bool = False
    bias_dtype: torch.dtype | None = None
    ignored: float = 0.3
    targets: int = 1
    logits: float = 3.0
    offset: float = 0.0
    tight: bool = False
    frozen: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    workspace_mb: float | None = None

    def inputs(self, device="cpu", seed=0):
        """hidden, lm_head_weight, labels, bias: leaves, requiring grad unless frozen; rounded to the case's dtype."""
        n, d, v = self.shape
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden = normal(n, d)
        weight = normal(v, d) * (self.logits / d**0.5)
        bias = normal(v) + self.offset if self.bias else None
        labels = torch.randint(0, v, (n, self.targets) if self.targets > 1 else (n,), generator=generator)
        # Half of the labels are likely ones: confident rows behave unlike flat ones.
        top = (hidden @ weight.T).argmax(-1)
        half = torch.arange(n) % 2 == 0
        likely = top.unsqueeze(-1).expand_as(labels) if self.targets > 1 else top
        labels = torch.where(half.view(-1, *[1] * (labels.dim() - 1)), likely, labels)
        labels[torch.rand(labels.shape, generator=generator) < self.ignored] = -100

        def leaf(name, t):
            if t is None:
                return None
            dtype = (name == "bias" and self.bias_dtype) or self.dtype
            return t.to(device, dtype).requires_grad_(name not in self.frozen)

        return leaf("hidden", hidden), leaf("weight", weight), labels.to(device), leaf("bias", bias)

    def low_rank(self, dtype=None, rank=3, device="cpu"):
        """Two factors for these inputs, rounded to ``dtype``; their product is about as large as the logits."""
        n, _, v = self.shape
        generator = torch.Generator().manual_seed(7)
        left = torch.randn(n, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(v, rank, generator=generator, dtype=torch.float64) * (self.logits / rank**0.5)
        return tuple(t.to(device, dtype or self.dtype) for t in (left, right))

    @property
    def largest_logit(self) -> float:
        """Where it makes fp32 logits coarse; see ``assert_result``."""
        return max(abs(self.offset), 5 * self.logits) if max(abs(self.offset), self.logits) > 1000 else 0.0

    def workspace(self) -> dict:
        if self.workspace_mb is not None:
            return {"workspace_mb": self.workspace_mb}
        return {"workspace_mb": 0.06 if self.dtype != torch.float64 else 0.12} if self.tight else {}


ALL_OUTPUTS = ("lse", "entropy", "argmax")
BF16 = torch.bfloat16
CASES = [
    Case("flat rows", logits=0.1),
    Case("confident rows", logits=30.0),
    Case("nothing ignored", ignored=0.0),
    Case("ragged chunks", tight=True),
    Case("ragged chunks, all outputs", tight=True, outputs=ALL_OUTPUTS, bias=True),
    Case("bias", bias=True),
    Case("lse", outputs=("lse",)),
    Case("entropy, confident", outputs=("entropy",), logits=30.0),
    Case("softcap", options={"softcap": 5.0}, tight=True, bias=True, outputs=("entropy",)),
    Case("scale", options={"logit_scale": 0.25}, bias=True),
    Case("temperature", options={"temperature": 0.7}),
    Case("scale, softcap, temperature", options={"logit_scale": 0.5, "softcap": 3.0, "temperature": 1.5}),
    Case("label smoothing", options={"label_smoothing": 0.1}, tight=True, bias=True),
    Case("label smoothing 1", options={"label_smoothing": 1.0}, bias=True),
    Case("several targets", targets=5, tight=True),
    Case("several targets, smoothing", targets=3, options={"label_smoothing": 0.2}, outputs=("lse",)),
    Case("several targets, smoothing 1", targets=3, options={"label_smoothing": 1.0}),
    Case("every logit far below 0", bias=True, offset=-1e4),
    Case("logits of 1e4", logits=1e4),
    Case("frozen head", frozen=("weight", "bias"), bias=True),
    Case("frozen head, ragged", frozen=("weight",), tight=True, options={"softcap": 5.0}),
    Case("frozen head, lse and entropy", frozen=("weight",), outputs=("lse", "entropy")),
    Case("frozen hidden", frozen=("hidden",), bias=True, tight=True),
    Case("frozen weight, bias learns", frozen=("weight",), bias=True),
    Case("one row", shape=(1, 72, 507), ignored=0.0),
    Case("tiny vocabulary", shape=(17, 5, 3), bias=True, outputs=ALL_OUTPUTS),
    Case("fp64", dtype=torch.float64, bias=True, outputs=ALL_OUTPUTS, options={"softcap": 5.0, "label_smoothing": 0.1}),
    Case("fp64, ragged", dtype=torch.float64, bias=True, tight=True),
    Case("bf16", dtype=BF16, bias=True),
    Case("bf16, ragged", dtype=BF16, tight=True, outputs=("lse", "entropy")),
    Case("bf16, confident", dtype=BF16, logits=30.0),
    Case("bf16, frozen head", dtype=BF16, frozen=("weight",)),
    Case("bf16, one row", dtype=BF16, shape=(1, 72, 507), ignored=0.0, bias=True),
    Case("bf16, softcap and smoothing", dtype=BF16, tight=True, options={"softcap": 5.0, "label_smoothing": 0.1}),
    Case("fp16", dtype=torch.float16, bias=True),
    Case("bf16, bias of fp32", dtype=BF16, bias=True, bias_dtype=torch.float32, tight=True, outputs=ALL_OUTPUTS),
    Case("fp16, bias of fp32, softcap", dtype=torch.float16, bias=True, bias_dtype=torch.float32,
         options={"softcap": 5.0}),
]  # fmt: skip


def _as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _plain(inputs, dtype):
    """The same leaves for another run, in ``dtype``."""
    return [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]


def check_logprob(case: Case, device="cpu", op=linear_logprob) -> None:
    """Every output and every gradient of ``linear_logprob`` under a non-uniform upstream gradient."""
    hidden, weight, labels, bias = case.inputs(device)
    asked = {f"return_{name}": True for name in case.outputs}
    outputs = _as_tuple(op(hidden, weight, labels, bias, **asked, **case.options, **case.workspace()))
    truth_leaves = _plain((hidden, weight, bias), torch.float64)
    truth = _as_tuple(linear_logprob_ref(*truth_leaves[:2], labels, truth_leaves[2], **asked, **case.options))
    own_leaves = _plain((hidden, weight, bias), case.dtype)
    own = _as_tuple(
        linear_logprob_ref(*own_leaves[:2], labels, own_leaves[2], dtype=case.dtype, **asked, **case.options)
    )

    names = ("logp", *case.outputs)
    assert len(outputs) == len(names)
    differentiable = [i for i, name in enumerate(names) if name != "argmax"]
    for name, got, expected in zip(names, outputs, truth, strict=True):
        if name == "argmax":
            assert torch.equal(got, expected), "argmax"
        else:
            assert_result(got, expected, name, case.largest_logit)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(outputs[i].shape, generator=generator).to(device) for i in differentiable]

    def gradients(results, leaves):
        total = sum((results[i].float() if case.dtype != torch.float64 else results[i]).mul(g).sum()
                    for i, g in zip(differentiable, upstream, strict=True))  # fmt: skip
        total.backward()
        return [leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad]

    _compare_gradients((hidden, weight, bias), outputs, truth_leaves, truth, own_leaves, own, gradients)


def _compare_gradients(leaves, outputs, truth_leaves, truth, own_leaves, own, gradients):
    names = [
        name
        for name, leaf in zip(("dhidden", "dweight", "dbias"), leaves, strict=True)
        if leaf is not None and leaf.requires_grad
    ]
    got, expected, baseline = gradients(outputs, leaves), gradients(truth, truth_leaves), gradients(own, own_leaves)
    for name, g, t, o in zip(names, got, expected, baseline, strict=True):
        assert_gradient(g, t, o, name)


def check_weighted_nll(case: Case, engine: str, reduction="sum", z_loss=0.0, device="cpu", op=linear_weighted_nll):
    """Loss and every gradient, the weights' own included, with weights of both signs and some of 0."""
    hidden, weight, labels, bias = case.inputs(device)
    generator = torch.Generator().manual_seed(2)
    token_weight = torch.randn(labels.shape, generator=generator, dtype=torch.float64)
    token_weight[torch.rand(labels.shape, generator=generator) < 0.2] = 0
    token_weight = token_weight.to(device, torch.float64 if case.dtype == torch.float64 else torch.float32)
    common = {"reduction": reduction, "z_loss": z_loss, **case.options}

    loss = op(hidden, weight, labels, token_weight, bias, engine=engine, **common, **case.workspace())
    truth_leaves, own_leaves = _plain((hidden, weight, bias), torch.float64), _plain((hidden, weight, bias), case.dtype)
    truth = linear_weighted_nll_ref(*truth_leaves[:2], labels, token_weight, truth_leaves[2], **common)
    own = linear_weighted_nll_ref(*own_leaves[:2], labels, token_weight, own_leaves[2], dtype=case.dtype, **common)
    # A sum of N terms: the bound of one result times the size of the terms it adds up.
    scale = max(1.0, token_weight.abs().sum().item() if reduction == "sum" else 1.0)
    assert_result(loss / scale, truth / scale, "loss", case.largest_logit)

    def gradients(result, leaves):
        upstream = torch.linspace(0.5, 1.5, max(result.numel(), 1), dtype=result.dtype, device=device)
        (result * (upstream.view(result.shape) if result.dim() else 0.7)).sum().backward()
        return [leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad]

    _compare_gradients((hidden, weight, bias), loss, truth_leaves, truth, own_leaves, own, gradients)
