"""Validation during a training: when, on how much text, and what the losses so far say about the next step.

Shapes: B sequences, T tokens (seq_len).
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch

from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import batches, distributed
from cbtm_pipeline.training.placement import Placed

USUAL_STEPS = 100  # the median loss of so many steps is the usual loss
MAX_SHARE = 0.05  # all validations together read at most this share of the sequences trained on
MAX_TOKENS = 1 << 16  # enough tokens for one validation


class History:
    """The training losses of the last steps, and all validation losses (nats per token)."""

    def __init__(self, vocab_size: int, losses: Iterable[float] = (), validation: Iterable[float] = ()):
        self.losses, self.validation = deque(losses, USUAL_STEPS), list(validation)
        self.guess_loss = math.log(vocab_size)

    def usual_loss(self) -> float:
        """Median of the last steps. While there are few, the loss of a guess among all tokens, or a larger
        one.
        """
        enough = len(self.losses) >= USUAL_STEPS // 5
        return statistics.median(self.losses) if enough else max([self.guess_loss, *self.losses])

    def stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` validations were all no better than the best one before them."""
        if patience is None:
            return False
        before = min(self.validation[:-patience], default=math.inf)
        return min(self.validation[-patience:], default=0) >= before


def validation_steps(n_steps: int, n: int) -> set[int]:
    """The steps after which a training is validated: n of them, spread evenly, the last step included."""
    return {round(n_steps * (i + 1) / n) for i in range(n)} - {0} if n else set()


def validate(
    placed: Placed, stream: batches.Stream, plan: TrainingPlan, group: distributed.Group
) -> torch.Tensor:
    """Mean loss (nats per token) of the first blocks of `stream`: the same blocks at each validation.

    There are as many as MAX_TOKENS and MAX_SHARE allow. The processes of `group` share them.
    """
    seq_len, world = plan.seq_len, group.world_size
    affordable = MAX_SHARE * plan.n_steps * plan.batch_size / plan.validations
    n = max(1, min(stream.n_blocks(seq_len), MAX_TOKENS // seq_len, int(affordable)))
    own = range(group.rank, n, world)
    total = torch.zeros((), device=placed.device)
    placed.loss_of.eval()
    with torch.no_grad(), torch.autocast(placed.device.type, torch.bfloat16, enabled=placed.bf16):
        for start in range(0, -(-n // world), placed.micro_batch_size):
            blocks = own[start : start + placed.micro_batch_size]
            # The last processes may have no block left, but all processes must compute a sharded model.
            tokens_BT = np.stack([stream.read(block * seq_len, seq_len + 1) for block in blocks or [0]])
            loss = placed.loss_of(torch.from_numpy(tokens_BT).to(placed.device))
            total += loss / (n * seq_len) if blocks else 0 * loss
    placed.loss_of.train()
    return group.add_up(total)[0]
