"""The number of sequences in one forward pass: as many as a GPU's memory holds, chosen before the first step.

The memory of a training holds, in bytes, for N parameters, V tokens in the vocabulary, R tokens in a chunk:
    16 N          weights, gradients and AdamW's two moments in float32 (N / processes if they are sharded)
     2 N          a copy of the weights in bf16, under autocast
    R V (4 + 2)   the logits of a chunk, and their gradient (see `loss`)
    M S           what the backward pass needs from M sequences, S bytes each
S is measured: it is the growth of the tensors that autograd keeps, from one sequence to two. torch.compile
keeps less, so the estimate is safe.
"""

import math
from typing import NamedTuple

import torch

from cbtm_pipeline.training import loss, sharding

PER_PARAMETER = 18  # bytes
CPU_TOKENS = 4096  # in one forward pass on a CPU: more are no faster, and fewer leave the matrices too small
USABLE = 0.85  # of a GPU's memory: the rest is for the driver, for fragments and for a layer's temporaries


def device_bytes(device: torch.device) -> float:
    """A GPU's memory. It is infinite for a CPU, where more sequences at once train no faster."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class MicroBatch(NamedTuple):
    """The sequences of a forward pass, and whether the backward pass recomputes activations."""

    micro_batch_size: int
    recompute: bool


def even(batch_size: int, largest: int) -> int:
    """The size of a micro-batch: at most `largest` sequences, in as few micro-batches as possible.

    Up to twice as many micro-batches are accepted if all of them are then equal.
    """
    n = math.ceil(batch_size / min(largest, batch_size))
    equal = next((m for m in range(n, min(2 * n, batch_size) + 1) if batch_size % m == 0), n)
    return math.ceil(batch_size / equal)


def kept_bytes(loss_of: torch.nn.Module, tokens_BT: torch.Tensor, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass. Parameters, buffers and the tokens do not count."""
    known = {
        sharding.own(t).untyped_storage().data_ptr()
        for t in [*loss_of.parameters(), *loss_of.buffers(), tokens_BT]
    }
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=bf16),
    ):
        result = loss_of(tokens_BT)
    result.sum().backward()  # a forward pass without a backward pass breaks a sharded model
    loss_of.zero_grad(set_to_none=True)
    return sum(seen.values())


def sequence_bytes(loss_of: torch.nn.Module, sequence_T: torch.Tensor, bf16: bool) -> int:
    """Bytes that autograd keeps for each further sequence of a forward pass."""
    one, two = (kept_bytes(loss_of, sequence_T.repeat(n, 1), bf16) for n in (1, 2))
    return two - one


def choose(
    batch_size: int,
    n_parameters: int,
    vocab_size: int,
    kept: int,
    kept_recomputing: int,
    total_bytes: float,
    n_shards: int = 1,
) -> MicroBatch:
    """The micro-batch for a GPU with `total_bytes` of memory. `batch_size` is this process's part of a batch.

    `kept` counts the bytes that a sequence keeps for the backward pass; `kept_recomputing` counts them if
    activations are recomputed. That is done only if not even one sequence fits otherwise. Raises ValueError
    if one sequence does not fit even then.
    """
    rows = loss.chunk_rows(vocab_size, "cuda")
    needed = PER_PARAMETER * n_parameters / n_shards + 6 * rows * vocab_size
    free = USABLE * total_bytes - needed
    recompute = kept > free
    if recompute and kept_recomputing > free:
        raise ValueError(
            f"model: {n_parameters:,} parameters need {(needed + kept_recomputing) / 1e9:.0f} GB to train "
            f"on one sequence. Expected at most {USABLE * total_bytes / 1e9:.0f} GB, the usable memory of a "
            "GPU here. Give the experts more GPUs with run.sharded, lower train.seq_len, or choose a smaller "
            "model."
        )
    return MicroBatch(even(batch_size, int(free / (kept_recomputing if recompute else kept))), recompute)
