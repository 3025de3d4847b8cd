"""The training loop: exactly resumable, on one device or several, and never waiting for the device.

The numbers of a step (loss, gradient norm) are read while a GPU already works on the next one. That a loss is bad is found out on the
device, which then changes nothing any more (`train_step.update`), so that the weights are still good when the host hears of it.

Shapes: B sequences, T tokens (seq_len).
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cbtm_pipeline import config
from cbtm_pipeline.base import lock, parallel
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import batches, checkpoint, distributed, model, training_log
from cbtm_pipeline.training import step as train_step
from cbtm_pipeline.training.placement import Placed, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USUAL = 100  # steps whose median loss is the usual one
VALIDATION_SHARE = (
    0.05  # of the sequences trained on: so many are read for validation at most, over the whole training
)
VALIDATION_TOKENS = 1 << 16  # that are enough for one look


class History:
    """What earlier steps say about the next one: the losses of the last steps, and all validation losses."""

    def __init__(self, vocab_size: int, losses: Iterable[float] = (), validation: Iterable[float] = ()):
        self.losses, self.validation = deque(losses, USUAL), list(validation)
        self.of_a_guess = math.log(vocab_size)

    def usual_loss(self) -> float:
        """Median of the last steps (nats per token), or that of a guess among all tokens while there are few."""
        return (
            statistics.median(self.losses)
            if len(self.losses) >= USUAL // 5
            else max([self.of_a_guess, *self.losses])
        )

    def stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` looks have all been no better than the best one before them."""
        return patience is not None and min(self.validation[-patience:], default=0) >= min(
            self.validation[:-patience], default=math.inf
        )


class Flight(NamedTuple):
    """A step that is queued on the device. `numbers()` waits for it: loss, whether to stop, whether to save, gradient norm, whether it or
    an earlier step was bad, and the validation loss if there was a look."""

    step: int
    lr: float
    limit: float  # above which its loss is bad
    waited_s: float  # for the batch
    numbers: Callable[[], list[float]]


