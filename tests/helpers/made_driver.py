"""Processes that import once and then do what they are told, a JSON object a line, each time in forked children: both ends of the pipe."""

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
    """The end that tells: `script` is a file beside this one whose main loop is `told`."""

    def __init__(self, script: str):
        command = [sys.executable, str(Path(__file__).with_name(script))]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def tell(self, command: dict[str, Any]) -> Any:
        """Send a command; return the first answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


def told(imported_once: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The end that obeys: the commands, until the other end is closed."""
    for module in imported_once:
        importlib.import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        yield json.loads(line)
