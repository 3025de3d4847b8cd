"""What orchestration costs: the plan of a large run, and the waits of a small one on a Slurm cluster in a box.

    python benchmarks/orchestration.py            # plan and box (needs Slurm's packages; as root it installs them)
    python benchmarks/orchestration.py --plan     # the plan only

Plan: 128 experts on clusters and as many on random ones, a corpus of 1 000 files; seconds until Snakemake knows its jobs.
Box: the small project of the tests. From the command to the first training (seed included) and to the first expert, from the last
expert's end to the final report, the commands that asked Slurm something, and the memory of the launchers.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]

from slurm.box import Box, install  # noqa: E402
from slurm.runs import write_profile  # noqa: E402

from made_project import make_project, snakemake_command, write_corpus  # noqa: E402


def plan(folder: Path) -> None:
    """Print the size of a large plan and how long it takes to make."""
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
    print(
        f"plan, k = 128, 1 000 files: {min(seconds):.1f} s (best of 3; worst {max(seconds):.1f}), {n_jobs} Slurm jobs: {counts}",
        flush=True,
    )


def counting(folder: Path, box: Box) -> dict[str, str]:
    """An environment in which every call of a Slurm command leaves a line in `folder`/asked."""
    bin = folder / "bin"
    bin.mkdir()
    for name in ("squeue", "sacct", "scontrol", "sbatch", "scancel"):
        (bin / name).write_text(
            f'#!/bin/sh\necho {name} >> {folder}/asked\nexec {box.run("which", name)} "$@"\n'
        )
        (bin / name).chmod(0o755)
    return {**box.env, "PATH": f"{bin}{os.pathsep}{box.env['PATH']}", "OMP_NUM_THREADS": "1"}


def on_box(folder: Path) -> None:
    """Print the waits of a whole run."""
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
    first = {
        name: next(row["time"] for row in rows if row["event"] == "started") - began
        for name, rows in happened.items()
    }
    last = max(
        row["time"]
        for name, rows in happened.items()
        if name.startswith("expert-")
        for row in rows
        if row["event"] == "ended"
    )
    ran = sum(
        row["time"] * (1 if row["event"] == "ended" else -1)
        for row in happened["report"]
        if row["event"] in ("started", "ended")
    )
    waits = [
        rows[1]["time"] - rows[0]["time"]
        for rows in happened.values()
        if [row["event"] for row in rows[:2]] == ["submitted", "started"]
    ]
    taken = [
        rows[-1]["time"] - rows[-2]["time"] for rows in happened.values() if rows[-1]["event"] == "taken"
    ]
    asked = (folder / "asked").read_text().split()
    n, rss, pss = max(memory)
    print(f"whole run: {ended - began:.0f} s, {len(happened)} jobs")
    print(
        f"command -> first training: {first['expert-seed']:.1f} s, -> first expert: {min(first['expert-0'], first['expert-1']):.1f} s"
    )
    print(f"last training's end -> report there: {ended - last:.1f} s (report itself {ran:.1f} s)")
    print(f"submission -> start on the node: median {sorted(waits)[len(waits) // 2]:.2f} s")
    print(f"end -> result taken: median {sorted(taken)[len(taken) // 2]:.2f} s")
    print(
        f"asked Slurm: { {name: asked.count(name) for name in sorted(set(asked))} } in {(ended - began) / 60:.1f} minutes"
    )
    print(f"{n} launchers at once: {rss / n / 2**20:.0f} MB RSS, {pss / n / 2**20:.1f} MB PSS each")


def launchers() -> tuple[int, int, int]:
    """How many launchers run now, their RSS and their proportional share of memory in bytes."""
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
    parser.add_argument("--plan", action="store_true", help="no cluster")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan(Path(folder, "plan"))
        if not args.plan:
            if reason := install():
                sys.exit(f"Slurm: {reason}.")
            on_box(Path(folder))


if __name__ == "__main__":
    main()
