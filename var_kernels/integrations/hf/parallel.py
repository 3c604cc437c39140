"""An lm_head under tensor parallelism: its weight a DTensor, rows of the vocabulary on each rank.

transformers' tp_plan hands the head plain hidden states, the same on every rank; torch's ``parallelize_module`` makes a
DTensor of them first, and expects one back.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_dtensor(tensor: Tensor) -> bool:
    if not is_traceable_wrapper_subclass(tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathers_weights(model: nn.Module) -> bool:
    """Return whether FSDP1, FSDP2 or ZeRO-3 shards the weights over ranks, which are whole only while they are used."""
    fsdp = any(hasattr(type(m), "reshard") or "_fsdp_wrapped_module" in m._modules for m in model.modules())
    return fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def local_rows(hidden: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(hidden as a plain tensor, whole on every rank, what makes the head's output of a plain tensor).

    Its gradient must be the whole one on every rank, as ``vocab_parallel_logprob`` gives it.
    """
    if not is_dtensor(hidden):
        return hidden, lambda output: output
    from torch.distributed.tensor import DTensor, Replicate

    mesh, everywhere = hidden.device_mesh, [Replicate()] * hidden.device_mesh.ndim
    local = hidden.redistribute(placements=everywhere).to_local(grad_placements=everywhere)
    return local, lambda output: DTensor.from_local(output, mesh, everywhere, run_check=False)


def vocabulary_slice(weight: Any, bias: Any, name: str) -> tuple[Tensor, Tensor | None, Any]:
    """(this rank's rows of the weight, of the bias, the group of the ranks that share the vocabulary).

    Raises:
        ValueError: a DTensor that is sharded in another way.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.ndim != 1 or placements != (Shard(0),) or (bias is not None and not is_dtensor(bias)):
        raise ValueError(
            f"{name}: inside its own forward the lm_head weight is a DTensor placed as {placements}; expected its "
            "vocabulary (and that of its bias) sharded over one group of ranks, (Shard(dim=0),): use the plan "
            "'colwise_gather_output', or leave lm_head out of it"
        )
    return weight.to_local(), None if bias is None else bias.to_local(), mesh.get_group()
