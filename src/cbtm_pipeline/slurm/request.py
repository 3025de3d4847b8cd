"""What a rule asks of Slurm: from Snakemake's resources, by the names that profiles/slurm explains, to what submitit asks sbatch for."""

import difflib
import functools
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMALL = 1 << 24  # bytes
NOTICE_S = 120  # signal before the time limit: more than a step and a save
RESOURCES = (
    "slurm_partition",
    "slurm_account",
    "runtime",
    "mem_mb",
    "gpus",
    "gpu_model",
    "nodes",
    "qos",
    "constraint",
    "notice_s",
    "slurm_extra",
)
SNAKEMAKES = {
    "tmpdir",
    "slurm_jobs",
    "mem",
    "mem_mib",
    "disk",
    "disk_mb",
    "disk_mib",
}  # resources that Snakemake adds or keeps for itself
OWN_OPTIONS = {  # of sbatch, and the resource that sets them
    "partition": "slurm_partition", "account": "slurm_account", "time": "runtime", "mem": "mem_mb", "gpus": "gpus", "gpus-per-node": "gpus",
    "gres": "gpus", "nodes": "nodes", "qos": "qos", "constraint": "constraint", "signal": "notice_s", "cpus-per-task": "set-threads",
}  # fmt: skip
LAUNCHERS = {
    "job-name",
    "comment",
    "output",
    "error",
    "open-mode",
    "requeue",
    "no-requeue",
    "export",
    "array",
    "wrap",
    "parsable",
}


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
    """What to put before a module's command so that it runs on Slurm; nothing where the profile names no partition for its rule.

    `depends_on` and the inputs, which may be thousands, are passed on as a hash: a command line is bounded.
    """
    if not resources.get("slurm_partition"):
        return []
    mine = {
        key: value
        for key, value in resources.items()
        if not key.startswith("_") and key not in SNAKEMAKES and value != ""
    }
    command = [
        "python",
        "-m",
        "cbtm_pipeline.slurm.launch",
        "--name",
        name,
        "--folder",
        folder,
        "--resources",
        json.dumps(mine),
    ]
    made_from = hashlib.blake2b(
        json.dumps([depends_on, *map(identity, inputs)]).encode(), digest_size=16
    ).hexdigest()
    command += ["--threads", str(threads), "--made-from", made_from]
    return [*command, "--outputs", *outputs, *(["--work", work] if work else []), "--"]


def identity(path: str) -> str:
    """Of an input: small files by content, as they are often made again the same, large ones by size and time."""
    try:
        stat = Path(path).stat()
    except FileNotFoundError:  # a plan, in which it is still to be made
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
    """What submitit asks sbatch for. `resources` are Snakemake's, by the names that profiles/slurm explains; `resumable` is a training.

    A training runs one task per GPU, anything else one task. Raises ValueError that names the resource.
    """
    r = resources
    for key in r:
        if key not in RESOURCES:
            near = difflib.get_close_matches(key, RESOURCES, 1, 0)[0]
            raise ValueError(
                f"{key}: unknown resource. Expected one of {', '.join(RESOURCES)}. Did you mean {near} in the profile?"
            )
    gpus, nodes = int(r.get("gpus", 0)), int(r.get("nodes", 1))
    if "runtime" not in r:
        raise ValueError("runtime: missing. Expected minutes. Set it in default-resources of the profile.")
    notice = int(r.get("notice_s", min(NOTICE_S, int(r["runtime"]) * 60 // 4)))
    more: dict[str, Any] = {"export": "ALL", "requeue": True}
    if not resumable:
        more["signal"] = "CONT@1"  # submitit always sets one; this one does nothing
    for option in shlex.split(str(r.get("slurm_extra", ""))):
        key, _, value = option.removeprefix("--").partition("=")
        if key in OWN_OPTIONS or key in LAUNCHERS:
            instead = (
                f"Set {OWN_OPTIONS[key]} instead." if key in OWN_OPTIONS else "Remove it from the profile."
            )
            raise ValueError(f"slurm_extra: {option}. Expected no option that is set here already. {instead}")
        if not option.startswith("--") or not key:
            raise ValueError(
                f"slurm_extra: {option}. Expected options of sbatch such as --exclude=node7. Change it in the profile."
            )
        more[key] = value or True
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
        # srun takes the CPUs of a task from its own option only, since Slurm 22.05
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={threads}"],
        "additional_parameters": more,
    }
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}
