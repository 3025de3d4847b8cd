"""What a run is and would submit, as Snakemake sees it: its config, its profile, its jobs by a dry run. Nothing is submitted."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cbtm_pipeline.slurm import commands, request

# Every rule in one small graph: what is submitted depends on the rule, not on the number of experts.
SMALL = {"cluster": {"k": 1}, "train": {"controls": ["random"]}}


class Job(NamedTuple):
    """A rule that goes to Slurm, with its resources from Snakemake. `resumable`: a training, with one task per GPU."""

    rule: str
    resources: dict[str, Any]
    threads: int
    resumable: bool

    @property
    def partitions(self) -> list[str]:
        """Slurm takes several, and the job starts in the first that can."""
        return str(self.resources["slurm_partition"]).split(",")

    @property
    def n_gpus(self) -> int:
        """Per node."""
        return int(self.resources.get("gpus", 0))

    @property
    def n_nodes(self) -> int:
        return int(self.resources.get("nodes", 1))

    @property
    def sbatch(self) -> dict[str, Any]:
        """What the launcher will ask for. Raises ValueError that names the resource."""
        return request.sbatch_parameters(self.rule, self.resources, self.threads, "", self.resumable)


def merge(base: Any, over: Mapping[str, Any]) -> Any:
    """`over` laid over `base`, section by section, as Snakemake does it with --configfile."""
    if not over:
        return base
    merged = dict(base) if isinstance(base, Mapping) else {}
    return merged | {
        key: merge(merged.get(key, {}), value) if isinstance(value, Mapping) else value
        for key, value in over.items()
    }


def read_config(paths: Sequence[str]) -> Any:
    """The config of a run, each file laid over those before it. Raises ValueError that names the file, OSError."""
    content: Any = {}
    for path in paths:
        try:
            read = yaml.safe_load(Path(path).read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: not YAML ({' '.join(str(error).split())}). Expected keys of config.yaml. Mend the file."
            ) from error
        if not isinstance(read, dict):
            raise ValueError(
                f"{path}: no sections. Expected sections such as corpus and train. Mend the file."
            )
        content = merge(content, read)
    return content


def profile_file(name: str) -> Path | None:
    """Where Snakemake finds a profile: by path, else by name in the user's and the site's folders."""
    homes = [
        os.environ.get("XDG_CONFIG_HOME") or "~/.config",
        (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")[0],
    ]
    for path in [Path(name), *(Path(home).expanduser() / "snakemake" / name for home in homes)]:
        if path.is_file():
            return path
        files = path.iterdir() if path.is_dir() else ()
        if found := [file for file in files if re.fullmatch(r"(profile|config)(\.v\d+\+)?\.yaml", file.name)]:
            return max(found)
    return None


def dry_run(profile: str, configfiles: list[str]) -> str:
    """What Snakemake would do with this profile if nothing were done yet. Raises ValueError with what it complains of."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as small:
        json.dump(SMALL, small)
        small.flush()
        options = [
            "--dry-run",
            "--printshellcmds",
            "--forceall",
            "--nocolor",
            "--profile",
            profile,
            "--configfile",
            *configfiles,
            small.name,
        ]
        run = subprocess.run(
            [sys.executable, "-m", "snakemake", *options], capture_output=True, text=True, timeout=120
        )
    if run.returncode:
        said = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        raise ValueError(
            f"profile: {profile}: snakemake says: {' '.join(said[-3:])[-400:]} Expected it to plan the run. Mend the profile."
        )
    return run.stdout + run.stderr


def submitted(printed: str) -> list[Job]:
    """The rules whose command a dry run begins with the launcher."""
    jobs = {}
    for block in re.split(r"^(?:local)?(?:rule|checkpoint) ", printed, flags=re.M)[1:]:
        command = re.search(r"^ *(?:Shell command: )?(exec .*cbtm_pipeline\.slurm\.launch .*)$", block, re.M)
        if command:
            argv = shlex.split(command[1])
            argv = argv[: argv.index("--")]
            resources, threads = (
                json.loads(argv[argv.index(name) + 1]) for name in ("--resources", "--threads")
            )
            rule = block.partition(":")[0]
            jobs[rule] = Job(rule, resources, threads, "--work" in argv)
    return list(jobs.values())


def alike(jobs: list[Job]) -> list[list[Job]]:
    """Groups of jobs that ask for the same."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(json.dumps(job[1:], sort_keys=True), []).append(job)
    return list(groups.values())


def test_only(job: Job, timeout_s: float) -> None:
    """Ask sbatch about the very script that submitit would give it. Raises ValueError or OSError with Slurm's words."""
    import submitit

    with tempfile.TemporaryDirectory() as folder:
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**job.sbatch)
        script = Path(folder, "script.sh")
        script.write_text(
            executor._make_submission_file_text("true", "doctor")
        )  # what executor.submit writes
        commands.ask("sbatch", "--test-only", str(script), timeout_s=timeout_s)
