"""A model too large for one GPU: its weights, gradients and optimiser state spread over a group (FSDP2).

Each process keeps one slice of every parameter. Before a layer computes, FSDP2 gathers the slices of its
weights. Once its gradient is known, FSDP2 sums it over the processes and leaves each with its slice of the
sum. The equations are those of one process; only the order in which sums are rounded differs.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cbtm_pipeline.training.loss import NextToken


def shard(loss_of: "NextToken", layers: torch.nn.ModuleList, bf16: bool, device: str) -> None:
    """Spread the parameters over the devices of all processes: each layer by itself, the rest together.

    With `bf16`, the processes send each other the weights in bf16, and gradients in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh

    # This import takes most of a second, and few trainings are sharded.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
        module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction


def send_gradients(loss_of: torch.nn.Module, now: bool) -> None:
    """Set what the next backward pass of a sharded model does with its gradients.

    With `now`, it sums them over the processes; else it only accumulates them. A model that is not sharded
    is left as it is.
    """
    set_sync: Any = getattr(loss_of, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(now)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds only a slice of the tensor."""
    return hasattr(tensor, "full_tensor")


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The slice of a sharded tensor that this process holds; any other tensor itself."""
    slices: Any = tensor
    return slices.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor. All processes must call this together."""
    slices: Any = tensor
    return slices.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, spread as `model` is and on its device.

    If `model` is sharded, this is a slice of the tensor, else a copy of it.
    """
    if not is_sharded(model):
        return tensor.to(model.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    slices: Any = model
    return distribute_tensor(
        tensor.to(slices.device), slices.device_mesh, slices.placements, src_data_rank=None
    )
