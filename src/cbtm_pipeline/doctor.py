"""Say what would fail or hang, and what a run will cost, before anything is submitted: `cbtm doctor`, or python -m cbtm_pipeline.doctor.

    cbtm doctor --configfile mine.yaml --profile slurm

One line per check, `ok`, `warn` or `FAIL`; exit status 1 when one FAILs. Nothing is started and nothing stays behind.
"""

import argparse
import os
import pwd
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cbtm_pipeline.base import cli, hub
from cbtm_pipeline.config import Config, validate
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops import cost, file_systems, planned, site
from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.planned import Job
from cbtm_pipeline.slurm import commands

TIMEOUT_S = 10.0  # of a Slurm command
PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
ASSUMED_GPU = "A100"
ASSUMED_DIMENSIONS = 768  # of an encoder that is not here yet


@dataclass
class Facts:
    """What the checks have found so far; each leaves here what later ones need."""

    configfiles: list[str]
    profile: str | None
    config: Config | None = None
    jobs: list[Job] = field(default_factory=list)
    slurm: dict[str, str] = field(default_factory=dict)  # its configuration; empty where it does not answer
    partitions: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: list[site.Nodes] = field(default_factory=list)
    machine: cost.Machine | None = None  # of a training
    model: cost.Size | None = None
    n_dimensions: int | None = None  # of the vectors of an encoder
    write_rate: float = 0.0  # bytes/s under outdir


def ask(*command: str) -> str:
    return commands.ask(*command, timeout_s=TIMEOUT_S)


def check_config(f: Facts) -> Iterator[Line]:
    paths = ["config.yaml", *f.configfiles]
    cfg = validate(planned.read_config(paths))
    files = corpus_files.find(cfg.corpus.train, cfg.corpus.eval)
    corpus_files.n_bytes(corpus_files.name([Path(file) for file in files if file != corpus_files.DEMO]))
    f.config = cfg
    n_files = f"{len(files)} corpus files" if len(files) > 1 else files[0]
    yield (
        "ok",
        f"config: {' + '.join(paths)}; {n_files}, about {cost.units(sum(cost.corpus(cfg)), 'B')} of text",
    )


def check_slurm(f: Facts) -> Iterator[Line]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if "sbatch" in missing:
        if f.profile:
            yield (
                "FAIL",
                f"Slurm: no sbatch in PATH. Expected Slurm's commands, for --profile {f.profile}. Run where sbatch works",
            )
        else:
            yield (
                "warn",
                "Slurm: no sbatch in PATH, so local runs only: snakemake --cores N. The rest is about this machine",
            )
        return
    f.profile = f.profile or "slurm"
    if missing:
        yield (
            "FAIL",
            f"Slurm: no {', '.join(missing)} in PATH. Expected all of its commands. Ask the operators",
        )
        return
    try:
        ask("scontrol", "ping")
        f.partitions = {
            record["PartitionName"]: record
            for record in site.records(ask("scontrol", "--oneliner", "show", "partition"))
        }
        f.nodes = site.nodes(ask("sinfo", "--all", "--exact", "--noheader", "--format=%R|%D|%c|%m|%G|%T"))
        f.slurm = site.settings(ask("scontrol", "show", "config"))
    except (OSError, ValueError) as error:
        said = str(error).partition(" *")[0]  # scontrol frames it with stars
        yield "FAIL", f"Slurm: {said}. Expected a controller that answers. Wait, or ask the operators"
        return
    yield "ok", f"Slurm: {f.slurm['SLURM_VERSION']}, cluster {f.slurm['ClusterName']}, its controller answers"
    if job := os.environ.get("SLURM_JOB_ID"):
        yield (
            "ok",
            f"Slurm: inside job {job}. Snakemake may run here; when this job ends, start it again and it finds its jobs",
        )


def check_profile(f: Facts) -> Iterator[Line]:
    if f.config is None or f.profile is None or shutil.which("sbatch") is None:
        return
    file = planned.profile_file(f.profile)
    if file is None:
        ours = f"profiles/{f.profile}"
        file = planned.profile_file(ours)
        todo = f"Run ln -s {ours} {f.profile}" if file else "Correct --profile"
        yield (
            "FAIL",
            f"profile: no {f.profile}. Expected such a folder here, in ~/.config/snakemake or in /etc/xdg/snakemake. {todo}",
        )
    if file is None:
        return
    rules = cost.n_jobs(f.config)
    f.jobs = [
        job for job in planned.submitted(planned.dry_run(str(file), f.configfiles)) if job.rule in rules
    ]
    if f.jobs:
        yield "ok", f"profile: {file}; {len(f.jobs)} rules go to Slurm"
    else:
        yield (
            "FAIL",
            f"profile: {file} sends no rule to Slurm. Expected slurm_partition in default-resources. Set it",
        )


