"""A model made ready to train: on its device or spread over several, in micro-batches that fit, compiled."""

import math
import shutil
from typing import TYPE_CHECKING, NamedTuple

import torch

from cbtm_pipeline import config
from cbtm_pipeline.base import device as devices
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import checkpoint, distributed, micro_batch, model, sharding
from cbtm_pipeline.training import step as train_step
from cbtm_pipeline.training.loss import NextToken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The share of a GPU's memory for weights and optimiser. A model that needs less is faster unsharded.
SHARDED_ABOVE = 0.6


class Placed(NamedTuple):
    """A model ready to train: the module that gives its loss, its micro-batch, precision and device."""

    loss_of: NextToken
    micro_batch_size: int
    bf16: bool
    device: torch.device


def place(
    net: "PreTrainedModel", plan: TrainingPlan, run: config.Run, group: distributed.Group = distributed.ALONE
) -> Placed:
    """Put the model on its device, or its shards on all devices; choose the micro-batch; compile the layers.

    Raises ValueError if the memory is too small, or if a batch does not divide evenly for a sharded model.
    """
    bf16, n, world = train_step.use_bf16(plan.precision), model.n_parameters(net), group.world_size
    device = devices.best()
    total_bytes = micro_batch.device_bytes(device)
    sharded = world > 1 and (
        run.sharded
        if run.sharded is not None
        else micro_batch.PER_PARAMETER * n > SHARDED_ABOVE * total_bytes
    )
    if sharded and plan.batch_size % world:
        raise ValueError(
            f"train.batch_size: {plan.batch_size} sequences on {world} processes. "
            f"Expected a multiple of {world}, as the model is sharded. Change it, or the number of GPUs."
        )
    group.same_weights(net.train())
    loss_of, layers = NextToken(net), model.layers(net)
    if sharded:  # this moves the model to the device piece by piece
        sharding.shard(loss_of, layers, bf16, device.type)
    else:
        devices.move(net)
    chosen = _micro_batch(
        loss_of, plan, bf16, device, total_bytes, -(-plan.batch_size // world), world if sharded else 1
    )
    _recompute(net, chosen.recompute)
    # On a CPU, compiling takes longer than it saves in a small training. There, people must ask for it.
    if plan.compile or (
        plan.compile is None and device.type == "cuda" and (shutil.which("cc") or shutil.which("gcc"))
    ):
        for layer in layers:
            layer.compile(dynamic=False)
        loss_of.chunk = torch.compile(loss_of.chunk, dynamic=False)
    notes = [f"{group.world_size} processes"] if group.world_size > 1 else []
    notes += [
        f"{chosen.micro_batch_size} sequences at once",
        *["activations recomputed"] * chosen.recompute,
        *["sharded"] * sharded,
    ]
    log.info("%s, %s", device, ", ".join(notes))
    return Placed(loss_of, chosen.micro_batch_size, bf16, device)


def _micro_batch(
    loss_of: NextToken,
    plan: TrainingPlan,
    bf16: bool,
    device: torch.device,
    total_bytes: float,
    batch_size: int,
    n_shards: int,
) -> micro_batch.MicroBatch:
    """The micro-batch that the config sets, or the largest one that the memory holds."""
    requested = plan.recompute
    if plan.micro_batch_size is not None:
        return micro_batch.MicroBatch(min(plan.micro_batch_size, batch_size), bool(requested))
    if math.isinf(total_bytes):
        largest = max(1, micro_batch.CPU_TOKENS // plan.seq_len)
        return micro_batch.MicroBatch(micro_batch.even(batch_size, largest), bool(requested))
    sequence_T, net = torch.zeros(plan.seq_len + 1, dtype=torch.int64, device=device), loss_of.net
    kept = micro_batch.sequence_bytes(loss_of, sequence_T, bf16)
    _recompute(net, True)
    # what is kept between all layers, and what one layer keeps while its activations are recomputed
    recomputing = micro_batch.sequence_bytes(loss_of, sequence_T, bf16) + kept // len(model.layers(net))
    if requested is not None:
        kept = recomputing = recomputing if requested else kept
    vocab_size = net.config.get_text_config().vocab_size
    chosen = micro_batch.choose(
        batch_size, model.n_parameters(net), vocab_size, kept, recomputing, total_bytes, n_shards
    )
    return chosen if requested is None else chosen._replace(recompute=requested)


def _recompute(net: "PreTrainedModel", on: bool) -> None:
    """Set whether the backward pass recomputes activations."""
    if on:
        net.activation_checkpointing_enable({"use_reentrant": False})
    else:
        net.activation_checkpointing_disable()


def gathered(net: "PreTrainedModel", keep: bool) -> "PreTrainedModel | None":
    """The whole model, or None in processes that do not `keep` it. All processes must call this together.

    It is `net` itself, or a copy on the host if `net` is sharded.
    """
    if not any(sharding.is_sharded(p) for p in net.parameters()):
        return net if keep else None
    tensors = checkpoint.capture(net, keep=keep)
    if not keep:
        return None
    copy = type(net)(net.config)
    copy.generation_config = net.generation_config
    with torch.no_grad():
        for name, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
            tensor.copy_(tensors[f"model.{name}"])
    return copy
