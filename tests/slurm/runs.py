"""Runs of the workflow on the box: projects, the profile, and the state of a training under way."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import yaml

from made_project import ROOT, make_project, snakemake_command

from .box import Box
from .machine import tail, wait

PROFILE = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())


def write_profile(project: Path, rule: str = "train_expert", **resources: Any) -> None:
    """The shipped profile in `project`/slurm, small enough for the box. `resources` are those of one rule."""
    content = {**PROFILE, "set-threads": dict.fromkeys(PROFILE["set-threads"], 1)}
    content["default-resources"] = {**PROFILE["default-resources"], "mem_mb": 1000, "runtime": 30}
    rules = {"train_expert": {"gpus": 1}, "score_expert": {"gpus": 1}}
    content["set-resources"] = {**rules, rule: {**rules.get(rule, {}), **resources}}
    (project / "slurm").mkdir(exist_ok=True)
    (project / "slurm/config.yaml").write_text(yaml.safe_dump(content))


def make_slurm_project(folder: Path, n_steps: int, **sections: dict) -> Path:
    """A project whose experts train for `n_steps` steps of about 6 ms and save every two seconds.

    The batches of the dense expert are 16 times larger.
    """
    train = {
        "steps": n_steps,
        "batch_size": 16,
        "seq_len": 128,
        "micro_batch_size": 16,
        "seed_share": 0.0,
        "controls": [],
    }
    run = {"checkpoint_seconds": 2, "log_seconds": 0.1}
    return make_project(folder, cluster={"k": 16}, train=train, run=run, eval={"stride": 64}, **sections)


class Run:
    """`snakemake --profile slurm` for one expert in a copy of a project, in a session of its own."""

    def __init__(self, box: Box, project: Path, expert: str, **resources: Any):
        self.box, self.project, self.expert = box, project, expert
        self.weights = project / f"results/experts/{expert}/model.safetensors"
        self.work = project / f"results/work/{expert}"
        write_profile(project, **resources)

    @classmethod
    def of_copy(cls, box: Box, original: Path, folder: Path, expert: str, **resources: Any) -> "Run":
        shutil.copytree(original, folder, symlinks=True)
        return cls(box, folder, expert, **resources)

    def start(self, *args: str) -> None:
        target = str(self.weights.relative_to(self.project))
        with (self.project / "snakemake.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*snakemake_command(target, *args, "--profile", "slurm"), "--quiet"],
                cwd=self.project,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.box.env, "OMP_NUM_THREADS": "1"},
            )

    def finish(self, ok: bool = True, timeout: float = 600) -> None:
        wait(lambda: self.process.poll() is not None, timeout, f"end of {self.project}", self.story)
        status = self.process.returncode
        assert (status == 0) == ok, f"exit status {status}\n{self.printed()}"

    def printed(self) -> str:
        return (self.project / "snakemake.log").read_text()

    def story(self) -> str:
        """The cluster, and the last lines of what Snakemake, the launcher and the job have printed."""
        folder = self.project / f"results/slurm/expert-{self.expert}"
        logs = [self.project / "snakemake.log", *sorted(folder.glob("*.log")), *sorted(folder.glob("*.out"))]
        return self.box.story() + "".join(map(tail, logs))

    def kill(self, number: int, everything: bool = False) -> None:
        """Signal Snakemake, or with `everything` its whole process group, as a terminal does."""
        (os.killpg if everything else os.kill)(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """The training log so far, of the training or of the published expert."""
        for path in (self.work / "state/metrics.jsonl", self.weights.with_name("metrics.jsonl")):
            with contextlib.suppress(FileNotFoundError):
                lines = path.read_text().splitlines()
                return [json.loads(line) for line in lines if line.endswith("}")]
        return []

    def step(self) -> int:
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.project / f"results/slurm/expert-{self.expert}/events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["event"] == kind]

    def reach(self, step: int, timeout: float = 600) -> None:
        """Wait until the training has done `step` steps."""
        wait(
            lambda: self.step() >= step or self.process.poll() is not None,
            timeout,
            f"step {step}",
            self.story,
        )
        assert self.process.poll() is None, self.printed()

    def reach_starts(self, n: int, timeout: float = 400) -> None:
        """Wait for the n-th start of the task on a node."""
        wait(
            lambda: len(self.events("started")) >= n or self.process.poll() is not None,
            timeout,
            f"start {n}",
            self.story,
        )

    @property
    def job_id(self) -> str:
        return self.events("submitted")[-1]["job_id"]

    @property
    def node(self) -> str:
        return self.events("started")[-1]["node"]

    def trainer(self) -> int:
        """The training process, from its lock."""
        pid = self.trainer_or_none()
        assert pid, self.printed()
        return pid

    def trainer_or_none(self) -> int | None:
        record = (self.work / ".lock").read_text().strip()
        return json.loads(record)["pid"] if record else None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal waits for a suspended process."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(mask, 16) >> (number - 1) & 1)