def check_jobs(f: Facts) -> Iterator[Line]:
    """Each distinct job: would it be taken, and would it start?"""
    if not (f.slurm and f.config):
        return
    enforced = f.slurm.get("AccountingStorageEnforce", "none").split(",")
    who = [f"user={pwd.getpwuid(os.geteuid()).pw_name}", f"cluster={f.slurm['ClusterName']}"]
    associations: list[site.Association] | None = None
    try:
        listed = ask(
            "sacctmgr",
            "--noheader",
            "--parsable2",
            "show",
            "associations",
            *who,
            "format=account,partition,qos",
        )
        associations = [
            (account, partition, qos)
            for account, partition, qos in (line.split("|") for line in listed.splitlines())
        ]
    except (OSError, ValueError):
        enforced = []  # check_records speaks of it
    batches = cost.batches(f.config)
    smallest = min(batches, key=lambda name: batches[name])
    for group in planned.alike(f.jobs):
        job, rules = group[0], " ".join(job.rule for job in group)
        found: list[Line] = []
        try:
            unfit = [
                list(site.unfit(job, name, f.partitions, f.nodes)) for name in job.partitions if job.sbatch
            ]
            found += unfit[0] if all(unfit) else []
            found += site.wrong_account(job, enforced, associations) if associations is not None else []
            n_tasks = job.n_gpus * job.n_nodes
            if job.resumable and n_tasks > batches[smallest]:
                expected = f"at most {batches[smallest]}, the sequences in a batch of {smallest}"
                found.append(
                    ("FAIL", f"gpus: {n_tasks}. Expected {expected}. Lower gpus, or raise train.batch_size")
                )
            if not any(level == "FAIL" for level, _ in found):
                planned.test_only(job, TIMEOUT_S)
                gpus = f"{job.n_gpus} GPU, " if job.n_gpus else ""
                size = f"{gpus}{job.threads} CPU, {job.resources.get('mem_mb', '?')} MB, {job.resources['runtime']} min"
                found.append(("ok", f"{','.join(job.partitions)} takes {size}"))
        except (commands.Refused, commands.Unreachable) as error:
            found.append(("FAIL", f"{error}. Expected Slurm to take this job. Mend the profile"))
        except ValueError as error:
            found.append(("FAIL", str(error)))
        yield from ((level, f"{rules}: {text}") for level, text in found)


def check_machine(f: Facts) -> Iterator[Line]:
    """Which GPUs train, and how fast they are at most."""
    from cbtm_pipeline.training.training_log import PEAK_FLOPS

    job = next((job for job in f.jobs if job.resumable), None)
    if job is None or not job.n_gpus:
        return
    models = {model for row in f.nodes if row.partition in job.partitions for model in row.gpus}
    name = str(job.resources.get("gpu_model", "")) or (models.pop() if len(models) == 1 else "")
    assumed = f"an {ASSUMED_GPU} (assumed: {name or 'no gpu_model'} says nothing of its speed)"
    gpu, peak_flops = cost.peak(name, PEAK_FLOPS) or (assumed, PEAK_FLOPS[ASSUMED_GPU])
    f.machine = cost.Machine(
        gpu, peak_flops, job.n_gpus * job.n_nodes, job.sbatch["time"], job.sbatch["signal_delay_s"]
    )
    yield "ok", f"GPUs: {f.machine.n_gpus} for each training, reckoned as {gpu}"


def check_records(f: Facts) -> Iterator[Line]:
    """Whether it is still known how a job ended when its launcher asks."""
    if not f.slurm:
        return
    age = site.seconds(f.slurm.get("MinJobAge", ""))
    if age < 6 * commands.QUEUE_AGE_S:
        yield (
            "warn",
            f"MinJobAge: {age:g} s. Expected 60 s or more, as jobs are asked for every 10 s. Ask the operators to raise it",
        )
    try:
        ask("sacct", "--noheader", "--allocations", "--starttime=now")
        yield "ok", f"accounting: sacct answers, and the queue remembers an ended job for {age:g} s"
    except (OSError, ValueError) as error:
        yield (
            "warn",
            f"accounting: {error}. Expected sacct to answer. A job that ends unseen now counts as lost, and is done again",
        )