def later(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy numbers to the host. The result waits for them, and for nothing that is queued after."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy, event = torch.empty_like(numbers, device="cpu", pin_memory=True), torch.cuda.Event()
    copy.copy_(numbers, non_blocking=True)
    event.record()

    def wait() -> list[float]:
        event.synchronize()
        return copy.tolist()

    return wait


def looks(n_steps: int, n: int) -> set[int]:
    """The steps after which validation looks, n of them, evenly, the last one included."""
    return {round(n_steps * (i + 1) / n) for i in range(n)} - {0} if n else set()


def validate(
    placed: Placed, stream: batches.Stream, plan: TrainingPlan, group: distributed.Group
) -> torch.Tensor:
    """Mean loss (nats per token) of as much validation text as is worth its time: the first blocks of the stream, the same at each look."""
    seq_len, world = plan.seq_len, group.world_size
    affordable = VALIDATION_SHARE * plan.n_steps * plan.batch_size / plan.validations
    n = max(1, min(stream.n_blocks(seq_len), VALIDATION_TOKENS // seq_len, int(affordable)))
    own = range(group.rank, n, world)
    total = torch.zeros((), device=placed.device)
    placed.loss_of.eval()
    with torch.no_grad(), torch.autocast(placed.device.type, torch.bfloat16, enabled=placed.bf16):
        for start in range(0, -(-n // world), placed.micro_batch_size):
            some = own[
                start : start + placed.micro_batch_size
            ]  # none in the last processes, but a sharded model is computed by all
            tokens_BT = np.stack([stream.read(block * seq_len, seq_len + 1) for block in some or [0]])
            loss = placed.loss_of(torch.from_numpy(tokens_BT).to(placed.device))
            total += loss / (n * seq_len) if some else 0 * loss
    placed.loss_of.train()
    return group.add_up(total)[0]


def resume(
    net: "PreTrainedModel",
    optimizer: torch.optim.Optimizer,
    state: Path,
    fingerprint: str,
    group: distributed.Group = distributed.ALONE,
) -> int:
    """Put what folder `state` holds into the model and the optimiser; return how many steps that was, 0 where there is nothing.

    Process 0 of `group` reads, and all of them get it.
    """
    step, tensors = group.share(checkpoint.load(state, fingerprint) if group.rank == 0 else None)
    checkpoint.restore(tensors, net, optimizer)
    if step:
        log.info("going on after step %d", step)
    return step


def train(
    net: "PreTrainedModel",
    stream: batches.Stream,
    plan: TrainingPlan,
    run: config.Run,
    state: Path,
    fingerprint: str,
    stop: Callable[[], Any],
    group: distributed.Group = distributed.ALONE,
    validation: batches.Stream | None = None,
) -> int | None:
    """Train `net` by the plan `plan`, from the state saved in folder `state` if there is one.

    Returns the number of steps after which the training has ended, fewer than planned where `patience` looks at `validation` saw nothing
    get better; None if `stop()` came true, and state is saved. All processes of `group` end with the same weights. Raises ValueError for a
    step whose loss or gradient is no finite number, or whose loss is far from usual; the state before it is saved.
    """
    n_steps, batch_size, seq_len = plan.n_steps, plan.batch_size, plan.seq_len
    n_tokens = batch_size * seq_len
    order = 2 * plan.rng_seed + (
        plan.expert != "seed"
    )  # experts do not read again, in the same order, what the seed has read
    part = slice(group.rank, None, group.world_size)

    placed = place(net, plan, run, group)
    optimizer = train_step.make_optimizer(net, plan)
    first = resume(net, optimizer, state, fingerprint, group)
    bad = torch.zeros((), dtype=torch.bool, device=placed.device)
    n_ahead = 1 if placed.device.type == "cuda" else 0  # steps that are queued before the one before is read
    validated = looks(n_steps, plan.validations) if validation else set()
    flying: deque[Flight] = deque()
    saved_at = time.monotonic()

    def read(step: int) -> torch.Tensor:
        tokens_BT = torch.from_numpy(batches.batch(stream, order, step, batch_size, seq_len, part))
        return tokens_BT.pin_memory() if placed.device.type == "cuda" else tokens_BT

    with (
        training_log.Metrics(state / "metrics.jsonl", first) if group.rank == 0 else nullcontext() as metrics,
        checkpoint.Saver() as saver,
        ThreadPoolExecutor(1) as reader,
    ):
        earlier = group.first_does("history", lambda: training_log.history(state / "metrics.jsonl", USUAL))
        history = History(net.config.get_text_config().vocab_size, *earlier)
        track = training_log.tracker(run.wandb if metrics else None, plan, fingerprint, state.parent)
        progress = training_log.Progress(
            n_steps, first, n_tokens, model.flops_per_token(net, seq_len), run.log_seconds, group.world_size
        )

        def save(step: int) -> None:
            tensors = checkpoint.capture(net, optimizer, keep=group.rank == 0)
            if metrics:
                lock.check()
                metrics.sync()
                saver.save(state, step, fingerprint, tensors)

        def land(n_left: int) -> tuple[bool, bool]:
            """Read the numbers of all steps but the newest `n_left`. Returns whether to stop, and whether to save."""
            stopping = saving = False
            while len(flying) > n_left:
                step, lr, limit, waited_s, numbers = flying.popleft()
                loss, told, due, norm, is_bad, *valid = numbers()
                if is_bad:
                    if step - 1 > first:
                        save(step - 1)
                    raise ValueError(
                        f"expert {plan.expert}, step {step}: loss {loss:.4g}, gradient norm {norm:.4g}. Expected finite numbers, and a "
                        f"loss up to {limit:.4g}, train.max_loss_jump above the usual one. Lower train.lr or train.clip_norm; the last "
                        f"good state is kept in {state}."
                    )
                history.losses.append(loss)
                history.validation += valid
                row = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "data_wait_s": waited_s}
                row |= {"valid_loss": valid[0]} if valid else {}
                if metrics:
                    row = progress.complete(row)
                    metrics.add(row)
                    track(row)
                    if progress.say(row):
                        metrics.sync(durable=False)
                stopping, saving = stopping or told > 0, saving or due > 0
            return stopping, saving

        tokens = parallel.in_order(reader, read, range(first, n_steps), 1)
        for step in range(first, n_steps):
            if history.stalled(plan.patience):
                log.info(
                    "validation has not got better for %d looks: the training ends after step %d of %d",
                    plan.patience,
                    step,
                    n_steps,
                )
                return step
            asked = time.monotonic()
            tokens_BT = next(tokens).to(placed.device, non_blocking=True)
            waited_s = time.monotonic() - asked
            draw = ((plan.rng_seed << 32) + step) * group.world_size + group.rank
            torch.manual_seed(draw % 2**63)  # dropout, where a pretrained model has it
            loss = train_step.accumulate(
                placed.loss_of, tokens_BT, n_tokens, placed.micro_batch_size, placed.bf16
            )
            group.add_gradients(net.parameters())
            due = group.rank == 0 and time.monotonic() - saved_at >= run.checkpoint_seconds
            sums = group.add_up(loss, bool(stop()), due)
            lr, limit = train_step.learning_rate(step, plan), history.usual_loss() + plan.max_loss_jump
            norm = train_step.update(optimizer, sums[0], lr, plan.clip_norm, limit, bad)
            valid = (
                [validate(placed, validation, plan, group)] if validation and step + 1 in validated else []
            )
            flying.append(
                Flight(step + 1, lr, limit, waited_s, later(torch.stack([*sums, norm, bad.float(), *valid])))
            )

            stopping, saving = land(0 if valid or step + 1 == n_steps else n_ahead)
            if (stopping or saving) and step + 1 < n_steps:
                land(0)
                save(step + 1)
                saved_at = time.monotonic()
            if stopping and step + 1 < n_steps:
                saver.wait()
                log.info(
                    "told to stop: state saved after step %d of %d, start again to go on", step + 1, n_steps
                )
                return None
    return n_steps
