"""What a Slurm has and allows, read from what its commands print, and what it has against a job. Pure: text in, findings out.

sbatch --test-only alone would not do: it says "Requested node configuration is not available" whatever is wrong, and takes a job whose time
limit is beyond the partition's, which then waits for ever.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.planned import Job

Association = tuple[str, str, str]  # account, partition ("" for all), QOS separated by commas
CHECKED = {
    "associations",
    "limits",
    "safe",
    "qos",
    "all",
}  # in AccountingStorageEnforce, each of which has accounts checked


class Nodes(NamedTuple):
    """A line of sinfo: `n` equal nodes of a partition. `memory` in MB, `gpus` by model ("" where Slurm has no name for it)."""

    partition: str
    n: int
    cpus: int
    memory: int
    gpus: dict[str, int]
    up: bool


def records(printed: str) -> list[dict[str, str]]:
    """What `scontrol --oneliner show` prints: a record per line; values may hold spaces and `=`."""
    lines = (
        re.split(r"\s+(?=[A-Za-z][\w/:]*=)", line.strip()) for line in printed.splitlines() if "=" in line
    )
    return [{key: value for key, _, value in (item.partition("=") for item in line)} for line in lines]


def settings(printed: str) -> dict[str, str]:
    """What `scontrol show config` prints."""
    return {
        key.strip(): value.strip()
        for key, mark, value in (line.partition("=") for line in printed.splitlines())
        if mark
    }


def nodes(printed: str) -> list[Nodes]:
    """What sinfo prints in the format %R|%D|%c|%m|%G|%T."""
    rows = [line.split("|") for line in printed.splitlines() if line.count("|") == 5]
    down = re.compile(r"(down|drain|fail|error|unknown|inval).*|.*\*", re.I)
    return [
        Nodes(p, int(n), int(cpus), int(memory), gpus(gres), not down.fullmatch(state))
        for p, n, cpus, memory, gres, state in rows
    ]


def gpus(gres: str) -> dict[str, int]:
    """GPUs by model: gpu:a100:4(S:0-1),mps:400 is {"a100": 4}."""
    return {model: int(n) for model, n in re.findall(r"(?<![\w/])gpu:(?:([^:,(]+):)?(\d+)", gres)}


def minutes(limit: str) -> float:
    """Slurm's D-HH:MM:SS; UNLIMITED is infinite."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    days, h, m, s = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    return days * 1440 + h * 60 + m + s / 60 if found else float("inf")


def seconds(value: str) -> float:
    """The number in `30 sec`; 0 where there is none."""
    found = re.match(r"\d+", value)
    return float(found[0]) if found else 0.0


def unfit(
    job: Job, name: str, partitions: Mapping[str, Mapping[str, str]], rows: Sequence[Nodes]
) -> Iterator[Line]:
    """Why a partition would refuse a job, or let it wait for ever."""
    if name not in partitions:
        yield (
            "FAIL",
            f"slurm_partition: {name}. Expected one of {', '.join(sorted(partitions))}. Correct it in the profile",
        )
        return
    about, r = partitions[name], job.resources
    if about["State"] != "UP":
        yield (
            "FAIL",
            f"slurm_partition: {name} is {about['State']}. Expected UP. Choose another one, or ask the operators",
        )
    if int(r["runtime"]) > (longest := minutes(about["MaxTime"])):
        yield (
            "FAIL",
            f"runtime: {r['runtime']} minutes. Expected {longest:g} or less, or jobs wait in {name} for ever. Lower it in the profile",
        )
    account, allowed, denied = (
        str(r.get("slurm_account", "")),
        about.get("AllowAccounts", "ALL"),
        about.get("DenyAccounts", ""),
    )
    if account and ((allowed != "ALL" and account not in allowed.split(",")) or account in denied.split(",")):
        expected = f"one of {allowed}" if allowed != "ALL" else f"none of {denied}"
        yield (
            "FAIL",
            f"slurm_account: {account} may not use {name}. Expected {expected}. Change it in the profile",
        )
    if here := [row for row in rows if row.partition == name]:
        yield from _too_large(job, name, here, about.get("MaxNodes", "UNLIMITED"))


