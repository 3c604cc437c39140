"""How close is close enough: one rule for fp32 results, one for gradients, both against fp64 truth."""

import torch
from torch import Tensor


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def assert_result(got: Tensor, truth: Tensor, name: str = "result", largest_logit: float = 0.0) -> None:
    """fp32 results (logp, lse, entropy, loss): |err| <= 2^-17 max(1, max|truth|); fp64 results 2^-40.

    ``largest_logit``: an fp32 logit of 1e4 is itself only known to 2^-24 of it, and a log-prob is a difference of two.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    bound = (2.0**-40 if got.dtype == torch.float64 else 2.0**-17) * max(1.0, truth.abs().max().item())
    bound = max(bound, 2.0**-23 * largest_logit)
    error = (got.double() - truth.double()).abs().max().item()
    assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"


def assert_gradient(got: Tensor, truth: Tensor, torch_own: Tensor, name: str = "gradient") -> None:
    """Gradients in their own dtype, against truth and what plain torch reaches from the same inputs.

    fp64: rms(err) <= 2^-40 rms. fp32: rms(err) <= max(2^-17, 4 x torch's own) rms. 16 bit: rms(err) <= 2^-8 rms and
    max <= 2 x torch's own + 2^-8 max|truth|.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    truth, error = truth.double(), got.double() - truth.double()
    own_error = torch_own.double() - truth
    scale = rms(truth)
    if got.dtype == torch.float64:
        bound = 2.0**-40 * scale
    elif got.dtype == torch.float32:
        bound = max(2.0**-17 * scale, 4 * rms(own_error))
    else:
        bound = 2.0**-8 * scale
        peak, limit = error.abs().max().item(), 2 * own_error.abs().max().item() + 2.0**-8 * truth.abs().max().item()
        assert peak <= limit, f"{name}: largest error {peak:.3g} above {limit:.3g}"
    assert rms(error) <= bound, f"{name}: rms error {rms(error):.3g} above {bound:.3g}"
