"""Show how a run is going, during the run and afterwards: its stages, its experts, their Slurm jobs.

    cbtm status results
    cbtm status results/study          # one row for each run of a study

Reads the files that a run leaves in its folder, and asks Slurm once. Writes nothing. Files may be missing or
partial: then less is shown. It is also `python -m cbtm_pipeline.status`. The states:

    done      its output is there; for an expert, by the plan of the newest config
    running   on a node, or with a lock or a log that changes
    waiting   for its turn, or in Slurm's queue
    stopped   it has begun, and no process works on it: it goes on when the run is started again
    failed    it has failed since the run was last started
    unknown   it has a Slurm job, and Slurm cannot be asked
"""

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from cbtm_pipeline import config, plan, plan_first, plan_search
from cbtm_pipeline.base import cli
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops import lenient, run_state, status_table, which_run
from cbtm_pipeline.ops.run_state import LOG_TAIL, Evidence, Snapshot
from cbtm_pipeline.ops.status_table import URGENT, Row, Status
from cbtm_pipeline.plan import LargePlan, TrainingPlan
from cbtm_pipeline.provenance import stale
from cbtm_pipeline.slurm import commands

NO_RUN = "no run yet. Expected config.json, which a run writes when it starts."
OUTPUTS = {  # of the stages, in their order
    "demo_corpus": "demo/corpus.jsonl.zst",
    "tokenizer": "tokenizer/tokenizer.json",
    "shard": "shards/manifest.json",
    "embed": "embed/manifest.json",
    "fit_kmeans": "cluster/clusterer.npz",
    "assign": "assignments/manifest.json",
    "assign_random": "random/manifest.json",
    "score_training": "second/scores/{}.npz",  # one for each expert of the first round
    "second_round": "second/manifest.json",
    "choose": "search/{}.json",  # one for each kind of model
    "route": "route/distances.npz",
    "score_expert": "scores/{}.npz",  # one for each expert
    "eval_ensemble": "eval/metrics.json",
    "report": "report.html",
    "ensemble": "ensemble/files.json",
    "eval_task": "eval/tasks/{}.json",  # one for each model
    "tasks_table": "eval/tasks.json",
}
# Rules with a job for each model, and how these are called on Slurm.
OF_MANY = {
    "score_training": "training-score",
    "score_expert": "score",
    "eval_task": "tasks",
    "choose": "choose",
}


def gather(outdir: Path, queue: Mapping[str, commands.QueuedJob] | None, now: float) -> Status:
    """The run in `outdir` at the unix time `now`. `queue`: Slurm's jobs by id; None if it cannot be asked."""
    path, plans, notes = outdir / "config.json", {}, []
    left_out, models, kinds = {"eval_task", "tasks_table", "choose", "score_training", "second_round"}, [], []
    began = lenient.changed(path)
    try:
        cfg = config.validate(orjson.loads(path.read_bytes()))
        plans = plan.trainings(cfg)
        if corpus_files.DEMO not in [*cfg.corpus.train, *(cfg.corpus.eval or [])]:
            left_out.add("demo_corpus")
        if not plan.random_experts(cfg):
            left_out.add("assign_random")
        if cfg.cluster.second_round:
            left_out -= {"score_training", "second_round"}
        if not stale.packs(cfg):
            left_out.add("ensemble")
        if kinds := list(plan.searched(cfg)):
            left_out -= {"choose"}
        if models := list(stale.task_models(cfg)):
            left_out -= {"eval_task", "tasks_table"}
    except (OSError, ValueError) as error:
        reason = lenient.text(error.strerror if isinstance(error, OSError) else error)
        expected = "the config, which a run writes when it starts"
        notes.append(f"{path}: {reason}. Expected {expected}. Without it, much is unknown.")
    names = list(plans) or run_state.traces(outdir)
    trained = dict.fromkeys(map(plan_search.base, names))
    scored = [name for name in trained if not plan_first.is_first(name)]
    if not names:
        left_out.add("score_expert")
    if began is None and not names:
        return Status(str(outdir), None, [], [f"{outdir}: {NO_RUN}"])
    many = {"score_expert": scored, "eval_task": models, "choose": kinds}
    many["score_training"] = [name for name in trained if plan_first.is_first(name)]
    active = run_state.holder(outdir / ".lock", now)
    run = Snapshot(outdir, queue, now, began or 0.0, active is not None)
    stages = [
        _stages(run, name, many[name]) if name in OF_MANY else _stage(run, name)
        for name in OUTPUTS
        if name not in left_out
    ]
    experts = [_expert(run, name, plans.get(name)) for name in names]
    return Status(str(outdir), active, stages + experts, notes)


def _stage(run: Snapshot, name: str, expert: str | None = None) -> Row:
    """The only job of a rule, or its job for an expert."""
    log = run.outdir / "logs" / (f"{name}/{expert}.log" if expert else f"{name}.log")
    done = lenient.changed(run.outdir / OUTPUTS[name].format(expert)) is not None
    logged = lenient.changed(log)
    live = run.active and logged is not None and logged >= run.began  # without Slurm, there is no better sign
    job = f"{OF_MANY[name]}-{expert}" if expert else name
    return run_state.judge(run, Row("stage", name), Evidence(job, log, done, live, logged is not None))