def _too_large(job: Job, name: str, rows: Sequence[Nodes], max_nodes: str) -> Iterator[Line]:
    model = str(job.resources.get("gpu_model", ""))
    models = {model for row in rows for model in row.gpus}
    if job.n_gpus and not models:
        yield (
            "FAIL",
            f"gpus: {job.n_gpus}. Expected 0, as the nodes of {name} have none. Choose another slurm_partition",
        )
        return
    if job.n_gpus and model and model not in models:
        yield (
            "FAIL",
            f"gpu_model: {model}. Expected {' or '.join(sorted(models)) or 'none'}, as in {name}. Correct it in the profile",
        )
        return
    n_cpus = job.threads * (max(1, job.n_gpus) if job.resumable else 1)
    wanted = {"gpus": job.n_gpus, "threads": n_cpus, "mem_mb": int(job.resources.get("mem_mb", 0))}
    have = [
        {
            "gpus": row.gpus.get(model, 0) if model else sum(row.gpus.values()),
            "threads": row.cpus,
            "mem_mb": row.memory,
        }
        for row in rows
    ]
    most = {key: max(node[key] for node in have) for key in wanted}
    for key, value in wanted.items():
        if value > most[key]:
            per = (
                f" ({job.threads} for each of {job.n_gpus} tasks)"
                if key == "threads" and n_cpus > job.threads
                else ""
            )
            yield (
                "FAIL",
                f"{key}: {value}{per}. Expected {most[key]} or less, as a node of {name} has no more. Lower it in the profile",
            )
    if any(wanted[key] > most[key] for key in wanted):
        return
    fitting = [
        row for row, node in zip(rows, have, strict=True) if all(wanted[key] <= node[key] for key in wanted)
    ]
    limit = min(sum(row.n for row in fitting), int(max_nodes) if max_nodes.isdecimal() else 1 << 30)
    if not fitting:
        yield (
            "FAIL",
            f"gpus, threads, mem_mb: {', '.join(map(str, wanted.values()))}. Expected a node of {name} with all three. Lower one",
        )
    elif job.n_nodes > limit:
        yield "FAIL", f"nodes: {job.n_nodes}. Expected {limit} or less, of {name}. Lower it in the profile"
    elif sum(row.n for row in fitting if row.up) < job.n_nodes:
        yield (
            "warn",
            f"slurm_partition: the nodes of {name} that fit are down. Expected {job.n_nodes} up. Wait, or choose another one",
        )


def wrong_account(job: Job, enforced: Iterable[str], associations: Iterable[Association]) -> Iterator[Line]:
    """What accounting has against a job of the user with these associations."""
    account, qos = (str(job.resources.get(key, "")) for key in ("slurm_account", "qos"))
    mine = [a for a in associations if a[1] in ("", *job.partitions)]
    checked = bool(CHECKED & set(enforced))
    level, verb = ("FAIL", "refuses") if checked else ("warn", "lets pass")
    names = ", ".join(sorted({a[0] for a in mine})) or "an account that is yours"
    fitting = [a for a in mine if account in ("", a[0])]
    if not fitting and (account or checked):
        yield (
            level,
            f"slurm_account: {account or 'none'}, which Slurm {verb}. Expected {names}. Set it in the profile",
        )
    if fitting and qos and not any(qos in a[2].split(",") for a in fitting):
        yield (
            level,
            f"qos: {qos}, which Slurm {verb}. Expected {fitting[0][2] or 'none'}. Change it in the profile",
        )


def preempt_modes(slurm: Mapping[str, str], partition: Mapping[str, str]) -> set[str]:
    """What may happen to a job of this partition that has to make way: REQUEUE, CANCEL, SUSPEND, GANG; nothing where none has to."""
    kind = slurm.get("PreemptType", "preempt/none")
    modes = set((slurm if kind == "preempt/qos" else partition).get("PreemptMode", "OFF").split(",")) - {
        "OFF",
        "WITHIN",
    }
    return modes if kind != "preempt/none" else modes & {"GANG"}  # time slices need no preemption


def preemption(name: str, modes: set[str], with_gpus: bool) -> Line:
    """The same in words."""
    what = f"partition {name}, PreemptMode {','.join(sorted(modes)) or 'OFF'}"
    if not modes:
        return "ok", f"{what}: no job has to make way"
    if modes & {"SUSPEND", "GANG"} and with_gpus:
        return (
            "FAIL",
            f"{what}: suspended jobs keep their GPU memory. Expected REQUEUE or OFF. Choose another slurm_partition",
        )
    if modes & {"SUSPEND", "GANG"}:
        return (
            "warn",
            f"{what}: jobs may stand still for long. Expected REQUEUE or OFF. Nothing is lost, it only lasts",
        )
    if "CANCEL" in modes:
        return (
            "warn",
            f"{what}: a preempted job ends. Expected REQUEUE. It is submitted again, and waits at the end of the queue",
        )
    return "ok", f"{what}: a preempted job is requeued, and a training goes on from its saved state"
