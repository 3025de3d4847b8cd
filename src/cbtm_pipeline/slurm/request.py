"""What a rule asks of Slurm: Snakemake's resources become parameters of submitit and options of sbatch.

profiles/slurm/config.yaml explains the names of the resources.
"""

import difflib
import functools
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMALL = 1 << 24  # bytes; the identity of a larger file is its size and time
NOTICE_S = 120  # the signal comes so long before the time limit: more than a step and a save take
RESOURCES = ("slurm_partition", "slurm_account", "runtime", "mem_mb", "gpus", "gpu_model", "nodes", "qos")
RESOURCES += ("constraint", "notice_s", "slurm_extra")
# Resources that Snakemake adds or needs itself.
SNAKEMAKES = {"tmpdir", "slurm_jobs", "mem", "mem_mib", "disk", "disk_mb", "disk_mib"}
OWN_OPTIONS = {  # options of sbatch, and the resource that sets each
    "partition": "slurm_partition", "account": "slurm_account", "time": "runtime", "mem": "mem_mb",
    "gpus": "gpus", "gpus-per-node": "gpus", "gres": "gpus", "nodes": "nodes", "qos": "qos",
    "constraint": "constraint", "signal": "notice_s", "cpus-per-task": "set-threads",
}  # fmt: skip
# Options of sbatch that the launcher and submitit set.
LAUNCHERS = {"job-name", "comment", "output", "error", "open-mode", "requeue", "no-requeue", "export"}
LAUNCHERS |= {"array", "wrap", "parsable"}


def command_line(
    name: str,
    folder: str,
    resources: Mapping[str, Any],
    threads: int,
    depends_on: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    work: str | None,
) -> list[str]:
    """The words that put a module's command on Slurm; none if the profile names no partition.

    `depends_on` and the inputs, which may be thousands, are passed on as one hash, as a command line has a
    maximum length.
    """
    if not resources.get("slurm_partition"):
        return []
    mine = {
        key: value
        for key, value in resources.items()
        if not key.startswith("_") and key not in SNAKEMAKES and value != ""
    }
    content = json.dumps([depends_on, *map(identity, inputs)]).encode()
    made_from = hashlib.blake2b(content, digest_size=16).hexdigest()
    command = ["python", "-m", "cbtm_pipeline.slurm.launch", "--name", name, "--folder", folder]
    command += ["--resources", json.dumps(mine), "--threads", str(threads), "--made-from", made_from]
    return [*command, "--outputs", *outputs, *(["--work", work] if work else []), "--"]


def identity(path: str) -> str:
    """Identity of an input: a small file's content, as it may be made again unchanged; else size and time."""
    try:
        stat = Path(path).stat()
    except FileNotFoundError:  # in a dry run, inputs may not exist yet
        return "missing"
    return _identity(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _identity(path: str, size: int, mtime_ns: int) -> str:
    if size > SMALL or not Path(path).is_file():
        return f"{size} {mtime_ns}"
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def sbatch_parameters(
    name: str, resources: dict[str, Any], threads: int, comment: str, resumable: bool
) -> dict[str, Any]:
    """The parameters of submitit for a job. `resources` are Snakemake's; `resumable`: the job is a training.

    A training runs one task per GPU, anything else one task. Raises ValueError that names a wrong resource.
    """
    r = resources
    _check_names(r)
    gpus, nodes = int(r.get("gpus", 0)), int(r.get("nodes", 1))
    notice = int(r.get("notice_s", min(NOTICE_S, int(r["runtime"]) * 60 // 4)))
    more: dict[str, Any] = {"export": "ALL", "requeue": True}
    if not resumable:
        more["signal"] = "CONT@1"  # submitit always sets a signal; this one has no effect
    parameters = {
        "job_name": name,
        "partition": r.get("slurm_partition") or None,
        "account": r.get("slurm_account") or None,
        "qos": r.get("qos") or None,
        "constraint": r.get("constraint") or None,
        "time": int(r["runtime"]),
        "mem": f"{r['mem_mb']}M" if "mem_mb" in r else None,
        "nodes": nodes,
        "ntasks_per_node": max(1, gpus) if resumable else 1,
        "cpus_per_task": threads,
        "gpus_per_node": (f"{r['gpu_model']}:{gpus}" if r.get("gpu_model") else gpus) if gpus else None,
        "signal_delay_s": notice,
        "comment": comment,
        "stderr_to_stdout": True,
        # since Slurm 22.05, srun reads the CPUs of a task from its own option only
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={threads}"],
        "additional_parameters": more | _extra_options(str(r.get("slurm_extra", ""))),
    }
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}


def _check_names(resources: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown resource, and where runtime is missing."""
    for key in resources:
        if key not in RESOURCES:
            near = difflib.get_close_matches(key, RESOURCES, 1, 0)[0]
            expected = f"one of {', '.join(RESOURCES)}"
            raise ValueError(
                f"{key}: unknown resource. Expected {expected}. Did you mean {near} in the profile?"
            )
    if "runtime" not in resources:
        raise ValueError("runtime: missing. Expected minutes. Set it in default-resources of the profile.")


def _extra_options(words: str) -> dict[str, Any]:
    """The options of slurm_extra.

    Raises ValueError for what is no long option, and for one that is set elsewhere.
    """
    options: dict[str, Any] = {}
    for option in shlex.split(words):
        key, _, value = option.removeprefix("--").partition("=")
        if key in OWN_OPTIONS or key in LAUNCHERS:
            resource = OWN_OPTIONS.get(key)
            todo = f"Set {resource} instead." if resource else "Remove it from the profile."
            raise ValueError(f"slurm_extra: {option}. Expected no option that is set here already. {todo}")
        if not option.startswith("--") or not key:
            expected = "options of sbatch such as --exclude=node7"
            raise ValueError(f"slurm_extra: {option}. Expected {expected}. Change it in the profile.")
        options[key] = value or True
    return options
