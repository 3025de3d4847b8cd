"""What a run would submit: its config, its profile, its jobs by a dry run of Snakemake. Submits nothing."""

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

from cbtm_pipeline.base import read_yaml
from cbtm_pipeline.slurm import commands, request

# Every rule in one small graph: whether a rule is submitted does not depend on the number of experts.
DEFAULT = "config.yaml"  # which the workflow reads first
SMALL = {"cluster": {"k": 1, "parents": None}, "train": {"controls": ["random"]}}


class PlannedJob(NamedTuple):
    """A rule that goes to Slurm. `resources`: Snakemake's. `resumable`: a training, with one task per GPU."""

    rule: str
    resources: dict[str, Any]
    threads: int
    resumable: bool

    @property
    def partitions(self) -> list[str]:
        """Slurm takes several partitions; the job starts in the first that has room."""
        return str(self.resources["slurm_partition"]).split(",")

    @property
    def n_gpus(self) -> int:
        """GPUs per node."""
        return int(self.resources.get("gpus", 0))

    @property
    def n_nodes(self) -> int:
        return int(self.resources.get("nodes", 1))

    @property
    def sbatch(self) -> dict[str, Any]:
        """The launcher's parameters of submitit. Raises ValueError that names a wrong resource."""
        return request.sbatch_parameters(self.rule, self.resources, self.threads, "", self.resumable)


def merge(base: Any, over: Mapping[str, Any]) -> Any:
    """`base` with the values of `over`, section by section, as Snakemake merges several --configfile."""
    if not over:
        return base
    merged = dict(base) if isinstance(base, Mapping) else {}
    return merged | {
        key: merge(merged.get(key, {}), value) if isinstance(value, Mapping) else value
        for key, value in over.items()
    }


def read_config(paths: Sequence[str]) -> Any:
    """The config of a run; later files override earlier ones.

    Raises ValueError with the file's name; OSError.
    """
    content: Any = {}
    for path in paths:
        try:
            read = read_yaml.read(path)
        except FileNotFoundError as error:
            raise ValueError(
                f"{path}: {error.strerror}. Expected a config after --configfile, and targets before it: "
                "snakemake TARGET --configfile mine.yaml. Correct the path."
            ) from None
        if not isinstance(read, dict):
            expected = "sections such as corpus and train"
            raise ValueError(f"{path}: no sections. Expected {expected}. Correct the file.")
        content = merge(content, read)
    return content


def flat(content: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Values by dotted key: {cluster: {k: 2}} becomes {cluster.k: 2}. Sections have no sections."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value and not section and "." not in key:
            found |= flat(value, f"{key}.")
        else:
            found[f"{section}{key}"] = value
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of values by dotted key: {cluster.k: 2} becomes {cluster: {k: 2}}."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *names, last = key.split(".")
        at = sections
        for name in names:
            at = at.setdefault(name, {})
        at[last] = value
    return sections


def given(config_args: Sequence[str] | None) -> dict[str, Any]:
    """Lists and sections of --config, as YAML: Snakemake takes all numbers in them for text.

    Raises ValueError for a key that stands twice.
    """
    found: dict[str, Any] = {}
    for entry in config_args or ():
        key, _, text = entry.partition("=")
        try:
            value = read_yaml.parse(text)
        except read_yaml.Refused as error:
            raise ValueError(f"--config {key}: {error}") from None
        except yaml.YAMLError:
            continue  # it stays text, of which the schema says what it should be
        if isinstance(value, dict | list):
            found = merge(found, {key: value})
    return found


def config_files(named: Sequence[str]) -> list[str]:
    """The config files of a start from this folder: config.yaml, if it is there, and those that are named.

    Raises ValueError if there is none.
    """
    if not named and not Path(DEFAULT).exists():
        todo = "Go to the project's folder, or name one with --configfile"
        raise ValueError(f"No {DEFAULT} here. Expected that of a project. {todo}.")
    return [*([DEFAULT] if Path(DEFAULT).exists() else []), *named]


def check_given_once(argv: Sequence[str]) -> None:
    """Raise ValueError if a command line of Snakemake has --configfile twice: it drops all but the last."""
    given = [word for word in argv if re.fullmatch(r"--configfiles?(=.*)?", word, re.DOTALL)]
    if len(given) > 1:
        raise ValueError(
            f"--configfile: given {len(given)} times, of which Snakemake reads the last. Expected it once, "
            "with all files. Write --configfile FILE FILE."
        )


def profile_file(name: str) -> Path | None:
    """The file of a profile as Snakemake finds it: by path, else in the user's or the site's folder."""
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
    """What Snakemake prints as its plan, if nothing is done yet. Raises ValueError with its complaint."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as small:
        json.dump(SMALL, small)
        small.flush()
        options = ["--dry-run", "--printshellcmds", "--forceall", "--nocolor", "--profile", profile]
        options += ["--configfile", *configfiles, small.name]
        run = subprocess.run(
            [sys.executable, "-m", "snakemake", *options], capture_output=True, text=True, timeout=120
        )
    if run.returncode:
        lines = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        found = f"profile: {profile}: snakemake says: {' '.join(lines[-3:])[-400:]}"
        raise ValueError(f"{found} Expected it to plan the run. Correct the profile.")
    return run.stdout + run.stderr


def submitted(printed: str) -> list[PlannedJob]:
    """The rules that go to Slurm: those whose command begins with the launcher in the output of a dry run."""
    jobs = {}
    for block in re.split(r"^(?:local)?(?:rule|checkpoint) ", printed, flags=re.M)[1:]:
        command = re.search(r"^ *(?:Shell command: )?(exec .*cbtm_pipeline\.slurm\.launch .*)$", block, re.M)
        if command:
            argv = shlex.split(command[1])
            argv = argv[: argv.index("--")]
            values = (json.loads(argv[argv.index(name) + 1]) for name in ("--resources", "--threads"))
            resources, threads = values
            rule = block.partition(":")[0]
            jobs[rule] = PlannedJob(rule, resources, threads, "--work" in argv)
    return list(jobs.values())


def alike(jobs: list[PlannedJob]) -> list[list[PlannedJob]]:
    """Groups of jobs that ask for the same resources."""
    groups: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        groups.setdefault(json.dumps(job[1:], sort_keys=True), []).append(job)
    return list(groups.values())


def test_only(job: PlannedJob, timeout_s: float) -> None:
    """Give sbatch --test-only the script that submitit would submit. Raises Refused or Unreachable."""
    import submitit

    with tempfile.TemporaryDirectory() as folder:
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**job.sbatch)
        script = Path(folder, "script.sh")
        script.write_text(executor._make_submission_file_text("true", "doctor"))  # as executor.submit does
        commands.ask("sbatch", "--test-only", str(script), timeout_s=timeout_s)
