"""At the head of a real model, on real text: the error of bf16 logits, and how sparse softmax is."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real.models import load, tokens_of
from var_kernels.ops import linear_logprob

ERROR_COLUMNS = ("model", "dtype", "tokens", "head", "loss", "loss_error", "logp_rms", "dhidden_rms", "dweight_rms")
SPARSITY_COLUMNS = ("model", "tokens", "tiles", "kept", "kept_share", "median_p_y")
_CHUNK = 256  # rows at once in fp64
_ROWS, _COLUMNS, _DROPPED = 128, 512, 2.0**-8


@torch.no_grad()
def states(name: str, text: Path, tokens: int, skip: int = 0, dtype=torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (N, D), weight (V, D), labels (N,)) of the model's own run in that dtype, sequences of 256 tokens."""
    model, tokenizer = load(name, dtype)
    ids = tokens_of(text, tokenizer, tokens, min(256, tokens), skip)
    hidden = torch.cat(
        [model.model(input_ids=part, use_cache=False).last_hidden_state[:, :-1] for part in ids.split(4)]
    )
    return hidden.flatten(0, 1), model.get_output_embeddings().weight.detach(), ids[:, 1:].flatten()


def errors(name: str, text: Path, tokens: int, dtype: str) -> list[dict]:
    """Mean loss, the rms error of log-probs and the relative rms error of gradients against fp64, from the same hidden
    states of that dtype: of plain torch, whose logits are rounded to it, and of ours."""
    hidden, weight, labels = states(name, text, tokens, dtype=getattr(torch, dtype))
    logp, dhidden, dweight = _in_fp64(hidden, weight, labels)

    def plain(h, w):
        return F.linear(h, w).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]

    rows = [{"model": name, "dtype": dtype, "tokens": len(labels), "head": "fp64", "loss": -logp.mean().item()}]
    for head, call in (("plain", plain), ("var_kernels", lambda h, w: linear_logprob(h, w, labels))):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        got = call(*leaves)
        (-got.mean()).backward()
        rows.append(
            {
                "model": name,
                "dtype": dtype,
                "tokens": len(labels),
                "head": head,
                "loss": -got.double().mean().item(),
                "loss_error": -got.double().mean().item() + logp.mean().item(),
                "logp_rms": (got.double() - logp).square().mean().sqrt().item(),
                "dhidden_rms": _relative(leaves[0].grad, dhidden),
                "dweight_rms": _relative(leaves[1].grad, dweight),
            }
        )
    return rows


def _in_fp64(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, and the gradients of the mean loss."""
    wide = weight.double()
    logps, dhidden, dweight = [], [], torch.zeros_like(wide)
    for rows, at in zip(hidden.double().split(_CHUNK), labels.split(_CHUNK), strict=True):
        p = torch.softmax(rows @ wide.T, -1)
        logps.append(p.gather(-1, at[:, None])[:, 0].log())
        p[torch.arange(len(at)), at] -= 1
        p /= len(labels)
        dhidden.append(p @ wide)
        dweight.addmm_(p.T, rows)
    return torch.cat(logps), torch.cat(dhidden), dweight


def _relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@torch.no_grad()
def sparsity(name: str, text: Path, tokens: int) -> dict:
    """How many tiles of 128 rows x 512 ids gradients need where a row may drop 2^-8 of 1 - p_y, with the vocabulary in
    the order of its mass on other text."""
    other, weight, _ = states(name, text, tokens, skip=tokens)
    mass = sum(torch.softmax((rows @ weight.T).float(), -1).sum(0) for rows in other.split(_CHUNK))
    order = mass.argsort(descending=True)
    hidden, weight, labels = states(name, text, tokens)
    weight, place = weight[order], order.argsort()[labels]
    pad = -len(weight) % _COLUMNS
    needed = total = 0
    certain = []
    for rows, at in zip(hidden.split(_ROWS), place.split(_ROWS), strict=True):
        p = torch.softmax((rows @ weight.T).float(), -1)
        p_y = p.gather(-1, at[:, None])
        certain.append(p_y)
        tiles = F.pad(p.scatter(-1, at[:, None], 0.0), (0, pad)).view(len(rows), -1, _COLUMNS).sum(-1)
        ascending, by = tiles.sort(-1)
        fits = ascending.cumsum(-1) <= _DROPPED * (1 - p_y)
        dropped = torch.zeros_like(fits).scatter(-1, by, fits)
        dropped[torch.arange(len(rows)), at // _COLUMNS] = False  # the label's own tile
        kept = (~dropped).any(0)
        needed, total = needed + int(kept.sum()), total + kept.numel()
    return {
        "model": name,
        "tokens": len(labels),
        "tiles": total,
        "kept": needed,
        "kept_share": needed / total,
        "median_p_y": torch.cat(certain).median().item(),
    }
