"""One step of a training: the learning rate, the gradient of a batch, and the optimiser that applies it.

Shapes: B sequences, T tokens (seq_len), V tokens in the vocabulary.
"""

import math
from typing import TYPE_CHECKING, Any

import torch

from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import sharding

if TYPE_CHECKING:
    from cbtm_pipeline.training.loss import NextToken


def learning_rate(step: int, plan: TrainingPlan) -> float:
    """The learning rate of a step, 0 <= step < n_steps.

    It rises linearly to lr during the warm-up. Then it falls, linearly or on a cosine, to final_lr_ratio * lr
    at the last step.
    """
    n_warmup = math.ceil(plan.warmup_ratio * plan.n_steps)
    if step < n_warmup:
        return plan.lr * (step + 1) / n_warmup
    done = (step + 1 - n_warmup) / (plan.n_steps - n_warmup)
    left = 1 - done if plan.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return plan.lr * (plan.final_lr_ratio + (1 - plan.final_lr_ratio) * left)


def use_bf16(precision: str) -> bool:
    """Whether to train under bf16 autocast. Weights, optimiser and loss are float32 in any case."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def make_optimizer(net: torch.nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, fused=True)


def accumulate(
    loss_of: "NextToken", tokens_BT: torch.Tensor, n_targets: int, micro_batch_size: int, bf16: bool
) -> torch.Tensor:
    """Add the gradient of sequences (int64, (B, T + 1)): their part of the mean loss of n_targets tokens.

    Returns their part of that loss (nats per token, float32). If n_targets counts a whole batch, the
    losses and gradients of its parts add up to those of the batch. Sharded models exchange gradients in the
    last micro-batch.
    """
    total = torch.zeros((), device=tokens_BT.device)
    micro_batches = tokens_BT.split(micro_batch_size)
    for i, micro_BT in enumerate(micro_batches, 1):
        sharding.send_gradients(loss_of, i == len(micro_batches))
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(micro_BT) / n_targets
        loss.backward()
        total += loss.detach()
    return total


def update(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    lr: float,
    clip_norm: float,
    limit: float,
    bad: torch.Tensor,
) -> torch.Tensor:
    """Take one optimiser step with gradients clipped to the norm `clip_norm`. Return their norm before that.

    `bad` (bool, one number on the device) becomes true if the loss exceeds `limit`, or if the loss or the
    norm is not finite. It then stays true, and the optimiser changes nothing any more. The host never waits
    for the device: the fused kernel divides gradients by grad_scale, and does nothing if found_inf is 1.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = sharding.whole(torch.nn.utils.get_total_norm(gradients))
    bad |= ~(torch.isfinite(norm) & (loss <= limit))
    scaled: Any = optimizer
    scaled.grad_scale, scaled.found_inf = (norm / clip_norm).clamp(min=1.0), bad.float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
