"""How many sequences go through the model at once: as many as the memory of a GPU takes, found out before the first step.

Of a training the memory holds
    16 N          weights, gradients and AdamW's two moments in float32 (N / processes of each, if they are sharded)
     2 N          the weights once more in bf16, under autocast
    R V (4 + 2)   logits of a chunk, their gradient (see `loss`)
    M S           what M sequences leave for the backward pass, S bytes each
S is measured: by how much the tensors that autograd keeps grow from one sequence to two. torch.compile keeps less, so that this is safe.
"""

import math
from typing import NamedTuple

import torch

from cbtm_pipeline.training import loss, sharding

PER_PARAMETER = 18  # bytes
CPU_TOKENS = 4096  # in one forward pass on processors: more do not make it faster, and fewer leave the matrices too small
USABLE = 0.85  # of a GPU's memory: the rest is for the driver, for fragments and for a layer's own work


def device_bytes(device: torch.device) -> float:
    """A GPU's memory. What processors have is not asked: more sequences at once do not make them faster."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class Plan(NamedTuple):
    """Sequences of a forward pass, and whether activations are computed anew in the backward pass instead of kept."""

    micro_batch_size: int
    recompute: bool


def even(batch_size: int, largest: int) -> int:
    """Sequences of a micro-batch: at most `largest`, in as few micro-batches as possible, equal ones if that takes few more."""
    n = math.ceil(batch_size / min(largest, batch_size))
    equal = next((m for m in range(n, min(2 * n, batch_size) + 1) if batch_size % m == 0), n)
    return math.ceil(batch_size / equal)


def kept_bytes(loss_of: torch.nn.Module, tokens_BT: torch.Tensor, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass, parameters and what is there anyway not counted."""
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
    result.sum().backward()  # a sharded model goes wrong after a forward pass alone
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
) -> Plan:
    """The micro-batch for a GPU with `total_bytes`; `batch_size` is this process's share, `kept` the bytes that a sequence leaves for the
    backward pass, `kept_recomputing` the same with activations computed anew, which is done only where not even one sequence fits without.

    Raises ValueError where weights and optimiser alone do not fit.
    """
    rows = loss.chunk_rows(vocab_size, "cuda")
    needed = PER_PARAMETER * n_parameters / n_shards + 6 * rows * vocab_size
    free = USABLE * total_bytes - needed
    recompute = kept > free
    if recompute and kept_recomputing > free:
        raise ValueError(
            f"model: {n_parameters:,} parameters need {(needed + kept_recomputing) / 1e9:.0f} GB to be trained on one sequence. Expected "
            f"at most {USABLE * total_bytes / 1e9:.0f} GB, what a GPU here has. Give the experts more GPUs with run.sharded, lower "
            "train.seq_len, or choose a smaller model."
        )
    return Plan(even(batch_size, int(free / (kept_recomputing if recompute else kept))), recompute)
