"""A model too large for one GPU: weights, gradients and optimiser state spread over the processes of a group (FSDP2).

Each process keeps one slice of every parameter. Before a layer computes, the slices of its weights are gathered; once its gradient is
known, the sums are scattered back. The equations are those of one process, only sums are rounded in another order.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cbtm_pipeline.training.loss import NextToken


def shard(loss_of: "NextToken", layers: torch.nn.ModuleList, bf16: bool, device: str) -> None:
    """Spread the parameters over the devices of all processes: each layer on its own, everything else together. With bf16, weights
    travel in bf16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (  # takes most of a second, and few trainings are sharded
        MixedPrecisionPolicy,
        fully_shard,
    )

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16
        else MixedPrecisionPolicy()
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss_of, mesh=mesh, mp_policy=policy)
    sharded: Any = loss_of
    for module in [sharded, *layers]:
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of the whole batch already
        module.set_force_sum_reduction_for_comms(True)  # gloo can do no other


def send_gradients(loss_of: torch.nn.Module, now: bool) -> None:
    """Whether the next backward pass of a sharded model scatters its gradients, or only adds them up."""
    set_sync: Any = getattr(loss_of, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(now)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a slice of it only."""
    return hasattr(tensor, "full_tensor")


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The slice that this process holds, or the tensor itself."""
    slices: Any = tensor
    return slices.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; all processes have to ask."""
    slices: Any = tensor
    return slices.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which all processes have, in the way in which `model` is spread: a slice, or a copy of all of it, on its device."""
    if not is_sharded(model):
        return tensor.to(model.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    slices: Any = model
    return distribute_tensor(
        tensor.to(slices.device), slices.device_mesh, slices.placements, src_data_rank=None
    )
