"""How a run is going, while it goes and afterwards: its stages, its experts, their Slurm jobs.

    python -m cbtm_pipeline.status results

Reads what a run leaves in its folder and asks Slurm once. Writes nothing. No file has to be there or whole: what is not is left out.

    done      its output is there, for an expert by the plan of the newest config
    running   on a node, or with a lock or a log that changes
    waiting   for its turn, or in Slurm's queue
    stopped   has begun, and nobody is at it now: it goes on when the run is started again
    failed    since the run was last started
    unknown   has a Slurm job, and Slurm cannot be asked
"""

import argparse
import itertools
import json
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import yaml

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import cli
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops import lenient, status_table
from cbtm_pipeline.ops.status_table import Row, State, Status
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.slurm import commands

STALE_S = 180.0  # a training whose lock and log have not changed for so long is not running
LOG_TAIL, EVENTS_TAIL = (
    1 << 14,
    1 << 18,
)  # bytes at the end of a file that are read: some eighty steps, a thousand events
ON_NODE = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "SUSPENDED"}
OUTPUTS = {  # of the stages, in their order
    "demo_corpus": "demo/corpus.jsonl.zst",
    "tokenizer": "tokenizer/tokenizer.json",
    "shard": "shards/manifest.json",
    "embed": "embed/manifest.json",
    "fit_kmeans": "cluster/clusterer.npz",
    "assign": "assignments/manifest.json",
    "assign_random": "random/manifest.json",
    "route": "route/distances.npz",
    "score_expert": "scores/{}.npz",  # one for each expert
    "eval_ensemble": "eval/metrics.json",
    "report": "report.html",
}


class _Run(NamedTuple):
    """What rows are judged by. Failures before `began`, when the run was last started, are history."""

    outdir: Path
    queue: Mapping[str, commands.Job] | None
    now: float
    began: float
    active: bool


def gather(outdir: Path, queue: Mapping[str, commands.Job] | None, now: float) -> Status:
    """The run in `outdir` at the unix time `now`. `queue` is Slurm's, jobs by id; None where Slurm cannot be asked."""
    path, plans, left_out, notes = outdir / "config.json", {}, set(), []
    began = lenient.changed(path)
    try:
        cfg = config.validate(orjson.loads(path.read_bytes()))
        plans = {name: plan.train_expert(cfg, name) for name in ["seed", *plan.experts(cfg)]}
        if corpus_files.DEMO not in [*cfg.corpus.train, *(cfg.corpus.eval or [])]:
            left_out.add("demo_corpus")
        if not plan.random_experts(cfg):
            left_out.add("assign_random")
    except (OSError, ValueError) as error:
        reason = lenient.text(error.strerror if isinstance(error, OSError) else error)
        notes.append(
            f"{path}: {reason}. Expected the config, which a run writes when it starts. Without it, much is unknown."
        )
    names = list(plans) or _found(outdir)
    if not names:
        left_out.add("score_expert")
    if began is None and not names:
        return Status(
            str(outdir),
            None,
            [],
            [f"{outdir}: no run yet. Expected config.json, which a run writes when it starts."],
        )
    active = _holder(outdir / ".lock", now)
    run = _Run(outdir, queue, now, began or 0.0, active is not None)
    stages = [
        _scores(run, names) if name == "score_expert" else _stage(run, name)
        for name in OUTPUTS
        if name not in left_out
    ]
    return Status(
        str(outdir), active, stages + [_expert(run, name, plans.get(name)) for name in names], notes
    )


def _stage(run: _Run, name: str, expert: str | None = None) -> Row:
    """A rule's only job, or its job for an expert."""
    log = run.outdir / "logs" / (f"{name}/{expert}.log" if expert else f"{name}.log")
    done = lenient.changed(run.outdir / OUTPUTS[name].format(expert)) is not None
    logged = lenient.changed(log)
    live = run.active and logged is not None and logged >= run.began  # no better sign where there is no Slurm
    return _judge(
        run, Row("stage", name), f"score-{expert}" if expert else name, log, done, live, logged is not None
    )


def _scores(run: _Run, experts: Sequence[str]) -> Row:
    """All jobs of score_expert as one row, in the state of the one that matters most."""
    jobs = {expert: _stage(run, "score_expert", expert) for expert in experts}
    order = ("failed", "unknown", "running", "stopped", "waiting", "done")
    expert = min(jobs, key=lambda expert: order.index(jobs[expert].state))
    n_done = sum(job.state == "done" for job in jobs.values())
    error = jobs[expert].error
    return Row(
        "stage",
        "score_expert",
        jobs[expert].state,
        n_done,
        len(jobs),
        error=error and f"expert {expert}: {error}",
    )


