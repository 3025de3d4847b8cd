"""What orchestration costs: the plan of a large run, and the waits of a small one on a Slurm in a box.

    python benchmarks/orchestration.py            # plan and box (installs Slurm's packages, which needs root)
    python benchmarks/orchestration.py --plan     # the plan only

Plan: 128 experts on clusters, 128 on random clusters, and a corpus of 1 000 files. Prints the seconds until
Snakemake knows its jobs.

Box: the small project of the tests. Prints the seconds from the command to the first training (seed included)
and to the first expert, and from the last expert's end to the final report. Also prints how often Slurm was
asked, and the memory of the launchers.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]

from slurm.box import Box  # noqa: E402
from slurm.machine import install  # noqa: E402
from slurm.runs import write_profile  # noqa: E402

from made_project import make_project, snakemake_command, write_corpus  # noqa: E402


def plan(folder: Path) -> None:
    """Print the number of jobs of a large run, and the time in which Snakemake plans them."""
    project = make_project(folder, cluster={"k": 128}, train={"batch_size": 128})
    corpus = project / "corpus"
    corpus.mkdir()
    for i in range(1000):
        write_corpus(corpus / f"{i:04d}.jsonl", 2, i)
    write_profile(project)
    config = yaml.safe_load((project / "small.yaml").read_text())
    config["corpus"]["train"] = ["corpus/*.jsonl"]
    (project / "small.yaml").write_text(yaml.safe_dump(config))
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        run = subprocess.run(
            snakemake_command("-n", "--quiet", "rules", "--profile", "slurm"),
            cwd=project,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.monotonic() - began)
    counts = dict(re.findall(r"^(\w+) +(\d+)$", run.stdout + run.stderr, re.M))
    n_jobs = int(counts["total"]) - 1  # all
    times = f"{min(seconds):.1f} s (best of 3; worst {max(seconds):.1f})"
    print(f"plan, k = 128, 1 000 files: {times}, {n_jobs} Slurm jobs: {counts}", flush=True)


def counting(folder: Path, box: Box) -> dict[str, str]:
    """An environment in which each call of a Slurm command appends a line to `folder`/asked."""
    bin = folder / "bin"
    bin.mkdir()
    for name in ("squeue", "sacct", "scontrol", "sbatch", "scancel"):
        (bin / name).write_text(
            f'#!/bin/sh\necho {name} >> {folder}/asked\nexec {box.run("which", name)} "$@"\n'
        )
        (bin / name).chmod(0o755)
    return {**box.env, "PATH": f"{bin}{os.pathsep}{box.env['PATH']}", "OMP_NUM_THREADS": "1"}


def on_box(folder: Path) -> None:
    """Run the small project on a box, and print the waits."""
    box = Box(folder / "box")
    box.start()
    try:
        project = make_project(folder / "project")
        write_profile(project)
        began = time.time()
        with (project / "log").open("wb") as log:
            run = subprocess.Popen(
                snakemake_command("--profile", "slurm"),
                cwd=project,
                env=counting(folder, box),
                stdout=log,
                stderr=log,
            )
        memory: list[tuple[int, int, int]] = []
        while run.poll() is None:
            memory.append(launchers())
            time.sleep(0.5)
        ended = time.time()
        assert run.returncode == 0, (project / "log").read_text()
        happened = {
            path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
            for path in project.rglob("events.jsonl")
        }
    finally:
        box.stop()
    asked = (folder / "asked").read_text().split()
    print(f"whole run: {ended - began:.0f} s, {len(happened)} jobs")
    print_waits(happened, began, ended)
    minutes = (ended - began) / 60
    print(
        f"asked Slurm: { {name: asked.count(name) for name in sorted(set(asked))} } in {minutes:.1f} minutes"
    )
    n, rss, pss = max(memory)
    print(f"{n} launchers at once: {rss / n / 2**20:.0f} MB RSS, {pss / n / 2**20:.1f} MB PSS each")


def print_waits(happened: dict[str, list[dict[str, Any]]], began: float, ended: float) -> None:
    """Print how long a run waited. `happened`: the events of each job; `began` and `ended` are unix times."""
    first = {
        name: next(row["time"] for row in rows if row["event"] == "started") - began
        for name, rows in happened.items()
    }
    experts = [rows for name, rows in happened.items() if name.startswith("expert-")]
    last = max(row["time"] for rows in experts for row in rows if row["event"] == "ended")
    times = {row["event"]: row["time"] for row in happened["report"]}
    report = times["ended"] - times["started"]
    starts = ["submitted", "started"]
    on_time = [rows for rows in happened.values() if [row["event"] for row in rows[:2]] == starts]
    waits = [rows[1]["time"] - rows[0]["time"] for rows in on_time]
    ends = [rows[-2:] for rows in happened.values() if rows[-1]["event"] == "taken"]
    taken = [taken["time"] - before["time"] for before, taken in ends]
    first_expert = min(first["expert-0"], first["expert-1"])
    print(f"command -> first training: {first['expert-seed']:.1f} s, -> first expert: {first_expert:.1f} s")
    print(f"last training's end -> report there: {ended - last:.1f} s (report itself {report:.1f} s)")
    print(f"submission -> start on the node: median {statistics.median_high(waits):.2f} s")
    print(f"end -> result taken: median {statistics.median_high(taken):.2f} s")


def launchers() -> tuple[int, int, int]:
    """The number of launchers that run now, their resident and their proportional memory in bytes."""
    n = rss = pss = 0
    for process in psutil.process_iter(["cmdline"]):
        if "cbtm_pipeline.slurm.launch" in (process.info["cmdline"] or [])[:3]:
            try:
                memory = process.memory_full_info()
            except psutil.Error:
                continue
            n, rss, pss = n + 1, rss + memory.rss, pss + memory.pss
    return n, rss, pss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="only the plan, no cluster")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan(Path(folder, "plan"))
        if not args.plan:
            if reason := install():
                sys.exit(f"Slurm: {reason}.")
            on_box(Path(folder))


if __name__ == "__main__":
    main()
