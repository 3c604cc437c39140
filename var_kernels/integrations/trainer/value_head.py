"""Heads beside the lm_head: a value fitted on the reference before training, or one that learns with the policy."""

import logging

import torch
from torch import Tensor, nn

from var_kernels.integrations.data import EncodedRows
from var_kernels.integrations.hf.capture import capture
from var_kernels.integrations.hf.heads import RewardHead, ValueHead
from var_kernels.integrations.hf.model import find_head, head_sizes, inner_model
from var_kernels.integrations.trainer.scoring import over_rows

logger = logging.getLogger(__name__)
_RIDGES = tuple(10.0**power for power in range(-4, 5))  # of the mean squared singular value


def new_head(model: nn.Module, kind: str) -> nn.Module:
    """An untrained head of the lm_head's width: "value" (one number a prompt) or "reward" (AVA's posterior)."""
    _, width = head_sizes(find_head(inner_model(model)))
    return RewardHead(width) if kind == "reward" else ValueHead(width, per="sequence")


@torch.no_grad()
def fit_value_head(head: ValueHead, states: Tensor, rows: EncodedRows, targets: Tensor) -> None:
    """V(x) by ridge regression from the model's hidden state at the end of the prompt: fills ``head``.

    states: (rows, D), see ``prompt_states``. targets: (rows,), averaged over the completions of a prompt. The ridge is
    chosen by generalised cross-validation, so a few prompts or uninformative states give the mean and not noise.
    """
    features = states.double()
    first = torch.tensor([group[0] for group in rows.groups])
    mean = torch.stack([targets[group].double().mean() for group in rows.groups])
    head.weight.copy_(torch.zeros_like(head.weight))
    if len(first) > 1:
        x_PD, centre = features[first] - features[first].mean(0), features[first].mean(0)
        weight, share = _ridge(x_PD, mean - mean.mean())
        head.weight.copy_(weight.float().unsqueeze(0))
        head.bias.copy_((mean.mean() - centre @ weight).float())
        logger.info(
            "value head fitted on %d prompts: it explains %.0f %% of their rewards' variance", len(first), 100 * share
        )
    else:
        head.bias.fill_(mean.mean().item())


def _ridge(x_PD: Tensor, y_P: Tensor) -> tuple[Tensor, float]:
    """(D,) weights, and the share of the variance that they explain out of sample (generalised cross-validation)."""
    u, singular, vt = torch.linalg.svd(x_PD, full_matrices=False)
    along = u.T @ y_P
    rest = y_P.square().sum() - along.square().sum()
    best = (torch.inf, None)
    for ridge in _RIDGES:
        kept = singular.square() / (singular.square() + ridge * singular.square().mean() + 1e-300)
        freedom = len(y_P) - 1 - kept.sum()
        if freedom > 0:
            score = (((1 - kept) * along).square().sum() + rest) * len(y_P) / freedom.square()
            if score < best[0]:
                best = (score.item(), kept)
    constant = y_P.square().sum().item() * len(y_P) / (len(y_P) - 1) ** 2
    if best[1] is None or best[0] >= constant:
        return torch.zeros_like(vt[0]), 0.0
    safe = singular.clamp(min=1e-150)
    return vt.T @ (best[1] / safe * along), 1.0 - best[0] / constant


@torch.no_grad()
def values_of(head: ValueHead, states: Tensor) -> Tensor:
    """(rows,) V(x) of each row's prompt, fp32."""
    return head.cpu()._outputs(states).squeeze(-1)


@torch.no_grad()
def prompt_states(trainer, model: nn.Module, rows: EncodedRows) -> Tensor:
    """(rows, D) fp32 hidden states at the end of each row's prompt; a prompt of several completions is run once."""
    _, width = head_sizes(find_head(inner_model(model)))
    device = trainer.accelerator.device
    prompts, index = distinct_prompts(rows)
    states = torch.zeros(len(prompts), width, device=device)

    def visit(batch: dict[str, Tensor], members: list[int]) -> None:
        last = (prompts.prompt_length[members] - 1).to(device)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with trainer.accelerator.autocast():
            (hidden,), _ = capture(
                model,
                lambda h, _: h[torch.arange(len(last), device=h.device), last.to(h.device)],
                inputs,
                low_rank=True,
            )
        states[members] = hidden.to(device).float()

    over_rows(trainer, model, prompts, visit, "values")
    return trainer.accelerator.reduce(states, "sum").cpu()[index]


def distinct_prompts(rows: EncodedRows) -> tuple[EncodedRows, Tensor]:
    """The prompts alone, each once, and which of them each row has, (rows,)."""
    found: dict[tuple[int, ...], int] = {}
    spans = zip(rows.offset.tolist(), rows.prompt_length.tolist(), strict=False)
    index = [
        found.setdefault(tuple(rows.token_ids[start : start + size].tolist()), len(found)) for start, size in spans
    ]
    size = len(found)
    known = {"reward": None, "is_pair": [False] * size, "where": [""] * size}
    return EncodedRows.of([(ids, ()) for ids in found], [1] * size, **known), torch.tensor(index)
