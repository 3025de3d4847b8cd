"""Drivers: processes that import once, and then run each command in forked children.

A command is a JSON object on one line. This module has both ends of the pipe.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch


class Driver:
    """The end that sends commands. `script` is a file beside this one whose main loop is over `commands`."""

    def __init__(self, script: str):
        command = [sys.executable, str(Path(__file__).with_name(script))]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def send(self, command: dict[str, Any]) -> Any:
        """Send a command; return its answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


class Ranks(Driver):
    """See ranks_driver.py."""

    def run(
        self, what: str, log: Path, args: Any = (), world_size: int = 3, signals: dict[int, Any] | None = None
    ) -> list[int]:
        """Run the processes to their end; return their exit statuses."""
        command = {"what": what, "args": args, "log": str(log), "world_size": world_size}
        return self.send({**command, "signals": signals or {}})["status"]


def commands(imported_once: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The end that obeys: the commands, until the other end is closed."""
    for module in imported_once:
        importlib.import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        yield json.loads(line)


def output(log: Path, rank: int) -> str:
    return log.with_name(f"{log.name}.{rank}").read_text()
