"""One training on several processes (torchrun, srun): their group, what they share, how they end together.

Process 0 holds the lock, and reads and writes all state; the others only compute. `Group.add_gradients` sums
the gradients. torch's DistributedDataParallel is not used: it changes the layout of its buckets after the
first step. The layout sets the order of summation, so a resumed training would end with other bits than one
that was never stopped. (With find_unused_parameters the layout stays, but each start logs a warning.)
DistributedDataParallel overlaps sending with the last micro-batch, which gains little if a batch has many.
"""

import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cbtm_pipeline.base.cli import log
from cbtm_pipeline.training import checkpoint, sharding

JOIN_S = 600.0  # the nodes of a job start at different moments
TIMEOUT_S = 1800.0  # of an exchange: the others wait in it while process 0 saves
POLL_S = 0.5  # between two checks for a failure
GRACE_S = 30.0  # a process has this time to end by itself after another one has ended or failed
LINGER_S = 5.0  # process 0 keeps the store this long after a failure, so that the others can read the reason
BUCKET = 1 << 24  # the most gradients (64 MB) in one sum, unless one parameter has more

A = TypeVar("A")


class Group:
    """The processes that train one model together.

    This process has number `rank` of `world_size`, and number `local_rank` on its host.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = torch.device("cpu")
        self.store: Any = None  # small values by name; process 0 or torchrun holds it
        self.known_failure: str | None = None

    def first_does(self, name: str, act: Callable[[], A]) -> A:
        """Call `act` on process 0, and return its answer (JSON data) on all processes.

        There is no time limit. A name can be used only once. Raises RuntimeError if another process fails.
        """
        if self.world_size == 1:
            return act()
        if self.rank == 0:
            answer = act()
            self.store.set(name, json.dumps(answer))
            return answer
        while not self.store.check([name]):
            if self.failure():
                raise RuntimeError("no answer from process 0")
            time.sleep(0.1)
        return json.loads(self.store.get(name))

    def failure(self) -> str | None:
        """The process that failed and the reason; None if none is known to have failed."""
        try:
            if not self.known_failure and self.store.check(["failure"]):
                self.known_failure = self.store.get("failure").decode()
        except RuntimeError:
            self.known_failure = self.known_failure or "process 0 is gone"
        return self.known_failure

    def leave(self, patience_s: float) -> None:
        """Say in the store that this process does not need it any more.

        Process 0 waits up to `patience_s` for the others, because the store ends with it.
        """
        names = [f"{rank} left" for rank in range(self.world_size)]
        deadline = time.monotonic() + patience_s
        with suppress(RuntimeError):
            self.store.set(names[self.rank], "")
            while self.rank == 0 and not self.store.check(names) and time.monotonic() < deadline:
                time.sleep(0.01)

    def share(self, state: checkpoint.State | None) -> tuple[int, Iterable[tuple[str, torch.Tensor]]]:
        """Send process 0's state to all processes; return its step, and its tensors one after the other.

        `state` is None on the others. It is None on process 0 if there is no state; then the step is 0.
        """
        if self.world_size == 1:
            return (state.step, state.tensors.items()) if state else (0, [])
        entries = [[name, str(t.dtype), t.shape] for name, t in state.tensors.items()] if state else []
        header = json.dumps([state.step if state else 0, entries]).encode()
        size = torch.tensor([len(header)], device=self.device)
        dist.broadcast(size, 0)
        text = torch.tensor(
            list(header) if self.rank == 0 else [0] * int(size), dtype=torch.uint8, device=self.device
        )
        dist.broadcast(text, 0)
        step, entries = json.loads(bytes(text.tolist()))

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape in entries:
                tensor = torch.empty(
                    shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=self.device
                )
                if state:
                    tensor.copy_(state.tensors[name])
                dist.broadcast(tensor, 0)
                yield name, tensor

        return step, tensors()

    def same_weights(self, net: torch.nn.Module) -> None:
        """Copy process 0's weights and buffers to all processes. The model must not be sharded."""
        if self.world_size > 1:
            for tensor in [*net.parameters(), *net.buffers()]:
                copy = tensor.data.to(self.device)  # NCCL sends from GPU memory only
                dist.broadcast(copy, 0)
                tensor.data.copy_(copy)

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes.

        A parameter that has no gradient on any process keeps none. Sharded parameters are skipped, because
        their gradients are summed already.
        """
        if self.world_size == 1:
            return
        for bucket in _buckets(p for p in parameters if not sharding.is_sharded(p)):
            without = [i for i, p in enumerate(bucket) if p.grad is None]
            n_with = torch.ones(len(bucket), device=self.device)
            if without:
                n_with[without] = 0
            flat = torch.cat(
                [*((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket), n_with]
            )
            dist.all_reduce(flat)
            *sums, n_with = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for i, (p, total) in enumerate(zip(bucket, sums, strict=True)):
                if p.grad is not None:
                    p.grad.copy_(total.view_as(p))
                elif n_with[i] > 0:  # makes the host wait for the device, but happens rarely
                    p.grad = total.view_as(p).clone()

    def add_up(self, *values: torch.Tensor | float) -> torch.Tensor:
        """The sum of each number over the processes (float32, one element for each).

        The host does not wait for it here, only when it reads it. At least one number must be a tensor.
        """
        first = next(v for v in values if isinstance(v, torch.Tensor))
        sums = torch.stack([v if isinstance(v, torch.Tensor) else torch.full_like(first, v) for v in values])
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums


ALONE = Group()


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The trainable parameters in buckets.

    The buckets depend on the model only, so sums have the same order after a resume.
    """
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for p in parameters:
        if not p.requires_grad:
            continue
        if bucket and size + p.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def from_environment(environ: Mapping[str, str]) -> Group:
    """The group that a launcher describes in WORLD_SIZE, RANK and LOCAL_RANK.

    Without WORLD_SIZE it is this process alone. Raises ValueError if a variable is missing or wrong.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if environ.get("WORLD_SIZE", "1") == "1":
        return Group()
    found = {name: environ.get(name) for name in (*names, "MASTER_ADDR", "MASTER_PORT")}
    try:
        rank, world_size, local_rank = (int(found[name] or "") for name in names)
        good = 0 <= rank < world_size and all(found.values())
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f"environment: {', '.join(f'{name}={value}' for name, value in found.items())}. "
            "Expected all of them as torchrun sets them. Unset WORLD_SIZE to train on one process."
        )
    return Group(rank, world_size, local_rank)


@contextmanager
def joined(group: Group) -> Iterator[None]:
    """Connect the processes of a group inside this context. Process 0 leaves last. If one fails, all end.

    Raises ValueError on the processes that end because another one has failed.
    """
    if group.world_size == 1:
        yield
        return
    _connect(group)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(group, ended), name="watch", daemon=True)
    watch.start()
    try:
        yield
        group.first_does("end", lambda: True)
    except BaseException as error:
        ended.set()
        why = group.failure()
        if why is None and "/gloo/" in str(error):  # a process is gone, and gave no reason
            why = "killed?"
        if why and isinstance(error, RuntimeError):
            group.leave(LINGER_S)
            raise ValueError(
                f"process {group.rank}: ended, as another one has failed ({why}). Expected all to go on. "
                "See the log of that one."
            ) from error
        with suppress(RuntimeError):
            group.store.set("failure", f"process {group.rank}: {str(error) or type(error).__name__}")
        group.leave(LINGER_S)
        raise
    ended.set()
    watch.join()
    group.leave(GRACE_S)
    dist.destroy_process_group()


def _connect(group: Group) -> None:
    """Choose this process's GPU; join the store and the process group. Raises ValueError if that fails."""
    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        if group.local_rank >= n_gpus > 1:
            raise ValueError(
                f"LOCAL_RANK: {group.local_rank}. Expected less than {n_gpus}, the GPUs here. "
                "Start one process for each GPU."
            )
        group.device = torch.device("cuda", group.local_rank if n_gpus > 1 else 0)
        torch.cuda.set_device(group.device)
    on_gpu = group.device.type == "cuda"
    try:
        group.store, *_ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_S)))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("group", group.store),
            rank=group.rank,
            world_size=group.world_size,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
            device_id=group.device if on_gpu else None,
        )
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"process {group.rank}: no connection with the others at {address} "
            f"({str(error).splitlines()[0]}). Expected {group.world_size} processes and a free port. "
            "Start again."
        ) from error


def _watch(group: Group, ended: threading.Event) -> None:
    """End this process if another one has failed and this one does not end within GRACE_S.

    With gloo, an exchange with a process that is gone raises an error. With NCCL, it waits for ever.
    """
    while not ended.wait(POLL_S):
        if why := group.failure():
            group.leave(0)
            if not ended.wait(GRACE_S):
                log.error("process %d: ended, as another one has failed (%s)", group.rank, why)
                os._exit(1)
            return
