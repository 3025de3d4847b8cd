"""Say in a few lines what a start would run, why, at what cost, and which trained models it would replace.

    cbtm preview --configfile mine.yaml

Reads the records in the outdir, and runs nothing. Snakemake prints the same lines when it starts. It is also
`python -m cbtm_pipeline.preview`.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import cli
from cbtm_pipeline.base.duration import duration
from cbtm_pipeline.base.printable import printable
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.inference import harness
from cbtm_pipeline.ops import cost, lenient, planned
from cbtm_pipeline.ops.started import Run
from cbtm_pipeline.provenance import chosen, expert_files, kept, stale
from cbtm_pipeline.provenance.stale import Asked, Job, Reason, Start, States

SECTIONS = {  # where a field of a rule's plan comes from, the first section that has it
    "tokenizer": ("tokenizer", "corpus"),
    "shard": ("corpus",),
    "embed": ("embed",),
    "fit_kmeans": ("cluster",),
    "assign": ("train", "cluster"),
    "assign_random": ("train", "cluster"),
    "score_training": ("cluster",),
    "second_round": ("train", "cluster"),
    "train_expert": ("train", "model"),
    "score_expert": ("eval",),
    "route": ("eval", "route"),
    "eval_ensemble": ("route", "eval"),
    "eval_task": ("eval",),
}
NAMES = {"rng_seed": "seed", "context": "train.seq_len", "model": "model.pretrained"}  # other fields
DERIVED = {  # from train.steps, batch_size, lr, cluster.k, parents and second_round
    "n_steps": "steps",
    "batch_size": "sequences per step",
    "candidate": "search for a rate",
    "begins": "the model it begins as",
    "children": "clusters of a parent",
}
LOG_TAIL = 1 << 16  # bytes at the end of a training's log: about 400 steps
OTHERS = ("all", "demo_corpus")  # rules that no record belongs to
SHOWN = 6  # changes and reasons that are shown


def lines(cfg: config.Config, states: States, start: Start) -> list[str]:
    """The lines about a start. None if there is nothing to run."""
    if not start.run:
        return []
    outdir = Path(cfg.outdir)
    reasons = _reasons(cfg, states, start)
    more = [f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
    return [
        f"{cfg.outdir}: {len(start.run)} of {len(states)} jobs: {_counted(cfg, start.run)}",
        *(f"  {line}" for line in [*reasons[:SHOWN], *more]),
        *(f"  {line}" for line in _unsure(states, start)),
        *(f"  {line}" for line in _trainings(cfg, outdir, states, start)),
        *(f"  {line}" for line in _replaced(cfg, outdir, states, start)),
    ]


def of_runs(runs: Mapping[str, Run]) -> list[str]:
    """The lines about a start of one run, or a line for each run of a study that has something to do."""
    if len(runs) == 1:
        (run,) = runs.values()
        return lines(run.config, run.states, run.start)
    found, n_made, n_lent = [], 0, 0
    for name, run in runs.items():
        lent = [job for job in run.start.run if run.lender(*job)]
        made = [job for job in run.start.run if job not in lent]
        n_made, n_lent = n_made + len(made), n_lent + len(lent)
        told = _replaced(run.config, Path(run.out), run.states, run.start)
        if run.start.run:
            taken = f"; takes {len(lent)} from other runs" if lent else ""
            found += [
                f"  {name}: {_counted(run.config, made) or 'nothing'}{taken}",
                *(f"    {line}" for line in told),
            ]
    if not found:
        return []
    return [f"{len(runs)} runs: {n_made} jobs, and {n_lent} whose outputs another run has", *found]


def _counted(cfg: config.Config, some: Iterable[Job]) -> str:
    """How many jobs of each rule of the workflow."""
    counts = Counter("adopt" if chosen.is_adopted(cfg, *job) else job.rule for job in some)
    return ", ".join(rule if n == 1 else f"{n} {rule}" for rule, n in counts.items())


def _reasons(cfg: config.Config, states: States, start: Start) -> list[str]:
    """Why the jobs run: config keys that have changed, then all else, each with its jobs."""
    changed = _config_changes(cfg)
    told = set(changed)
    found: dict[str, list[str]] = {f"{key} {change}": [] for key, change in changed.items()}
    for job in start.run:
        for reason in states[job].reasons:
            if reason.field is None:
                found.setdefault(reason.what, []).append(str(job))
            elif (key := key_of(cfg, job, reason.field)) not in told and not (
                key in DERIVED.values() and told
            ):
                found.setdefault(f"{key} {_change(reason)}", []).append(str(job))
        if job in start.anew:
            found.setdefault("asked for", []).append(str(job))
    return [f"{what}: {_few(names)}" if names else what for what, names in found.items()]


def key_of(cfg: config.Config, job: Job, field: str) -> str:
    """The config key that a field of a plan comes from."""
    if job.rule == "train_expert" and field in DERIVED:
        return DERIVED[field]
    for section in SECTIONS.get(job.rule, ()):
        if field in type(getattr(cfg, section)).model_fields:
            return f"{section}.{field}"
    return NAMES.get(field, field)


def _config_changes(cfg: config.Config) -> dict[str, str]:
    """The keys whose values differ from the config of the last start, without those that rerun nothing."""
    before = lenient.json_object(Path(cfg.outdir, "config.json"))
    now = cfg.model_dump(exclude={"outdir", "run"})
    if not before:
        return {}
    return {
        key: f"{_short(old)} -> {_short(new)}"
        for key, new in _flat(now).items()
        if key in (flat := _flat(before)) and (old := flat[key]) != new
    }


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Values by `section.key`."""
    flat = {}
    for name, value in sections.items():
        flat |= (
            {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return flat


def _change(reason: Reason) -> str:
    return f"{_short(reason.old)} -> {_short(reason.new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _unsure(states: States, start: Start) -> list[str]:
    """How many jobs run only because another job's output is made again."""
    unsure = [job for job in start.run if not states[job].reasons and job not in start.anew]
    if not unsure:
        return []
    read = "reads" if len(unsure) == 1 else "read"
    return [f"{len(unsure)} of them only {read} what others make again: nothing to do if that stays the same"]


def _sure(states: States, start: Start) -> list[str]:
    """The experts that are made again for sure, and not only if the seed comes out as another one."""
    runs = (job for job in start.run if states[job].reasons or job in start.anew)
    return [job.expert for job in runs if job.rule == "train_expert" and job.expert]


def _trainings(cfg: config.Config, outdir: Path, states: States, start: Start) -> list[str]:
    """How many trainings run for sure, and what they cost."""
    plans = plan.trainings(cfg)
    names = [name for name in _sure(states, start) if name in plans and plans[name].n_steps]
    if not names:
        return []
    n_tokens = sum(plans[name].n_steps * plans[name].step_tokens for name in names)
    text = f"{_n(len(names), 'training')}, {cost.units(n_tokens)} tokens"
    if rate := _tokens_per_s(cfg, outdir, states):
        hours = duration(n_tokens / rate)
        text += f": about {hours} at the {cost.units(rate)} tokens/s that were measured here"
    return [text]


def _tokens_per_s(cfg: config.Config, outdir: Path, states: States) -> float | None:
    """The speed of the trainings in this folder, if they trained the same model."""
    seed = states[Job("train_expert", "seed")]
    fields = {reason.field for reason in seed.reasons}
    if seed.record is None or fields & {"scratch", "pretrained", "revision", "seq_len", "precision"}:
        return None
    logs = [outdir / f"experts/{name}/metrics.jsonl" for name in plan.trained(cfg) if name != plan.LARGE]
    rates = [r for log in logs for r in lenient.numbers(lenient.rows(log, LOG_TAIL), "tokens_per_s") if r > 0]
    return statistics.median(rates) if rates else None


def _replaced(cfg: config.Config, outdir: Path, states: States, start: Start) -> list[str]:
    """Which trained models a start replaces or takes out, and where they go."""
    deleted = "they are deleted at the end (run.keep_replaced)"
    fate = f"they stay in {outdir / kept.FOLDER}" if cfg.run.keep_replaced else deleted
    there = [
        name for name in _sure(states, start) if (outdir / f"experts/{name}" / expert_files.WEIGHTS).exists()
    ]
    found = [f"replaces {_n(len(there), 'trained model')} ({_few(there)}): {fate}"] if there else []
    surplus = kept.surplus(outdir, plan.folders(cfg)) if Job("eval_ensemble") in start.run else []
    if surplus:
        found.append(f"takes {_n(len(surplus), 'trained model')} out of the run ({_few(surplus)}): {fate}")
    trainings = (job for job in start.run if job.rule == "train_expert" and kept.has(outdir, job))
    if back := [job.expert for job in trainings if job.expert]:
        fit = "comes back untrained if it fits" if len(back) == 1 else "come back untrained if they fit"
        found.append(f"{_n(len(back), 'kept model')} ({_few(back)}) {fit}")
    return found


def _n(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--configfile", nargs="+", action="extend", default=[], metavar="FILE", help="as given to snakemake"
    )
    p.add_argument("targets", nargs="*", help="rules or files, as given to snakemake; default: the whole run")
    args = p.parse_args()
    cfg = config.validate(planned.read_config(planned.config_files(args.configfile)))
    corpus_files.find(  # raises ValueError that names what is missing
        cfg.corpus.train, cfg.corpus.eval, cfg.outdir
    )
    for target in args.targets:
        if target not in OTHERS and not stale.named(cfg, [target]):
            rules = ", ".join(dict.fromkeys(job.rule for job in stale.jobs(cfg)))
            expected = f"Expected a rule ({rules}) or a file that one makes"
            raise ValueError(f"{target}: nothing of this run. {expected}. Correct it.")
    states = stale.look(cfg)
    harness.check_at_start(cfg, states)
    found = lines(cfg, states, stale.start(cfg, states, Asked(args.targets, [], False, False)))
    print(printable("\n".join(found or [f"{cfg.outdir}: nothing to do"])))


if __name__ == "__main__":
    cli.run(main)
