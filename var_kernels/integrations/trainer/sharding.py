"""Weights that are spread over ranks: FSDP and DeepSpeed ZeRO, as accelerate prepares them for the trainer.

Until then a model is whole on every rank, or on the first alone (FSDP's cpu_ram_efficient_loading), or in parts
(ZeRO-3's zero.Init); afterwards every forward pass of it is a collective, which all ranks must make equally often.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from var_kernels.integrations.hf.calibration import adopt_transform, calibrate
from var_kernels.integrations.hf.forwards import swapped
from var_kernels.integrations.hf.model import find_head, inner_model, is_dtensor
from var_kernels.integrations.trainer.ranks import of_first_rank


def rows_of(weight: Tensor) -> int:
    """The first dimension of a weight, also of one that ZeRO-3 holds in parts."""
    return getattr(weight, "ds_shape", weight.shape)[0]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """The numbers of all parameters, and of those that learn."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by its name, one at a time gathered where ZeRO-3 holds it in parts: a collective."""
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if hasattr(tensor, "ds_id"):
            from deepspeed import zero

            with zero.GatheredParameters([tensor]):
                yield name, tensor.detach()
        else:
            yield name, tensor.detach()


def calibrate_first_rank(model: nn.Module, device: torch.device, rank: int) -> None:
    """``calibrate`` on the first rank, which may be the only one with weights, for all; its refusal is everybody's.

    Before the model is sharded: afterwards mixed precision rounds what it puts out. Partitioned weights cannot run yet;
    there the first batch calibrates.

    Raises:
        ValueError: the head is not understood; the weights are DTensors already.
    """
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise ValueError(
            "model must be whole on every rank, which has rows of its own, got weights that are sharded already "
            "(tensor parallelism, a distributed_config); load it plain, and let accelerate shard it (FSDP, ZeRO)"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # empty here, ZeRO-3 holds them in parts
        find_head(inner_model(model))
        return
    found: Any = None
    if rank == 0:
        try:
            found = calibrate(model)
        except ValueError as error:
            found = error
    found = of_first_rank(found, device)
    if isinstance(found, ValueError):
        raise found
    if rank:
        adopt_transform(model, found)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """A PEFT model's base model, also where FSDP2 spreads it.

    PEFT freezes the adapter and then makes trainable what hangs on its modules: with a unit that FSDP2 left gathered,
    that is the gathered copy, and the shards, which say what learns from the next gathering on, stay frozen.
    """
    with model.disable_adapter():
        yield
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def check_layout(trainer, ref_model: nn.Module | None) -> None:
    """Layouts in which something would be wrong or missing, refused by name.

    Raises:
        ValueError: tensor, context or sequence parallelism; under ZeRO-3 and FSDP1 a second model or a head of its own;
            under any sharding a reference that moves.
    """
    args, method = trainer.args, trainer.method
    layout = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        size = getattr(layout, f"{name}_size", 1) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config: {name}_size must be 1, since the in-batch Z counts each row once and every rank "
                f"holds rows of its own, got {size}; use DDP, FSDP or ZeRO here (docs/scaling.md has losses for loops "
                "of your own)"
            )
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "accelerator_config: even_batches must be True, since every rank takes part in every step, got False; "
            "leave it out (rows that accelerate adds to an epoch's last batch are left out again here)"
        )
    if args.world_size > 1 and args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches must be False, since it cuts the first rank's batches between rows "
            "that belong together, got True; leave it out (every rank reads the data by itself)"
        )
    sharded = weight_sharding(trainer)
    if not sharded:
        return
    for name, why in (
        ("sync_ref_model", "the reference cannot follow the sharded weights"),
        ("online", "completions cannot be drawn from the sharded weights"),
    ):
        if getattr(args, name):
            raise ValueError(f"{name} must be False under {sharded}, where {why}, got True; use DDP")
    if sharded == "FSDP2":
        return
    remedy = "use FSDP2 (fsdp_version: 2), DDP or ZeRO-2"
    if method.head in ("value", "reward"):
        raise ValueError(
            f"method must be one without a head of its own under {sharded}, got {args.method!r}, whose head cannot "
            f"learn there; {remedy}"
        )
    if method.teacher:
        raise ValueError(
            f"method must be one without a second model under {sharded}, got {args.method!r}, whose second model would "
            f"be whole on every rank; {remedy}"
        )
    if method.reference and (ref_model is not None or not args.precompute_ref_log_probs):
        name = "ref_model" if ref_model is not None else "precompute_ref_log_probs=False"
        raise ValueError(
            f"the reference must be the model before training under {sharded}, which scores the data once, got {name}; "
            f"leave it out, or {remedy}"
        )


def weight_sharding(trainer) -> str | None:
    """The sharding of the weights: "FSDP1", "FSDP2", "ZeRO-3", or None."""
    if trainer.is_fsdp_enabled:
        return f"FSDP{getattr(trainer.accelerator.state.fsdp_plugin, 'fsdp_version', 1)}"
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        return "ZeRO-3"
    return None


def place_reference(trainer, model: nn.Module) -> nn.Module:
    """A second model where the first will be: spread by FSDP2, otherwise whole on the device."""
    if weight_sharding(trainer) != "FSDP2":
        return model.to(trainer.accelerator.device)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(trainer.accelerator, model)


@contextmanager
def whole_when_saved(trainer) -> Iterator[None]:
    """Inside the block FSDP gathers the weights that are saved, whatever form its checkpoints have."""
    plugin = trainer.accelerator.state.fsdp_plugin
    config, optimizer_config = (
        swapped(plugin, name, None) for name in ("state_dict_config", "optim_state_dict_config")
    )
    with swapped(plugin, "state_dict_type", plugin.state_dict_type), config, optimizer_config:
        plugin.set_state_dict_type("FULL_STATE_DICT")
        yield