def check_model(f: Facts) -> Iterator[Line]:
    """Rule `tokenizer` fetches the tokenizer and the seed's training the model: on compute nodes, where these rules run there."""
    if f.config is None:
        return
    model, tokenizer = f.config.model.pretrained, f.config.tokenizer.pretrained
    for name in dict.fromkeys(name for name in (model, tokenizer) if name):
        needs = {"train_expert": hub.lacks_weights} if name == model else {}
        needs |= {"tokenizer": hub.lacks_tokenizer} if name == (tokenizer or model) else {}
        yield _can_be_had(f, name, needs)
    folder = hub.local_folder(model) if model else None
    if not (model and hub.lacks_weights(folder)):
        f.model = cost.size(f.config, folder)
        yield "ok", f"model: {cost.units(f.model.n_parameters)} parameters"


def check_encoder(f: Facts) -> Iterator[Line]:
    """Rules `embed` and `route` load the encoder."""
    if f.config is None or not f.config.embed.encoder:
        return
    from cbtm_pipeline.embedding import encoder_files  # imports torch

    name = f.config.embed.encoder
    f.n_dimensions = encoder_files.hidden_size(hub.local_folder(name))
    yield _can_be_had(f, name, {"embed": encoder_files.lacks})


def _can_be_had(f: Facts, name: str, needs: dict[str, Callable[[Path | None], list[str]]]) -> Line:
    """Whether rules that load `name` find it: by rule, what says which files its folder lacks."""
    folder, local, submitted = hub.local_folder(name), Path(name).is_dir(), {job.rule for job in f.jobs}
    lacks = {rule: missing for rule, missing_from in needs.items() if (missing := missing_from(folder))}
    found = f"{name}: {folder or 'the cache'} lacks {', '.join([file for files in lacks.values() for file in files][:3])}"
    if not lacks:
        hint = needs.keys() & submitted and not local and not os.environ.get("HF_HUB_OFFLINE")
        return (
            "ok",
            f"{name}: in {folder}{'; HF_HUB_OFFLINE=1 spares jobs without network minutes of trying' if hint else ''}",
        )
    if local:
        return "FAIL", f"{found}. Expected a folder that transformers can load. Complete it"
    if lacks.keys() & submitted:
        other = " again, or choose a model that has it" if folder else ""
        return (
            "FAIL",
            f"{found}. Expected it there, as compute nodes may have no network. Run hf download {name}{other}",
        )
    if problem := hub.problem(name):
        return (
            "FAIL",
            f"{found}, and {problem}. Expected one of the two. Correct the name, or run hf download {name}",
        )
    return "ok", f"{found}, but the hub has it; the run will fetch it"


def check_files(f: Facts) -> Iterator[Line]:
    """Whether compute nodes see what the jobs read and write, and what the file system of outdir can do."""
    if f.config is None:
        return
    outdir = Path(f.config.outdir)
    paths = {"outdir": outdir, "this folder": Path(), "Python": Path(sys.prefix)}
    files = [
        Path(file).absolute()
        for file in corpus_files.find(f.config.corpus.train, f.config.corpus.eval)
        if file != corpus_files.DEMO
    ]
    paths |= {"the corpus": Path(os.path.commonpath(files))} if files else {}
    names = {f.config.model.pretrained, f.config.tokenizer.pretrained, f.config.embed.encoder} - {None}
    paths |= {"the hub's cache": hub.cache()} if any(not Path(str(name)).is_dir() for name in names) else {}
    mounts = {name: file_systems.mount_of(path) for name, path in paths.items()}
    if f.jobs:
        yield from file_systems.seen_by(
            ask("sinfo", "--all", "--Node", "--noheader", "--format=%n").split() if f.slurm else [], mounts
        )
    probe = file_systems.probe(outdir)
    f.write_rate = probe.write_rate
    yield from file_systems.promises(outdir, mounts["outdir"], probe, bool(f.jobs))


