"""A site's Slurm: what it has and allows, read from the output of its commands, and what prevents a job.

Pure functions: text in, findings out. sbatch --test-only alone is not enough. Whatever is wrong, it says
"Requested node configuration is not available". It also accepts a job whose time limit is above the
partition's, and that job then waits for ever.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.planned import PlannedJob

Association = tuple[str, str, str]  # account, partition ("" for all), QOS separated by commas
# Values of AccountingStorageEnforce with which Slurm checks accounts.
CHECKED = {"associations", "limits", "safe", "qos", "all"}


class Nodes(NamedTuple):
    """A line of sinfo: `n` equal nodes of a partition.

    `memory` in MB, `gpus` by model ("": Slurm has no name for it).
    """

    partition: str
    n: int
    cpus: int
    memory: int
    gpus: dict[str, int]
    up: bool


def records(printed: str) -> list[dict[str, str]]:
    """The output of `scontrol --oneliner show`: a record per line, whose values may hold spaces and `=`."""
    key = re.compile(r"\s+(?=[A-Za-z][\w/:]*=)")
    lines = (key.split(line.strip()) for line in printed.splitlines() if "=" in line)
    return [{key: value for key, _, value in (item.partition("=") for item in line)} for line in lines]


def settings(printed: str) -> dict[str, str]:
    """The output of `scontrol show config`."""
    items = (line.partition("=") for line in printed.splitlines())
    return {key.strip(): value.strip() for key, mark, value in items if mark}


def nodes(printed: str) -> list[Nodes]:
    """The output of sinfo in the format %R|%D|%c|%m|%G|%T."""
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
    """Minutes of Slurm's D-HH:MM:SS; UNLIMITED is infinite."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    days, h, m, s = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    return days * 1440 + h * 60 + m + s / 60 if found else float("inf")


def seconds(value: str) -> float:
    """The number in `30 sec`; 0 if there is none."""
    found = re.match(r"\d+", value)
    return float(found[0]) if found else 0.0


def unfit(
    job: PlannedJob, name: str, partitions: Mapping[str, Mapping[str, str]], rows: Sequence[Nodes]
) -> Iterator[Line]:
    """Why the partition `name` would refuse a job, or let it wait for ever."""
    if name not in partitions:
        expected = f"one of {', '.join(sorted(partitions))}"
        yield "FAIL", f"slurm_partition: {name}. Expected {expected}. Correct it in the profile"
        return
    partition, r = partitions[name], job.resources
    if partition["State"] != "UP":
        found = f"{name} is {partition['State']}"
        yield "FAIL", f"slurm_partition: {found}. Expected UP. Choose another one, or ask the operators"
    if int(r["runtime"]) > (longest := minutes(partition["MaxTime"])):
        expected = f"{longest:g} or less, or jobs wait in {name} for ever"
        yield "FAIL", f"runtime: {r['runtime']} minutes. Expected {expected}. Lower it in the profile"
    account = str(r.get("slurm_account", ""))
    allowed, denied = partition.get("AllowAccounts", "ALL"), partition.get("DenyAccounts", "")
    if account and ((allowed != "ALL" and account not in allowed.split(",")) or account in denied.split(",")):
        expected = f"one of {allowed}" if allowed != "ALL" else f"none of {denied}"
        found = f"{account} may not use {name}"
        yield "FAIL", f"slurm_account: {found}. Expected {expected}. Change it in the profile"
    if here := [row for row in rows if row.partition == name]:
        yield from _unknown_gpus(job, name, here) or _too_large(job, name, here, partition)


def _unknown_gpus(job: PlannedJob, name: str, rows: Sequence[Nodes]) -> list[Line]:
    """A finding if no node of the partition has GPUs of the job's model."""
    model = str(job.resources.get("gpu_model", ""))
    models = {model for row in rows for model in row.gpus}
    if job.n_gpus and not models:
        expected = f"0, as the nodes of {name} have none"
        return [("FAIL", f"gpus: {job.n_gpus}. Expected {expected}. Choose another slurm_partition")]
    if job.n_gpus and model and model not in models:
        expected = f"{' or '.join(sorted(models)) or 'none'}, as in {name}"
        return [("FAIL", f"gpu_model: {model}. Expected {expected}. Correct it in the profile")]
    return []


