"""One step of a training: the learning rate, the gradient of a batch, and the optimiser that uses it.

Shapes: B sequences, T tokens (seq_len), V tokens in the vocabulary.
"""

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def learning_rate(step: int, n_steps: int, lr: float, schedule: str, final_lr_ratio: float, warmup_ratio: float) -> float:
    """The rate of step 0 ... n_steps - 1: up in equal parts to lr, then down on a line or a cosine to final_lr_ratio * lr at the last."""
    n_warmup = math.ceil(warmup_ratio * n_steps)
    if step < n_warmup:
        return lr * (step + 1) / n_warmup
    done = (step + 1 - n_warmup) / (n_steps - n_warmup)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lr * (final_lr_ratio + (1 - final_lr_ratio) * left)


def use_bf16(precision: str) -> bool:
    """Whether to train under bf16 autocast. Weights, optimiser and loss are float32 in any case."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def make_optimizer(net: torch.nn.Module, how: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": how["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=how["lr"], betas=tuple(how["betas"]), fused=True)


def accumulate(net: "PreTrainedModel", tokens_BT: torch.Tensor, n_targets: int, micro_batch_size: int, bf16: bool) -> torch.Tensor:
    """Add to the parameters what sequences (int64, (B, T + 1)) contribute to the gradient of the mean loss of n_targets tokens.

    Returns their share of that loss (nats per token, float32). With n_targets of a whole batch, loss and gradient of its parts add up to
    those of the batch.
    """
    total = torch.zeros((), device=tokens_BT.device)
    for micro_BT in tokens_BT.split(micro_batch_size):
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=bf16):
            logits_BTV = net(input_ids=micro_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), micro_BT[:, 1:].flatten(), reduction="sum") / n_targets
        loss.backward()
        total += loss.detach()
    return total