def _stages(run: Snapshot, name: str, experts: Sequence[str]) -> Row:
    """All jobs of a rule as one row. Its state is that of the job that needs attention most."""
    jobs = {expert: _stage(run, name, expert) for expert in experts}
    expert = min(jobs, key=lambda expert: URGENT.index(jobs[expert].state))
    n_done = sum(job.state == "done" for job in jobs.values())
    error = jobs[expert].error
    row = Row("stage", name, jobs[expert].state, n_done, len(jobs))
    what = {"score_expert": "expert", "score_training": "expert", "choose": "rate of"}.get(name, "model")
    return row._replace(error=error and f"{what} {expert}: {error}")


def _expert(run: Snapshot, name: str, planned: TrainingPlan | None) -> Row:
    """An expert's training. `planned` is its plan; None if the config cannot be read."""
    folder, work = run.outdir / "experts" / name, run.outdir / "work" / name
    card = lenient.json_object(folder / "card.json")
    as_planned = planned is None or card.get("made_with") == planned.content()
    done = lenient.changed(folder / "model.safetensors") is not None and bool(card) and as_planned
    rows = lenient.rows((folder if done else work / "state") / "metrics.jsonl", LOG_TAIL)
    steps, losses, times = (lenient.numbers(rows, key) for key in ("step", "loss", "time"))
    states = [path for path in lenient.listed(work / "state") if path.suffix == ".safetensors"]
    saved = [at for path in states if (at := lenient.changed(path)) is not None]
    known = planned.content() if planned else card.get("made_with") if done else None
    n_steps = lenient.number(known.get("n_steps")) if isinstance(known, dict) else None
    if isinstance(planned, LargePlan) or "diverged" in card:
        n_steps = lenient.number(card.get("n_steps")) if done else _announced(run.outdir, name)
    step = n_steps if done else steps[-1] if steps else None if n_steps is None else 0
    recent = statistics.fmean(losses[-10:]) if losses else None
    row = Row(
        "expert",
        name,
        step=None if step is None else int(step),
        n_steps=None if n_steps is None else int(n_steps),
        loss=lenient.number(card.get("final_loss")) if done else recent,
        tokens_per_s=lenient.median(lenient.numbers(rows, "tokens_per_s")),
        mfu=lenient.median(lenient.numbers(rows, "mfu")),
        saved_s=None if done or not saved else max(0.0, run.now - max(saved)),
    )
    live = run_state.is_live(work / ".lock", times[-1] if times else None, run.now)
    log = run.outdir / "logs/train_expert" / f"{name}.log"
    row = run_state.judge(run, row, Evidence(f"expert-{name}", log, done, live, bool(rows or saved)))
    if row.state == "running" and step is not None and n_steps is not None:
        row = row._replace(eta_s=run_state.eta(n_steps - step, times, run.now))
    return row


def _announced(outdir: Path, name: str) -> float | None:
    """The number of steps by the log of a training whose plan does not say it; None if it is not known."""
    log = lenient.end(outdir / f"logs/train_expert/{name}.log", LOG_TAIL)
    found = re.findall(rb"step \d+/(\d+)", log)
    return float(found[-1]) if found else None


def is_run(outdir: Path) -> bool:
    """Whether the folder has traces of a run of its own. That of a study has none."""
    return (outdir / "config.json").exists() or bool(run_state.traces(outdir))


def ask_slurm(outdirs: Sequence[Path]) -> tuple[dict[str, commands.QueuedJob] | None, str | None]:
    """Slurm's queue and None; or None and why it is not known.

    Slurm is asked only if one of the runs has used it.
    """
    if not any(lenient.listed(outdir / "slurm") for outdir in outdirs):
        return None, None
    limit = "of the jobs, only what they have written is known."
    if not shutil.which("squeue"):
        return None, f"There is no Slurm on this machine: {limit}"
    try:
        return commands.queue(timeout_s=5), None
    except (OSError, ValueError) as error:
        return None, f"Slurm does not answer ({lenient.text(error)}): {limit}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "outdir",
        nargs="*",
        type=Path,
        help="folders of runs or studies; default: the outdir of the config in this folder",
    )
    p.add_argument(
        "--outdir",
        dest="more",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="the same, as for the other commands",
    )
    p.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="the configs with which the run was started"
    )
    p.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    args = p.parse_args()
    outdirs = [*args.outdir, *args.more] or [which_run.configured(args.configfile)]
    of_studies = {outdir: which_run.of_study(outdir) for outdir in outdirs if not is_run(outdir)}
    folders = [run for outdir in outdirs for run in of_studies.get(outdir) or [outdir]]
    queue, trouble = ask_slurm(folders)
    runs = {outdir: gather(outdir, queue, time.time()) for outdir in folders}
    if trouble:
        runs = {outdir: run._replace(notes=[*run.notes, trouble]) for outdir, run in runs.items()}
    if args.json:
        content = [run._asdict() | {"rows": [row._asdict() for row in run.rows]} for run in runs.values()]
        status_table.show(json.dumps(content, indent=1) + "\n")
        return
    texts = [
        status_table.render_study(str(outdir), [runs[run] for run in study])
        if (study := of_studies.get(outdir))
        else status_table.render(runs[outdir])
        for outdir in outdirs
    ]
    status_table.show("\n".join(texts))


if __name__ == "__main__":
    cli.run(main)
