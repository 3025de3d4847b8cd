"""Trainings of expert 0 that are interrupted, and the undisturbed one that they must equal."""

from pathlib import Path
from typing import Any

import made_training as made
from cbtm_pipeline import train_expert
from made_driver import Driver
from made_training import NEVER

Change = tuple[str, str]


def reference(outdir: Path, n_steps: int) -> bytes:
    """Weights of expert 0 after an undisturbed training in this process, which saves nothing."""
    where = made.files(outdir, "0", to=f"undisturbed-{n_steps}")
    if not where.out.exists():
        made.train(made.make_config(steps=n_steps, run=NEVER), where, "0")
    return where.out.read_bytes()


class Crashes(Driver):
    """See crash_driver.py."""

    def __init__(self, outdir: Path):
        super().__init__("crash_driver.py")
        self.outdir = outdir

    def run(
        self, n_steps: int, where: train_expert.Files, at: int = 0, signal: str = "SIGKILL"
    ) -> tuple[int, list[Change]]:
        """Train expert 0 in a child that gets the signal before its `at`-th change to files.

        Returns the exit status and the changes.
        """
        root = where.work.parents[1]
        answer = self.command(n_steps, where, "changes", at, signal)
        return answer["status"], [(event, path.removeprefix(f"{root}/")) for event, path in answer["changes"]]

    def command(
        self, n_steps: int, where: train_expert.Files, count: str, at: int, signal: str = "SIGKILL"
    ) -> dict[str, Any]:
        """The driver's answer; see crash_driver.py."""
        root = where.work.parents[1]
        args = command_line(self.outdir, n_steps, where)
        return self.send(
            {
                "args": args,
                "root": f"{root}/",
                "count": count,
                "at": at,
                "signal": signal,
                "log": f"{root}.log",
            }
        )


def command_line(outdir: Path, n_steps: int, where: train_expert.Files) -> list[str]:
    paths = [
        ("--data", where.data),
        ("--tokenizer", where.tokenizer),
        ("--seed-model", where.seed_model),
        ("--out", where.out),
    ]
    options = [
        ("--config", outdir / f"{n_steps}.json"),
        ("--expert", "0"),
        *paths,
        ("--work", where.work),
        ("--threads", 1),
    ]
    return [str(part) for option in options for part in option]
