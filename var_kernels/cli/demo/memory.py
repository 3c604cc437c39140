"""Peak memory of one training step, plain loss against fused loss, measured exactly."""

from collections.abc import Callable

import torch

from var_kernels.integrations.hf import fused_lm_head
from var_kernels.integrations.scratch import ScratchSpec, make_model
from var_kernels.measure import peak_extra_bytes


def compare(
    rows: tuple[int, ...], vocab: int, device: torch.device, seed: int, advance: Callable[[], None]
) -> list[dict]:
    """For each number of tokens the peak MiB of forward + backward, through ``model(...).loss`` and ``fused_lm_head``.

    A 2-layer Llama of width 256 in fp32, sequences of 256 tokens, every token labelled; gradients count on both sides.
    """
    model = make_model(ScratchSpec(hidden=256, layers=2, heads=4, vocab=vocab), vocab, 256, seed).to(device)
    points = []
    for num_rows in rows:
        ids = torch.randint(vocab, (num_rows // 256, 256), generator=torch.Generator().manual_seed(seed)).to(device)

        def step(ids=ids) -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        plain = _measure(model, step, device)
        advance()
        with fused_lm_head(model):
            fused = _measure(model, step, device)
        advance()
        points.append({"tokens": num_rows, "vocab": vocab, "plain_mib": plain, "fused_mib": fused})
    return points


def _measure(model, step: Callable[[], None], device: torch.device) -> float:
    model.zero_grad(set_to_none=True)
    peak = peak_extra_bytes(step, device) / 2**20
    model.zero_grad(set_to_none=True)
    return peak
