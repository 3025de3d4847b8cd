"""The checks of `cbtm doctor` that ask Slurm: does it answer, take the jobs, and leave time to save?"""

import os
import pwd
import shutil
from collections.abc import Iterator

from cbtm_pipeline.base.duration import duration
from cbtm_pipeline.ops import cost, facts, planned, site
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.planned import PlannedJob
from cbtm_pipeline.slurm import commands

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
ASSUMED_GPU = "A100"


def check_slurm(f: Facts) -> Iterator[Line]:
    """Whether Slurm's commands are here and its controller answers."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if f.profile is None and "sbatch" not in missing:
        yield "ok", "a run on this machine: for one on Slurm, add --profile slurm"
        return
    if "sbatch" in missing:
        found = "Slurm: no sbatch in PATH"
        if f.profile:
            expected = f"Slurm's commands, for --profile {f.profile}"
            yield "FAIL", f"{found}. Expected {expected}. Run where sbatch works"
        else:
            only = "so local runs only: snakemake --cores N"
            yield "warn", f"{found}, {only}. All other lines are for this machine"
        return
    if missing:
        found = f"Slurm: no {', '.join(missing)} in PATH"
        yield "FAIL", f"{found}. Expected all of its commands. Ask the operators"
        return
    try:
        facts.ask("scontrol", "ping")
        records = site.records(facts.ask("scontrol", "--oneliner", "show", "partition"))
        f.partitions = {record["PartitionName"]: record for record in records}
        nodes = facts.ask("sinfo", "--all", "--exact", "--noheader", "--format=%R|%D|%c|%m|%G|%T")
        f.nodes = site.nodes(nodes)
        f.slurm = site.settings(facts.ask("scontrol", "show", "config"))
    except (OSError, ValueError) as error:
        message = str(error).partition(" *")[0]  # scontrol puts a frame of stars after it
        yield "FAIL", f"Slurm: {message}. Expected a controller that answers. Wait, or ask the operators"
        return
    version, cluster = f.slurm["SLURM_VERSION"], f.slurm["ClusterName"]
    yield "ok", f"Slurm: {version}, cluster {cluster}, its controller answers"
    if job := os.environ.get("SLURM_JOB_ID"):
        later = "when this job ends, start it again and it finds its jobs"
        yield "ok", f"Slurm: inside job {job}. Snakemake may run here; {later}"


def check_profile(f: Facts) -> Iterator[Line]:
    """Whether Snakemake finds the profile, and which rules it sends to Slurm."""
    if f.config is None or f.profile is None or shutil.which("sbatch") is None:
        return
    file = planned.profile_file(f.profile)
    if file is None:
        ours = f"profiles/{f.profile}"
        file = planned.profile_file(ours)
        todo = f"Run ln -s {ours} {f.profile}" if file else "Correct --profile"
        expected = "such a folder here, in ~/.config/snakemake or in /etc/xdg/snakemake"
        yield "FAIL", f"profile: no {f.profile}. Expected {expected}. {todo}"
    if file is None:
        return
    rules, printed = cost.n_jobs(f.config), planned.dry_run(str(file), f.configfiles)
    f.jobs = [job for job in planned.submitted(printed) if job.rule in rules]
    if f.jobs:
        yield "ok", f"profile: {file}; {len(f.jobs)} rules go to Slurm"
    else:
        found, expected = f"{file} sends no rule to Slurm", "slurm_partition in default-resources"
        yield "FAIL", f"profile: {found}. Expected {expected}. Set it"


def check_jobs(f: Facts) -> Iterator[Line]:
    """Whether Slurm would take and start each distinct job."""
    if not (f.slurm and f.config):
        return
    associations = _associations(f)
    enforced = f.slurm.get("AccountingStorageEnforce", "none").split(",")
    if associations is None:
        enforced = []  # check_records reports it
    batches = cost.batches(f.config)
    for group in planned.alike(f.jobs):
        rules = " ".join(job.rule for job in group)
        for level, text in _job(f, group[0], enforced, associations, batches):
            yield level, f"{rules}: {text}"


def _associations(f: Facts) -> list[site.Association] | None:
    """Accounts, partitions and QOS of this user; None if the accounting does not answer."""
    user = f"user={pwd.getpwuid(os.geteuid()).pw_name}"
    options = ("--noheader", "--parsable2", "show", "associations", user, f"cluster={f.slurm['ClusterName']}")
    try:
        listed = facts.ask("sacctmgr", *options, "format=account,partition,qos")
        rows = [line.split("|") for line in listed.splitlines()]
        return [(account, partition, qos) for account, partition, qos in rows]
    except (OSError, ValueError):
        return None


def _job(
    f: Facts,
    job: PlannedJob,
    enforced: list[str],
    associations: list[site.Association] | None,
    batches: dict[str, int],
) -> list[Line]:
    """The findings for one job. Slurm itself is asked only if there is no FAIL before."""
    found: list[Line] = []
    try:
        unfit = [list(site.unfit(job, name, f.partitions, f.nodes)) for name in job.partitions if job.sbatch]
        found += unfit[0] if all(unfit) else []
        found += site.wrong_account(job, enforced, associations) if associations is not None else []
        n_tasks = job.n_gpus * job.n_nodes
        smallest = min(batches, key=lambda name: batches[name])
        if job.resumable and n_tasks > batches[smallest]:
            expected = f"at most {batches[smallest]}, the sequences in a batch of {smallest}"
            text = f"gpus: {n_tasks}. Expected {expected}. Lower gpus, or raise train.batch_size"
            found.append(("FAIL", text))
        if not any(level == "FAIL" for level, _ in found):
            planned.test_only(job, facts.TIMEOUT_S)
            gpus = f"{job.n_gpus} GPU, " if job.n_gpus else ""
            memory = f"{job.resources.get('mem_mb', '?')} MB"
            size = f"{gpus}{job.threads} CPU, {memory}, {job.resources['runtime']} min"
            found.append(("ok", f"{','.join(job.partitions)} takes {size}"))
    except (commands.Refused, commands.Unreachable) as error:
        found.append(("FAIL", f"{error}. Expected Slurm to take this job. Correct the profile"))
    except ValueError as error:
        found.append(("FAIL", str(error)))
    return found


def check_machine(f: Facts) -> Iterator[Line]:
    """Which GPUs a training gets, and their peak speed."""
    from cbtm_pipeline.training.training_log import PEAK_FLOPS

    job = next((job for job in f.jobs if job.resumable), None)
    if job is None or not job.n_gpus:
        return
    models = {model for row in f.nodes if row.partition in job.partitions for model in row.gpus}
    name = str(job.resources.get("gpu_model", "")) or (models.pop() if len(models) == 1 else "")
    assumed = f"an {ASSUMED_GPU} (assumed: {name or 'no gpu_model'} says nothing of its speed)"
    gpu, peak_flops = cost.peak(name, PEAK_FLOPS) or (assumed, PEAK_FLOPS[ASSUMED_GPU])
    time, notice = job.sbatch["time"], job.sbatch["signal_delay_s"]
    f.machine = cost.Machine(gpu, peak_flops, job.n_gpus * job.n_nodes, time, notice)
    yield "ok", f"GPUs: {f.machine.n_gpus} for each training, reckoned as {gpu}"


def check_records(f: Facts) -> Iterator[Line]:
    """Whether Slurm still knows how a job ended when its launcher asks."""
    if not f.slurm:
        return
    age = site.seconds(f.slurm.get("MinJobAge", ""))
    if age < 6 * commands.QUEUE_AGE_S:
        expected = "60 s or more, as jobs are asked for every 10 s"
        yield "warn", f"MinJobAge: {age:g} s. Expected {expected}. Ask the operators to raise it"
    try:
        facts.ask("sacct", "--noheader", "--allocations", "--starttime=now")
        yield "ok", f"accounting: sacct answers, and the queue remembers an ended job for {age:g} s"
    except (OSError, ValueError) as error:
        later = "A job that ends unseen now counts as lost, and is done again"
        yield "warn", f"accounting: {error}. Expected sacct to answer. {later}"


def check_stops(f: Facts) -> Iterator[Line]:
    """What happens to a job that is preempted, and whether a training then has the time to save its state."""
    if not f.slurm:
        return
    modes = {name: site.preempt_modes(f.slurm, partition) for name, partition in f.partitions.items()}
    for name in dict.fromkeys(name for job in f.jobs for name in job.partitions):
        if name in modes:
            with_gpus = any(job.n_gpus and name in job.partitions for job in f.jobs)
            yield site.preemption(name, modes[name], with_gpus)
    job = next((job for job in f.jobs if job.resumable), None)
    if job is None or f.model is None or f.config is None or not f.write_rate:
        return
    batch = max(cost.batches(f.config).values()) * f.config.train.seq_len
    needed = cost.seconds_to_stop(f.model, batch, f.machine, f.write_rate)
    within = {"a time limit": (job.sbatch["signal_delay_s"], "Raise notice_s in the profile")}
    for name in job.partitions:
        if modes.get(name):
            seconds = site.seconds(f.slurm["KillWait"]) + site.seconds(f.partitions[name]["GraceTime"])
            todo = "Nothing is lost; another slurm_partition may leave more"
            within[f"preemption in {name}"] = (seconds, todo)
    what = f"{job.rule}: about {duration(needed)} from a signal to the saved state"
    for when, (limit, todo) in within.items():
        if needed > limit:
            expected = f"at most the {limit:g} s that {when} leaves, or some work is done twice"
            yield "warn", f"{what}. Expected {expected}. {todo}"
    saving, every = cost.seconds_to_save(f.model, f.write_rate), f.config.run.checkpoint_seconds
    if saving > every / 5:
        found = f"run.checkpoint_seconds: {every:g}, while a save takes about {saving:.0f} s"
        yield "warn", f"{found}. Expected saves to take little of the time. Set it to {10 * saving:.0f} or so"
    if needed <= min(limit for limit, _ in within.values()):
        leaves = ", ".join(f"{when} leaves {limit:g} s" for when, (limit, _) in within.items())
        yield "ok", f"{what}; {leaves}"
