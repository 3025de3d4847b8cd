"""Runs train_expert in forked children. A child gets a signal right before its n-th event.

Reads one JSON command per line: {"args", "root", "count", "at", "signal", "log"}. `count` says which events
count: "changes" to the files under `root`, or "calls" of functions of the package `training`. `at` is the
number of the event; at 0 there is no signal. Answers {"status", "changes", "n_calls"}: the exit status
(negative: the signal that ended the child), the changes that the child came to, and its calls (only if they
count, and if it was not killed). A forked child saves the imports. Apart from that it is a process like any
other.
"""

import json
import os
import signal
import sys
from typing import Any

from cbtm_pipeline import train_expert
from cbtm_pipeline.base import cli
from counted import at_call, in_training
from made_driver import commands

IMPORTED_ONCE = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def changed_path(event: str, args: tuple, root: str) -> str | None:
    """The path that an audit event changes; None if it changes nothing under `root`."""
    if event == "open":
        path, _, flags = args
        if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            return None
    elif event in CHANGES:
        path = args[0]
    else:
        return None
    # shutil.rmtree names files relative to an open directory
    relative = event in CHANGES and isinstance(args[-1], int) and args[-1] >= 0
    return str(path) if relative or str(path).startswith(root) else None


def child(command: dict[str, Any], answer: int) -> None:
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    n_changes = 0

    def act() -> None:
        os.kill(os.getpid(), getattr(signal, command["signal"]))

    def watch(event: str, args: tuple) -> None:
        nonlocal n_changes
        path = changed_path(event, args, command["root"])
        if path is not None:
            n_changes += 1
            os.write(answer, json.dumps([event, path]).encode() + b"\n")
            if command["count"] == "changes" and n_changes == command["at"]:
                act()

    sys.addaudithook(watch)
    sys.argv = ["train_expert", *command["args"]]
    if command["count"] == "changes":
        cli.run(train_expert.main)
        return
    n_calls = at_call(command["at"], in_training, act)
    try:
        cli.run(train_expert.main)
    finally:
        sys.setprofile(None)
        os.write(answer, json.dumps(["calls", n_calls()]).encode() + b"\n")


def main() -> None:
    for command in commands(IMPORTED_ONCE):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(read)
                child(command, write)
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as file:
            events = [json.loads(event) for event in file]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        changes = [event for event in events if event[0] != "calls"]
        n_calls = next((n for kind, n in events if kind == "calls"), None)
        print(json.dumps({"status": status, "changes": changes, "n_calls": n_calls}), flush=True)


if __name__ == "__main__":
    main()