def _too_large(
    job: PlannedJob, name: str, rows: Sequence[Nodes], partition: Mapping[str, str]
) -> Iterator[Line]:
    """Why no node of the partition, or too few of them, can hold the job."""
    model = str(job.resources.get("gpu_model", ""))
    n_tasks = max(1, job.n_gpus) if job.resumable else 1
    memory = int(job.resources.get("mem_mb", 0))
    wanted = {"gpus": job.n_gpus, "threads": job.threads * n_tasks, "mem_mb": memory}
    n_gpus = [row.gpus.get(model, 0) if model else sum(row.gpus.values()) for row in rows]
    have = [
        {"gpus": n, "threads": row.cpus, "mem_mb": row.memory} for n, row in zip(n_gpus, rows, strict=True)
    ]
    most = {key: max(node[key] for node in have) for key in wanted}
    for key, value in wanted.items():
        if value > most[key]:
            per = f" ({job.threads} for each of {n_tasks} tasks)" if key == "threads" and n_tasks > 1 else ""
            expected = f"{most[key]} or less, as a node of {name} has no more"
            yield "FAIL", f"{key}: {value}{per}. Expected {expected}. Lower it in the profile"
    if any(wanted[key] > most[key] for key in wanted):
        return
    nodes_and_rows = zip(have, rows, strict=True)
    fitting = [row for node, row in nodes_and_rows if all(wanted[key] <= node[key] for key in wanted)]
    max_nodes = partition.get("MaxNodes", "UNLIMITED")
    limit = min(sum(row.n for row in fitting), int(max_nodes) if max_nodes.isdecimal() else 1 << 30)
    if not fitting:
        found = f"gpus, threads, mem_mb: {', '.join(map(str, wanted.values()))}"
        yield "FAIL", f"{found}. Expected a node of {name} with all three. Lower one"
    elif job.n_nodes > limit:
        yield "FAIL", f"nodes: {job.n_nodes}. Expected {limit} or less, of {name}. Lower it in the profile"
    elif sum(row.n for row in fitting if row.up) < job.n_nodes:
        found = f"slurm_partition: the nodes of {name} that fit are down"
        yield "warn", f"{found}. Expected {job.n_nodes} up. Wait, or choose another one"


def wrong_account(
    job: PlannedJob, enforced: Iterable[str], associations: Iterable[Association]
) -> Iterator[Line]:
    """Why accounting would refuse a job of the user who has these associations."""
    account, qos = (str(job.resources.get(key, "")) for key in ("slurm_account", "qos"))
    mine = [a for a in associations if a[1] in ("", *job.partitions)]
    checked = bool(CHECKED & set(enforced))
    level, verb = ("FAIL", "refuses") if checked else ("warn", "lets pass")
    names = ", ".join(sorted({a[0] for a in mine})) or "an account that is yours"
    fitting = [a for a in mine if account in ("", a[0])]
    if not fitting and (account or checked):
        found = f"slurm_account: {account or 'none'}, which Slurm {verb}"
        yield level, f"{found}. Expected {names}. Set it in the profile"
    if fitting and qos and not any(qos in a[2].split(",") for a in fitting):
        found = f"qos: {qos}, which Slurm {verb}"
        yield level, f"{found}. Expected {fitting[0][2] or 'none'}. Change it in the profile"


def preempt_modes(slurm: Mapping[str, str], partition: Mapping[str, str]) -> set[str]:
    """What may happen to a preempted job of this partition: a subset of REQUEUE, CANCEL, SUSPEND, GANG."""
    kind = slurm.get("PreemptType", "preempt/none")
    mode = (slurm if kind == "preempt/qos" else partition).get("PreemptMode", "OFF")
    modes = set(mode.split(",")) - {"OFF", "WITHIN"}
    return modes if kind != "preempt/none" else modes & {"GANG"}  # time slices need no preemption


def preemption(name: str, modes: set[str], with_gpus: bool) -> Line:
    """The finding for a partition with these modes. `with_gpus`: jobs with GPUs run there."""
    what = f"partition {name}, PreemptMode {','.join(sorted(modes)) or 'OFF'}"
    if not modes:
        return "ok", f"{what}: no job has to make way"
    if modes & {"SUSPEND", "GANG"}:
        if with_gpus:
            found = f"{what}: suspended jobs keep their GPU memory"
            return "FAIL", f"{found}. Expected REQUEUE or OFF. Choose another slurm_partition"
        found = f"{what}: jobs may stand still for long"
        return "warn", f"{found}. Expected REQUEUE or OFF. Nothing is lost, it only takes longer"
    if "CANCEL" in modes:
        todo = "It is submitted again, and waits at the end of the queue"
        return "warn", f"{what}: a preempted job ends. Expected REQUEUE. {todo}"
    return "ok", f"{what}: a preempted job is requeued, and a training goes on from its saved state"
