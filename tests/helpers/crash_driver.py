"""Runs train_expert in forked children that get a signal right before their n-th change to the file system, or SIGKILL at some moment.

Reads one JSON command per line, {"args", "root", "at", "signal", "after", "log"} (`after`: seconds, null for never), and answers with
{"status", "events"}: the exit status (negative: the signal that ended it) and the changes under `root` that the child came to. Forking
saves every child the imports; a child is a process like any other, and its SIGKILL is the kernel's.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from cbtm_pipeline import train_expert
from cbtm_pipeline.base import cli
from made_driver import told

IMPORTED_ONCE = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def child(command: dict[str, Any], answer: int) -> None:
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    root = command["root"]

    n_changes = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal n_changes
        if event == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        # shutil.rmtree names files relative to an open directory
        relative = event in CHANGES and isinstance(args[-1], int) and args[-1] >= 0
        if not relative and not str(path).startswith(root):
            return
        n_changes += 1
        os.write(answer, json.dumps([event, str(path)]).encode() + b"\n")
        if n_changes == command["at"]:
            os.kill(os.getpid(), getattr(signal, command["signal"]))

    if command["after"] is not None:
        me = os.getpid()
        if os.fork() == 0:
            time.sleep(command["after"])
            with suppress(ProcessLookupError):
                os.kill(me, signal.SIGKILL)
            os._exit(0)
    sys.addaudithook(watch)
    sys.argv = ["train_expert", *command["args"]]
    cli.run(train_expert.main)


def main() -> None:
    for command in told(IMPORTED_ONCE):
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
        print(json.dumps({"status": status, "events": events}), flush=True)


if __name__ == "__main__":
    main()
