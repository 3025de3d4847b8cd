"""Runs processes that train together, forked from this one, which saves each of them the imports.

Reads one JSON command per line: {"what", "args", "log", "world_size", "signals"}. Each process calls the
function `what` below with `args`: a list for each process, or one for all. `signals` says which process gets
which signal right before which of its steps: {"2": [5, "SIGTERM"]}. Answers {"status"} when all have ended:
exit statuses, negative for a signal. The output of process r goes to `log`.r.
"""

import json
import os
import signal
import socket
import sys
import threading

import torch

import made_training as made
from cbtm_pipeline import plan, train_expert
from cbtm_pipeline.base import cli
from cbtm_pipeline.training import checkpoint, distributed, loss, micro_batch, model, placement
from cbtm_pipeline.training import step as train_step
from counted import at_call, optimizer_step
from crash_driver import IMPORTED_ONCE
from made_driver import commands


def train(*args: str) -> None:
    """The command line."""
    sys.argv = ["train_expert", *args]
    cli.run(train_expert.main)


def gradients() -> None:
    """Print the summed gradients of parameters that all, one or none of the processes use.

    A bucket has at most three numbers.
    """
    distributed.BUCKET = 3
    group = distributed.from_environment(os.environ)
    net = torch.nn.ParameterList([torch.ones(n) for n in (2, 1, 4, 2, 1)])
    net[4].requires_grad = False
    with distributed.joined(group):
        (net[0].sum() * (group.rank + 1)).backward()
        if group.rank == 1:
            net[1].sum().backward()
        (net[3].sum() * 10).backward()
        group.add_gradients(net.parameters())
        sums = group.add_up(torch.tensor(float(group.rank)), group.rank == 2, 0.5)
    print(json.dumps([[None if p.grad is None else p.grad.tolist() for p in net], sums.tolist()]))


def share() -> None:
    """Print process 0's state as each process has it, and the answer of an act that process 0 alone does.

    Process 0 answers after the others have asked.
    """
    group = distributed.from_environment(os.environ)
    tensors = {
        "a": torch.arange(6).reshape(2, 3),
        "b": torch.tensor(0.5),
        "c": torch.tensor([True, False]),
        "d": torch.empty(0),
    }
    n_calls = 0

    def act() -> bool:
        nonlocal n_calls
        n_calls += 1
        group.store.wait([f"asks {rank}" for rank in range(1, group.world_size)])
        return True

    with distributed.joined(group):
        step, shared = group.share(checkpoint.State(7, tensors) if group.rank == 0 else None)
        shared = {name: [str(t.dtype), t.tolist()] for name, t in shared}
        nothing, _ = group.share(None)
        group.store.set(f"asks {group.rank}", "")
        answer = group.first_does("act", act)
    print(json.dumps([step, nothing, shared, answer, n_calls]))


def small_devices() -> None:
    """Train a whole model and a sharded one for three steps, on devices that are too small.

    Print how each was placed, and its losses.
    """
    group = distributed.from_environment(os.environ)
    train_expert.make_deterministic(1)
    answers = []
    with distributed.joined(group):
        for sharded, total_bytes in ((False, 119.66e6), (True, 118.9e6)):
            micro_batch.device_bytes = lambda device, total_bytes=total_bytes: total_bytes
            loss.CHUNK_LOGITS["cuda"] = 1 << 24
            cfg = made.make_config(steps=3, batch_size=12, micro_batch_size=None, run={"sharded": sharded})
            how = plan.train_expert(cfg, "0")
            net = model.scratch(made.LLAMA, made.VOCAB_SIZE, 0, made.SEQ_LEN, 0)
            placed = placement.place(net, how, cfg.run, group)
            optimizer, bad = train_step.make_optimizer(net, how), torch.tensor(False)
            losses = []
            for step in range(3):
                tokens_BT = torch.randint(
                    300, (6, made.SEQ_LEN + 1), generator=torch.Generator().manual_seed(step)
                )
                part = tokens_BT[group.rank :: group.world_size]
                share = train_step.accumulate(
                    placed.loss_of, part, 6 * made.SEQ_LEN, placed.micro_batch_size, False
                )
                group.add_gradients(net.parameters())
                sums = group.add_up(share)
                train_step.update(optimizer, sums[0], 0.01, 1.0, 100.0, bad)
                losses.append(sums.item())
            answers.append([[placed.micro_batch_size, net.is_activation_checkpointing], losses])
    print(json.dumps(answers))


def one_fails(which: str, how: str) -> None:
    """Process `which` fails. The others wait where nothing wakes them, as they would in NCCL."""
    distributed.GRACE_S = 1.0  # so that the test takes no longer
    never = threading.Event()

    def main() -> None:
        group = distributed.from_environment(os.environ)
        cli.start_logging(f"process {group.rank}", None)
        with distributed.joined(group):
            group.store.set(f"{group.rank} has joined", "")
            if group.rank == int(which):
                group.store.wait([f"{1 - group.rank} has joined"])  # else the other fails while it joins
                if how == "killed":
                    os.kill(os.getpid(), 9)
                raise ValueError("the disk is full")
            if how == "asked":
                group.first_does("never", never.wait)
            never.wait()

    cli.run(main)


def rank(command: dict, index: int, env: dict[str, str]) -> int:
    """Run process number `index` of a command; return its exit status."""
    log = os.open(f"{command['log']}.{index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(env, RANK=str(index), LOCAL_RANK=str(index))
    args = command["args"]
    if str(index) in command["signals"]:
        step, name = command["signals"][str(index)]
        at_call(step, optimizer_step, lambda: os.kill(os.getpid(), getattr(signal, name)))
    try:
        globals()[command["what"]](*(args[index] if args and isinstance(args[0], list) else args))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def main() -> None:
    for command in commands(IMPORTED_ONCE):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        env = {"WORLD_SIZE": str(command["world_size"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pids = []
        for index in range(command["world_size"]):
            pid = os.fork()
            if pid == 0:
                status = 99
                try:
                    status = rank(command, index, env)
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            pids.append(pid)
        status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"status": status}), flush=True)


if __name__ == "__main__":
    main()