def _expert(run: _Run, name: str, planned: TrainingPlan | None) -> Row:
    """An expert's training. `planned` is its plan, None where the config cannot be read."""
    folder, work = run.outdir / "experts" / name, run.outdir / "work" / name
    card = lenient.json_object(folder / "card.json")
    as_planned = planned is None or card.get("plan") == planned.content()
    done = lenient.changed(folder / "model.safetensors") is not None and bool(card) and as_planned
    rows = lenient.rows((folder if done else work / "state") / "metrics.jsonl", LOG_TAIL)
    steps, losses, times = (lenient.numbers(rows, key) for key in ("step", "loss", "time"))
    saved = [
        at
        for path in lenient.listed(work / "state")
        if path.suffix == ".safetensors" and (at := lenient.changed(path)) is not None
    ]
    known = planned.content() if planned else card.get("plan") if done else None
    n_steps = lenient.number(known.get("n_steps")) if isinstance(known, dict) else None
    step = n_steps if done else steps[-1] if steps else None if n_steps is None else 0
    row = Row(
        *("expert", name),
        step=None if step is None else int(step),
        n_steps=None if n_steps is None else int(n_steps),
        loss=lenient.number(card.get("final_loss"))
        if done
        else statistics.fmean(losses[-10:])
        if losses
        else None,
        tokens_per_s=lenient.median(lenient.numbers(rows, "tokens_per_s")),
        mfu=lenient.median(lenient.numbers(rows, "mfu")),
        saved_s=None if done or not saved else max(0.0, run.now - max(saved)),
    )
    live = _is_live(work / ".lock", times[-1] if times else None, run.now)
    row = _judge(
        run,
        row,
        f"expert-{name}",
        run.outdir / "logs/train_expert" / f"{name}.log",
        done,
        live,
        bool(rows or saved),
    )
    if row.state == "running" and step is not None and n_steps is not None:
        row = row._replace(eta_s=_eta(n_steps - step, times, run.now))
    return row


def _judge(run: _Run, row: Row, name: str, log: Path, done: bool, live: bool, begun: bool) -> Row:
    """The row with its state and with what is known of its Slurm job, whose name is `name`."""
    folder = run.outdir / "slurm" / name
    record = lenient.json_object(folder / "job.json")
    events = _newest_work(lenient.rows(folder / "events.jsonl", EVENTS_TAIL))
    of_jobs = [event for event in events if event.get("job_id") is not None]
    job_id = lenient.text(record.get("job_id") if record else of_jobs[-1]["job_id"] if of_jobs else None)
    job = (run.queue or {}).get(job_id or "")
    nodes = [
        event["node"]
        for event in of_jobs
        if event.get("node") is not None and lenient.text(event["job_id"]) == job_id
    ]
    n_started = sum(event["event"] == "started" for event in events)
    error = None if done else _failure(run, folder, record, events, log)
    state: State
    if done:
        state = "done"
    elif error:
        state = "failed"
    elif job and job.state in commands.LIVE:
        state = "running" if job.state in ON_NODE else "waiting"
    elif live:
        state = "running"
    elif record.get("job_id") and run.queue is None:
        state = "unknown"
    else:
        state = "stopped" if begun or n_started else "waiting"
    return row._replace(
        state=state,
        job=job_id,
        job_state=job and lenient.text(job.state),
        reason=lenient.text(job.reason) if job and job.reason not in ("", "None") else None,
        node=lenient.text(
            job.nodes if job and job.nodes else nodes[-1] if nodes and state != "waiting" else None
        ),
        n_restarts=n_started - 1 if n_started else None,
        error=error,
    )


