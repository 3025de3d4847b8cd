"""A run for tests of `cbtm status`: trained in part, with the files that rules and launchers leave."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import made_training as made
from cbtm_pipeline import config, status, train_expert
from cbtm_pipeline.ops.status_table import Row
from cbtm_pipeline.slurm import commands, events
from cbtm_pipeline.training import training_log

HOUR = 3600.0


def train(out: Path) -> None:
    """A run whose seed is trained. Expert 0 was stopped after step 6 of 10 and saved; no other has begun."""
    train_expert.make_deterministic(1)
    made.write_corpus(out)
    cfg = made.make_config(run=made.NOW)
    config.write(cfg, out / "config.json")
    made.train(cfg, files(out, "seed"), "seed")
    made.train(cfg, files(out, "0"), "0", made.stop_after(6))


def files(out: Path, name: str) -> train_expert.Files:
    return made.files(out, name)._replace(work=out / "work" / name)


def rows_of(out: Path, name: str) -> list[training_log.Row]:
    return training_log.read(out / "work" / name / "state/metrics.jsonl")


def last_time(out: Path) -> float:
    return rows_of(out, "0")[-1]["time"]


def look(
    out: Path,
    name: str,
    queue: dict[str, commands.QueuedJob] | None = None,
    now: float | None = None,
    kind: str = "expert",
) -> Row:
    """One row; by default an hour after the last step."""
    rows = status.gather(out, queue, last_time(out) + HOUR if now is None else now).rows
    return next(row for row in rows if (row.kind, row.name) == (kind, name))


def say(log: Path, label: str, error: str) -> None:
    """What a rule's module leaves in its log when it fails."""
    code = """
import sys
from pathlib import Path
from cbtm_pipeline.base import cli

def main():
    cli.start_logging(sys.argv[1], Path(sys.argv[2]))
    cli.log.info("working")
    raise ValueError(sys.argv[3])

cli.run(main)
"""
    run = subprocess.run([sys.executable, "-c", code, label, log, error], capture_output=True, text=True)
    assert (run.returncode, "Traceback" in run.stderr) == (1, False)


def job(state: str, reason: str = "None", nodes: str = "") -> dict[str, commands.QueuedJob]:
    return {"17": commands.QueuedJob("17", "expert-0", state, reason, nodes, 0, "token", "", "")}


def submit(
    out: Path, name: str, *kinds: str, job_id: str = "17", fingerprint: str = "f", record: bool = True
) -> Path:
    """The folder of a job with these events, as in a run. "ended 1" is `ended` with exit status 1."""
    folder = out / "slurm" / name
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        event, _, exit_status = kind.partition(" ")
        more: dict[str, Any] = {"status": int(exit_status)} if exit_status else {}
        more |= {"node": "gpu3"} if event in ("started", "ended") else {}
        events.add(folder, event, job_id=job_id, fingerprint=fingerprint, **more)
    if record:
        events.write_json(
            folder / "job.json",
            {"job_id": job_id, "name": name, "token": "token", "fingerprint": fingerprint},
        )
    return folder
