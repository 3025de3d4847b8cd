"""The training loop: exactly resumable, on one device or several, and never waiting for the device.

`train` is the loop; `Training` holds what a training works with. A GPU already works on the next step while
the host reads the numbers of the step before (loss, gradient norm). The device itself finds out that a loss
is bad, and from then on changes nothing (`step.update`). So the weights are still good when the host learns
of it.

Shapes: B sequences, T tokens (seq_len).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from cbtm_pipeline import config
from cbtm_pipeline.base import lock, parallel
from cbtm_pipeline.base.cli import NEWS, log
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import batches, checkpoint, distributed, model, training_log
from cbtm_pipeline.training.placement import place
from cbtm_pipeline.training.step import accumulate, learning_rate, make_optimizer, update
from cbtm_pipeline.training.validation import USUAL_STEPS, History, validate, validation_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SECOND_ORDER = 1 << 62  # sets the order of batches of a second stage apart from that of the first


def order(plan: TrainingPlan) -> int:
    """The number that decides the order of a training's batches.

    No model must read again, in the same order, what the one has read that it began as.
    """
    return 2 * plan.rng_seed + (plan.expert != "seed") + (SECOND_ORDER if plan.begins else 0)


class Task(NamedTuple):
    """What is trained on what. `state` is the folder of the resumable state; `fingerprint` tells trainings
    apart.
    """

    plan: TrainingPlan
    run: config.Run
    stream: batches.Stream
    validation: batches.Stream | None
    state: Path
    fingerprint: str


class Numbers(NamedTuple):
    """The numbers of a step, computed on the device and summed over the processes."""

    loss: float  # nats per token
    stop_requested: float  # the number of processes that got a signal to stop
    save_due: float  # 1 if process 0 wants to save
    grad_norm: float
    is_bad: float  # 1 if this step or an earlier one was bad
    valid_loss: float | None = None  # of the steps that are validated


class InFlight(NamedTuple):
    """A step that is queued on the device. `read` waits for its numbers."""

    step: int
    lr: float
    limit: float  # a loss above this is bad
    data_wait_s: float  # how long the step waited for its batch
    read: Callable[[], list[float]]


class Diverged(ValueError):
    """A bad step. The model has the weights of the `n_steps` steps before it."""

    def __init__(self, message: str, n_steps: int):
        super().__init__(message)
        self.n_steps = n_steps


class Outcome(NamedTuple):
    """What the steps that have ended ask for."""

    stop: bool
    save: bool


class Training:
    """A training under way: model, optimiser, log, saved states, and the steps that are in flight on the
    device.
    """

    def __init__(self, net: "PreTrainedModel", task: Task, stop: Callable[[], Any], group: distributed.Group):
        self.net, self.task, self.stop, self.group = net, task, stop, group
        self.plan, self.is_first = task.plan, group.rank == 0
        self.placed = place(net, self.plan, task.run, group)
        self.device = self.placed.device
        self.optimizer = make_optimizer(net, self.plan)
        self.first = resume(net, self.optimizer, task.state, task.fingerprint, group)
        self.bad = torch.zeros((), dtype=torch.bool, device=self.device)
        self.n_ahead = 1 if self.device.type == "cuda" else 0  # steps that are queued before one is read
        validations = self.plan.validations if task.validation else 0
        self.validation_steps = validation_steps(self.plan.n_steps, validations)
        self.in_flight: deque[InFlight] = deque()
        self.saved_at = time.monotonic()
        self.metrics: training_log.Metrics | None = None

    def __enter__(self) -> Self:
        """Open the log, on process 0, and begin to read batches and to save states in threads."""
        plan, task, path = self.plan, self.task, self.task.state / "metrics.jsonl"
        with ExitStack() as stack:
            if self.is_first:
                self.metrics = stack.enter_context(training_log.Metrics(path, self.first))
            self.saver = stack.enter_context(checkpoint.Saver())
            reader = stack.enter_context(ThreadPoolExecutor(1))
            earlier = self.group.first_does("history", lambda: training_log.history(path, USUAL_STEPS))
            self.history = History(self.net.config.get_text_config().vocab_size, *earlier)
            project = task.run.wandb if self.is_first else None
            self.track = training_log.tracker(project, plan, task.fingerprint, task.state.parent)
            flops, n_devices = model.flops_per_token(self.net, plan.seq_len), self.group.world_size
            self.progress = training_log.TrainingProgress(
                plan.n_steps, self.first, plan.step_tokens, flops, task.run.log_seconds, n_devices
            )
            steps = range(self.first, plan.n_steps)
            self.batches: Iterator[torch.Tensor] = parallel.in_order(reader, self.read_batch, steps, 1)
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.resources.__exit__(*error)

    def read_batch(self, step: int) -> torch.Tensor:
        """This process's part of a step's batch (int64, (B, T + 1))."""
        plan, part = self.plan, slice(self.group.rank, None, self.group.world_size)
        tokens_BT = batches.batch(self.task.stream, order(plan), step, plan.batch_size, plan.seq_len, part)
        on_host = torch.from_numpy(tokens_BT)
        return on_host.pin_memory() if self.device.type == "cuda" else on_host

    def step(self, step: int) -> None:
        """Queue step number `step` (from 0) on the device."""
        plan, placed, group = self.plan, self.placed, self.group
        asked = time.monotonic()
        tokens_BT = next(self.batches).to(self.device, non_blocking=True)
        data_wait_s = time.monotonic() - asked
        draw = ((plan.rng_seed << 32) + step) * group.world_size + group.rank
        torch.manual_seed(draw % 2**63)  # for dropout, if a pretrained model has it
        loss = accumulate(placed.loss_of, tokens_BT, plan.step_tokens, placed.micro_batch_size, placed.bf16)
        group.add_gradients(self.net.parameters())
        save_due = self.is_first and time.monotonic() - self.saved_at >= self.task.run.checkpoint_seconds
        sums = group.add_up(loss, bool(self.stop()), save_due)
        lr, limit = learning_rate(step, plan), self.history.usual_loss() + plan.max_loss_jump
        norm = update(self.optimizer, sums[0], lr, plan.clip_norm, limit, self.bad)
        numbers = [*sums, norm, self.bad.float()]
        if self.task.validation and step + 1 in self.validation_steps:
            numbers.append(validate(placed, self.task.validation, plan, group))
        read = copy_to_host(torch.stack(numbers))
        self.in_flight.append(InFlight(step + 1, lr, limit, data_wait_s, read))

    def settle(self, n_left: int) -> Outcome:
        """Read the numbers of all steps in flight but the newest `n_left`, and log them.

        Raises Diverged for a bad step. The state before it is saved.
        """
        stop = save = False
        while len(self.in_flight) > n_left:
            flight = self.in_flight.popleft()
            numbers = Numbers(*flight.read())
            if numbers.is_bad:
                self.fail(flight, numbers)
            self.history.losses.append(numbers.loss)
            if numbers.valid_loss is not None:
                self.history.validation.append(numbers.valid_loss)
            if self.metrics:
                self.log(self.metrics, flight, numbers)
            stop, save = stop or numbers.stop_requested > 0, save or numbers.save_due > 0
        return Outcome(stop, save)

    def fail(self, flight: InFlight, numbers: Numbers) -> None:
        """Save the last good state, and raise Diverged, which says what was wrong with the step."""
        if flight.step - 1 > self.first:
            self.save(flight.step - 1)
        raise Diverged(
            f"expert {self.plan.expert}, step {flight.step}: loss {numbers.loss:.4g}, gradient norm "
            f"{numbers.grad_norm:.4g}. Expected finite numbers, and a loss up to {flight.limit:.4g}, "
            "train.max_loss_jump above the usual one. Lower train.lr or train.clip_norm; the last good state "
            f"is kept in {self.task.state}.",
            flight.step - 1,
        )

    def log(self, metrics: training_log.Metrics, flight: InFlight, numbers: Numbers) -> None:
        """Write a step's row to metrics.jsonl and the tracker, and a line for people when one is due."""
        row = {"step": flight.step, "loss": numbers.loss, "grad_norm": numbers.grad_norm, "lr": flight.lr}
        row["data_wait_s"] = flight.data_wait_s
        if numbers.valid_loss is not None:
            row["valid_loss"] = numbers.valid_loss
        row = self.progress.complete(row)
        metrics.add(row)
        self.track(row)
        if self.progress.say(row):
            metrics.sync(durable=False)

    def save(self, step: int) -> None:
        """Begin to save the state after `step` steps. All processes must call this."""
        tensors = checkpoint.capture(self.net, self.optimizer, keep=self.is_first)
        if self.metrics:
            lock.check()
            self.metrics.sync()
            self.saver.save(self.task.state, step, self.task.fingerprint, tensors)