def _newest_work(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events under a job's name that belong to the newest piece of work: not to another one, nor to one that was done before."""
    events = [event for event in events if "event" in event]
    done = [
        i for i, event in enumerate(events[:-1]) if event["event"] == "taken" and event.get("status") == 0
    ]
    events = events[done[-1] + 1 if done else 0 :]
    return [event for event in events if event.get("fingerprint") == events[-1].get("fingerprint")]


def _failure(
    run: _Run, folder: Path, record: dict[str, Any], events: Sequence[dict[str, Any]], log: Path
) -> str | None:
    """Why a job failed, None if it did not: by its result, its newest event, or the last line of its log."""
    lines = lenient.end(log, LOG_TAIL).splitlines() if (lenient.changed(log) or -1.0) >= run.began else []
    said = (
        re.fullmatch(r"\d\d:\d\d:\d\d E (?:(?:expert|score) )?\S+ +(.+)", lines[-1].decode(errors="replace"))
        if lines
        else None
    )
    if said:
        return lenient.text(said[1])
    newest = events[-1] if events else {}
    result = lenient.json_object(folder / "result.json")
    failed = bool(record and result.get("token") == record.get("token") and result.get("status"))
    if newest.get("event") in ("ended", "taken") and (lenient.number(newest.get("time")) or 0.0) >= run.began:
        status = lenient.number(newest.get("status")) or 0.0
        failed = failed or (status > 0 and status != cli.EXIT_SAVED)
    if not failed:
        return None
    outputs = [
        (lenient.changed(path) or 0.0, path)
        for path in lenient.listed(folder)
        if path.name.endswith("_log.out")
    ]
    where = f"see {max(outputs)[1]}" if outputs else "see what snakemake printed"
    return lenient.text(result.get("error") or newest.get("error")) or f"its job ended with an error, {where}"


def _eta(n_steps_left: float, times: Sequence[float], now: float) -> float | None:
    """Seconds to the last step. The median time of a step is not bent by a restart or a save between two rows.

    Rows come with a delay, so the newest one's age counts as work; unless it is of before a restart.
    """
    took = lenient.median([after - before for before, after in itertools.pairwise(times)])
    if took is None:
        return None
    age = now - times[-1] if 0 < now - times[-1] < STALE_S else 0.0
    return lenient.number(max(0.0, n_steps_left * took - age))


def _is_live(lock: Path, newest_row: float | None, now: float) -> bool:
    """Whether somebody is at work, by the lock, whose record is rewritten every few seconds and emptied at the end, or by the log."""
    changed = lenient.changed(lock)
    if changed is not None and not lenient.end(lock, LOG_TAIL).strip():
        return False
    return now - max(changed or 0.0, newest_row or 0.0) < STALE_S


def _holder(lock: Path, now: float) -> str | None:
    """The live process that holds this lock."""
    record = lenient.json_object(lock)
    if not record or not _is_live(lock, None, now):
        return None
    return f"process {lenient.text(record.get('pid'))} on {lenient.text(record.get('host'))}"


def _found(outdir: Path) -> list[str]:
    """Ids of the experts that have left something, for when the config cannot say."""
    names = {path.name for folder in ("experts", "work") for path in lenient.listed(outdir / folder)}
    names |= {path.name.removeprefix("expert-") for path in lenient.listed(outdir / "slurm")}
    ids = [
        found
        for name in names
        if (found := re.fullmatch(r"(seed)|(\d{1,9})|(dense(?:-batch|-steps)?)|random-(\d{1,9})", name))
    ]
    return [
        found[0]
        for found in sorted(
            ids, key=lambda found: (found.lastindex, int(found[2] or found[4] or 0), found[0])
        )
    ]


def ask_slurm(outdirs: Sequence[Path]) -> tuple[dict[str, commands.Job] | None, str | None]:
    """The queue, None where it cannot be had, and why. It is not asked for where no run has used it."""
    if not any(lenient.listed(outdir / "slurm") for outdir in outdirs):
        return None, None
    if not shutil.which("squeue"):
        return None, "There is no Slurm on this machine: of the jobs, only what they have written is known."
    try:
        return commands.queue(timeout_s=5), None
    except (OSError, ValueError) as error:
        return (
            None,
            f"Slurm does not answer ({lenient.text(error)}): of the jobs, only what they have written is known.",
        )


def configured_outdir(configfiles: Sequence[Path]) -> Path:
    """`outdir` of the last of these files, and of ./config.yaml before them, that names one."""
    outdir = "results"
    for path in [*([Path("config.yaml")] if Path("config.yaml").exists() else []), *configfiles]:
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: not YAML ({error}). Expected the keys of config.yaml. Mend the file or name the outdir."
            ) from error
        if isinstance(content, dict):
            outdir = content.get("outdir", outdir)
    return Path(str(outdir))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "outdir", nargs="*", type=Path, help="folders of runs; by default outdir of the config in this folder"
    )
    p.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="configs that the run was started with"
    )
    p.add_argument("--json", action="store_true", help="everything, for programs")
    args = p.parse_args()
    outdirs = args.outdir or [configured_outdir(args.configfile)]
    queue, trouble = ask_slurm(outdirs)
    runs = [gather(outdir, queue, time.time()) for outdir in outdirs]
    runs = [run._replace(notes=[*run.notes, trouble]) if trouble else run for run in runs]
    if args.json:
        status_table.show(
            json.dumps(
                [run._asdict() | {"rows": [row._asdict() for row in run.rows]} for run in runs], indent=1
            )
            + "\n"
        )
    else:
        status_table.show("\n".join(status_table.render(run) for run in runs))


if __name__ == "__main__":
    cli.run(main)