def check_stops(f: Facts) -> Iterator[Line]:
    """What becomes of a job that has to make way, and whether a training then has the time to save its state."""
    if not f.slurm:
        return
    modes = {name: site.preempt_modes(f.slurm, about) for name, about in f.partitions.items()}
    for name in dict.fromkeys(name for job in f.jobs for name in job.partitions):
        if name in modes:
            yield site.preemption(
                name, modes[name], any(job.n_gpus and name in job.partitions for job in f.jobs)
            )
    job = next((job for job in f.jobs if job.resumable), None)
    if job is None or f.model is None or f.config is None or not f.write_rate:
        return
    batch = max(cost.batches(f.config).values()) * f.config.train.seq_len
    needed = cost.seconds_to_stop(f.model, batch, f.machine, f.write_rate)
    within = {"a time limit": (job.sbatch["signal_delay_s"], "Raise notice_s in the profile")}
    for name in job.partitions:
        if modes.get(name):
            seconds = site.seconds(f.slurm["KillWait"]) + site.seconds(f.partitions[name]["GraceTime"])
            within[f"preemption in {name}"] = (
                seconds,
                "Nothing is lost; another slurm_partition may leave more",
            )
    what = f"{job.rule}: about {cost.duration(needed / 3600)} from a signal to the saved state"
    for when, (limit, todo) in within.items():
        if needed > limit:
            yield (
                "warn",
                f"{what}. Expected at most the {limit:g} s that {when} leaves, or some work is done twice. {todo}",
            )
    saving, every = cost.seconds_to_save(f.model, f.write_rate), f.config.run.checkpoint_seconds
    if saving > every / 5:
        found = f"run.checkpoint_seconds: {every:g}, while a save takes about {saving:.0f} s"
        yield "warn", f"{found}. Expected saves to take little of the time. Set it to {10 * saving:.0f} or so"
    if needed <= min(limit for limit, _ in within.values()):
        yield (
            "ok",
            f"{what}; {', '.join(f'{when} leaves {limit:g} s' for when, (limit, _) in within.items())}",
        )


def check_disk(f: Facts) -> Iterator[Line]:
    if f.config is None or f.model is None:
        return
    n_running = len(cost.n_tokens(f.config)) - 1 if f.jobs else 1  # all but the seed, which comes first
    n_dimensions = (
        (f.n_dimensions or ASSUMED_DIMENSIONS) if f.config.embed.encoder else f.config.embed.n_components
    )
    parts = cost.disk(f.config, f.model, cost.corpus(f.config), n_dimensions, n_running)
    largest = max(parts, key=lambda name: parts[name])
    needed, used = sum(parts.values()), file_systems.used_bytes(Path(f.config.outdir))
    free = shutil.disk_usage(file_systems.existing(Path(f.config.outdir))).free
    what = f"disk: {cost.units(needed, 'B')}, mostly {largest} ({cost.units(parts[largest], 'B')}); {cost.units(free, 'B')} are free"
    if needed > free + used:
        yield (
            "FAIL",
            f"{what}. Expected room for all. Make room, change outdir, or lower slurm_jobs, which bounds the states",
        )
    else:
        unknown = f.config.embed.encoder and not f.n_dimensions
        assumed = f", the encoder's vectors are taken to have {n_dimensions} numbers" if unknown else ""
        yield "ok", f"{what} (a quota is not seen{assumed})"


CHECKS = (
    check_config,
    check_slurm,
    check_profile,
    check_jobs,
    check_machine,
    check_records,
    check_model,
    check_encoder,
)
CHECKS += (check_files, check_stops, check_disk)


def run(facts: Facts) -> Iterator[Line]:
    """All findings. A check that cannot be made is a finding too, never the end."""
    for check in CHECKS:
        try:
            yield from check(facts)
        except ValueError as error:
            yield from (("FAIL", line) for line in str(error).splitlines())
        except OSError as error:
            found = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            yield (
                "FAIL",
                f"{found}. Expected to read or write it. Check the path, its rights and the free space",
            )
        except Exception as error:  # what Slurm, Snakemake or transformers may print one day
            found = " ".join(str(error).split())[:200]
            yield (
                "warn",
                f"{check.__name__}: not done ({type(error).__name__}: {found}). Expected an answer. Look at it by hand",
            )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--configfile", nargs="+", action="extend", default=[], metavar="FILE", help="as given to snakemake"
    )
    p.add_argument("--profile", help="as given to snakemake; slurm where there is a Slurm")
    args = p.parse_args()
    facts, n = Facts(args.configfile, args.profile), {"ok": 0, "warn": 0, "FAIL": 0}
    for level, text in run(facts):
        n[level] += 1
        line = " ".join(text.split())
        print(f"{level:<5} {line}{'' if line.endswith(('.', '?')) else '.'}", flush=True)
    if facts.config:
        print(f"\n{cost.table(facts.config, [job.rule for job in facts.jobs], facts.model, facts.machine)}")
    print(f"\n{n['FAIL']} FAIL, {n['warn']} warn, {n['ok']} ok")
    sys.exit(1 if n["FAIL"] else 0)


if __name__ == "__main__":
    cli.run(main)