def train(
    net: "PreTrainedModel",
    task: Task,
    stop: Callable[[], Any],
    group: distributed.Group = distributed.ALONE,
) -> int | None:
    """Train `net` by the plan of `task`, from its saved state if there is one.

    Returns the number of steps after which the training has ended: fewer than planned if the last `patience`
    validations brought nothing better; None if `stop()` came true and the state is saved. All processes of
    `group` end with the same weights. Raises Diverged for a step whose loss or gradient is not finite, or
    whose loss is far above the usual one; the state before it is saved.
    """
    n_steps, patience = task.plan.n_steps, task.plan.patience
    with Training(net, task, stop, group) as training:
        for step in range(training.first, n_steps):
            if training.history.stalled(patience):
                log.info(
                    "no better validation in the last %s: the training ends after step %d of %d",
                    patience,
                    step,
                    n_steps,
                    extra=NEWS,
                )
                return step
            training.step(step)
            is_last, is_validated = step + 1 == n_steps, step + 1 in training.validation_steps
            outcome = training.settle(0 if is_last or is_validated else training.n_ahead)
            if is_last or not any(outcome):
                continue
            training.settle(0)
            training.save(step + 1)
            training.saved_at = time.monotonic()
            if outcome.stop:
                training.saver.wait()
                log.info(
                    "stopped by a signal: state saved after step %d of %d, start again to go on",
                    step + 1,
                    n_steps,
                    extra=NEWS,
                )
                return None
    return n_steps


def copy_to_host(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy numbers to the host. The result waits for them, and for nothing that is queued after
    them.
    """
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy, event = torch.empty_like(numbers, device="cpu", pin_memory=True), torch.cuda.Event()
    copy.copy_(numbers, non_blocking=True)
    event.record()

    def wait() -> list[float]:
        event.synchronize()
        return copy.tolist()

    return wait


def resume(
    net: "PreTrainedModel",
    optimizer: torch.optim.Optimizer,
    state: Path,
    fingerprint: str,
    group: distributed.Group = distributed.ALONE,
) -> int:
    """Load the state in folder `state` into the model and the optimiser; return its step, 0 if there is none.

    Process 0 of `group` reads the state, and shares it with the others.
    """
    step, tensors = group.share(checkpoint.load(state, fingerprint) if group.rank == 0 else None)
    checkpoint.restore(tensors, net, optimizer)
    if step:
        log.info("going on after step %d", step, extra=NEWS)
    return step
