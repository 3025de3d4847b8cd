"""What of a run's folder fits the config, and so which jobs a start has to run, and why.

The folder is its own record (records.py). A job is up to date when its record is whole, was made with the
plan that the config gives now, and from inputs that are what they were. Neither times nor paths nor
Snakemake's own records decide anything. A job whose input is made again runs, too; it may turn out then that
the input is the same, and that nothing has to be done (unchanged.py).
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import plan, plan_search
from cbtm_pipeline.config import Config
from cbtm_pipeline.corpus import content
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.mixture.routers import ROUTERS
from cbtm_pipeline.provenance import chosen, made_from, records, rounds, task_files
from cbtm_pipeline.provenance.records import DAMAGED, Read

OF_CORPUS = ("tokenizer", "shard")  # rules that read the corpus
DEMO = "demo/corpus.jsonl.zst"  # below the outdir: the file that builtin:demo stands for


class Job(NamedTuple):
    """A rule, or its job for an expert."""

    rule: str
    expert: str | None = None

    def __str__(self) -> str:
        return f"{self.rule} {self.expert}" if self.expert else self.rule

    @property
    def outputs(self) -> list[str]:
        """The outputs that the workflow declares, below the outdir."""
        return [output.format(self.expert) for output in records.PLACES[self.rule].outputs]


class Reason(NamedTuple):
    """Why a job is not up to date: a plan's value has changed, or `what` says it."""

    what: str
    field: str | None = None  # of the plan
    old: Any = None
    new: Any = None


class State(NamedTuple):
    """A job's own reasons to run, whether an input's job runs, and the record that was found, if any."""

    reasons: list[Reason]
    downstream: bool
    record: dict[str, Any] | None

    @property
    def runs(self) -> bool:
        return bool(self.reasons) or self.downstream


States = dict[Job, State]  # of all jobs of a run, in an order in which they can run


def jobs(cfg: Config) -> dict[Job, list[Job]]:
    """All jobs of a run with the jobs whose outputs they read, in an order in which they can run."""
    tokenizer, shard, embed, fit, assign, dealt, route = (
        Job(rule)
        for rule in ("tokenizer", "shard", "embed", "fit_kmeans", "assign", "assign_random", "route")
    )
    names = plan.evaluated(cfg)
    second = Job("second_round") if cfg.cluster.second_round else None
    clusterer, clusters = second or fit, second or assign
    data = {"corpus": shard, "clusters": clusters, "parents": assign, "first": assign, "random": dealt}
    found = {tokenizer: [], shard: [tokenizer], embed: [shard], fit: [tokenizer, shard, embed]}
    found[assign] = [shard, embed, fit]
    randoms = [dealt] if plan.random_experts(cfg) else []
    found |= {dealt: [shard]} if randoms else {}
    for kind, models in plan.kinds(cfg).items():
        found |= _trainings(cfg, kind, models, tokenizer, data)
        if second and kind == "first":
            found |= {Job("score_training", name): [shard, Job("train_expert", name)] for name in models}
            found[second] = [
                tokenizer,
                shard,
                embed,
                assign,
                *(Job("score_training", name) for name in models),
            ]
    found[route] = [tokenizer, shard, embed, clusterer]
    found |= {Job("score_expert", name): [shard, Job("train_expert", name)] for name in names}
    experts = [Job("train_expert", name) for name in plan.trained(cfg)]
    scores = [Job("score_expert", name) for name in names]
    choices = [Job("choose", kind) for kind in plan.searched(cfg)]
    labelled = [shard] if cfg.corpus.label_field else []
    found[Job("eval_ensemble")] = [*labelled, route, clusters, *randoms, *experts, *scores, *choices]
    report = list(dict.fromkeys([shard, fit, clusterer, clusters, Job("eval_ensemble"), *experts]))
    if packs(cfg):
        packed = [Job("train_expert", name) for name in plan.cluster_experts(cfg)]
        found[Job("ensemble")] = [tokenizer, embed, clusterer, Job("eval_ensemble"), *packed]
    if models := task_models(cfg):
        found |= {Job("eval_task", name): [model] for name, model in models.items()}
        found[Job("tasks_table")] = [Job("eval_task", name) for name in models]
        report += [Job("tasks_table")]
    found[Job("report")] = report
    return found


def _trainings(
    cfg: Config, kind: str, models: list[str], tokenizer: Job, data: dict[str, Job]
) -> dict[Job, list[Job]]:
    """The trainings of a kind. Where its rate is searched: of its candidates, then the choice, then the job
    that makes the chosen candidate the expert.
    """
    found, made = {}, {}
    for name in models:
        first = plan.begins_as(cfg, name)
        reads = [tokenizer, data[plan.data_of(name)[0]], *([Job("train_expert", first)] if first else [])]
        made[name] = [Job("train_expert", one) for one in plan_search.candidates(cfg, name) or [name]]
        found |= dict.fromkeys(made[name], reads)
    if plan_search.is_searched(cfg, models[0]):
        choice = Job("choose", kind)
        found[choice] = [one for name in models for one in made[name]]
        found |= {Job("train_expert", name): [choice, *made[name]] for name in models}
    return found


def packs(cfg: Config) -> bool:
    """Whether the result is packed as one model. It routes by the linear embedding, and not by any router."""
    return not cfg.embed.encoder and any(ROUTERS[name].in_model for name in cfg.route.routers)


def task_models(cfg: Config) -> dict[str, Job]:
    """The models that are given the tasks, each with the job that makes it. None without eval.tasks.

    `ensemble-top1` is the ensemble with one active expert.
    """
    if not cfg.eval.tasks:
        return {}
    names = ["seed", *plan.dense_experts(cfg), *plan.cluster_experts(cfg)]
    ensembles = ["ensemble", "ensemble-top1"] if packs(cfg) else []
    return {name: Job("train_expert", name) for name in names} | dict.fromkeys(ensembles, Job("ensemble"))


def look(cfg: Config, reads_corpus: bool = True) -> States:
    """The state of every job. Reads the records in the outdir, and corpus files that look changed.

    Without `reads_corpus`, the corpus may be gone: it counts as what it was. Raises ValueError for tasks that
    cannot be run here.
    """
    task_files.check(cfg.eval.tasks)
    outdir, states = Path(cfg.outdir), {}
    for job, inputs in jobs(cfg).items():
        downstream = any(states[i].runs and not spares(job, i, states) for i in inputs)
        record, reasons = _read(outdir, job)
        # the rate of an adopted expert may become another one
        if record is not None and not (downstream and chosen.is_adopted(cfg, *job)):
            reasons += _plan_reasons(cfg, job, record, states)
            if not downstream and (reads_corpus or job.rule not in OF_CORPUS):
                reasons += _input_reasons(cfg, job, record, states)
        states[job] = State(reasons, downstream, record)
    return states


def spares(job: Job, read: Job, states: States) -> bool:
    """Whether a job can stay though one that it reads runs: an ensemble with other tags says the same."""
    state = states[read]
    only_tags = not state.downstream and all(reason.field == "tags" for reason in state.reasons)
    return job.rule == "eval_task" and read.rule == "ensemble" and only_tags


def _read(outdir: Path, job: Job) -> tuple[dict[str, Any] | None, list[Reason]]:
    """The record of a job, and what is wrong with it or its files."""
    record = None
    try:
        record = records.read(outdir, *job)
        missing = records.missing(outdir, *job, record)
        if missing and not (missing == [outdir / job.outputs[0]] and chosen.is_out(outdir, *job, record)):
            return record, [Reason(f"{missing[0].relative_to(outdir)} is missing")]
        records.check_beside(outdir, job.rule, record)
        return record, []
    except FileNotFoundError:
        return None, [Reason("not made yet")]
    except DAMAGED as error:
        return record, [Reason(str(error))]


def _reader(states: States) -> Read:
    """Reads the records that were found."""

    def read(rule: str, expert: str | None = None) -> dict[str, Any]:
        found = states[Job(rule, expert)].record
        assert found is not None
        return found

    return read


def _plan_reasons(cfg: Config, job: Job, record: dict[str, Any], states: States) -> list[Reason]:
    """The values of the plan that have changed."""
    old, new = record.get("made_with", {}), chosen.content(cfg, *job, _reader(states))
    return [
        Reason("its plan has changed", field, old.get(field), new.get(field))
        for field in dict.fromkeys([*new, *old])
        if (field in old, old.get(field)) != (field in new, new.get(field))
    ]


def _input_reasons(cfg: Config, job: Job, record: dict[str, Any], states: States) -> list[Reason]:
    """The inputs that are no longer those that the job was made from. All their jobs are up to date."""
    try:
        found, expected = record["made_from"], identities(cfg, job, _reader(states))
    except DAMAGED as error:
        return [Reason(str(error))]
    if expected is None:
        return []
    names = [name for name in dict.fromkeys([*expected, *found]) if found.get(name) != expected.get(name)]
    return [Reason(f"its input {name} has changed") for name in names]


def identities(cfg: Config, job: Job, read: Read) -> dict[str, str] | None:
    """What a job would be made from now, by the records of its inputs. None if that cannot be known."""
    match job.rule:
        case "tokenizer" | "shard":
            return _of_corpus(cfg, job, read)
        case "embed":
            return made_from.vectors(read("shard"), records.read_embedder(Path(cfg.outdir)))
        case "fit_kmeans":
            return made_from.fit_kmeans(read("embed"), read("shard") if cfg.cluster.by != "text" else None)
        case "assign":
            return made_from.assign(read("shard"), read("fit_kmeans"))
        case "assign_random":
            return made_from.assign_random(read("shard"))
        case "score_training":
            return made_from.score_training(read("train_expert", job.expert), read("shard"))
        case "second_round":
            return rounds.identities(cfg, read)
        case "train_expert":
            planned = plan.train_expert(cfg, chosen.training(cfg, *job, read))
            rules = {"corpus": "shard", "random": "assign_random", "clusters": rounds.rule(cfg)}
            rule = rules.get(planned.data, "assign")
            first = plan.begins_as(cfg, planned.expert)
            begun = read("train_expert", first) if first else None
            return made_from.train_expert(planned, read(rule), read("tokenizer"), begun)
        case "choose":
            models = plan.kinds(cfg)[job.expert or ""]
            candidates = [one for name in models for one in plan_search.candidates(cfg, name)]
            return made_from.choose({name: read("train_expert", name) for name in candidates})
        case "score_expert":
            return made_from.score_expert(read("train_expert", job.expert), read("shard"))
        case "route":
            return made_from.route(read("shard"), rounds.clusterer(cfg, read))
        case "eval_ensemble":
            scores = {name: read("score_expert", name) for name in plan.evaluated(cfg)}
            choices = {kind: read("choose", kind) for kind in plan.searched(cfg)}
            labelled = read("shard") if cfg.corpus.label_field else None
            return made_from.eval_ensemble(read("route"), scores, choices, labelled)
        case "report":
            terms = rounds.terms(cfg)
            others = {rule: read(rule, expert) for rule, expert in records.SHOWN.items()}
            others |= {f"train_expert {name}": read("train_expert", name) for name in plan.trained(cfg)}
            tasks = read("tasks_table") if cfg.eval.tasks else None
            return made_from.report(
                read("eval_ensemble"), terms, read(rounds.rule(cfg)), read("shard"), others, tasks
            )
        case "eval_task":
            assert job.expert
            model = read(*task_models(cfg)[job.expert])
            return made_from.eval_task(model, task_files.identities(cfg.eval.tasks))
        case "tasks_table":
            return made_from.tasks_table({name: read("eval_task", name) for name in task_models(cfg)})
        case "ensemble":
            terms = rounds.terms(cfg)
            cards = {name: read("train_expert", name) for name in plan.cluster_experts(cfg)}
            return made_from.ensemble(
                read("eval_ensemble"), rounds.clusterer(cfg, read), terms, read("tokenizer"), cards
            )
    raise AssertionError(job)


def _of_corpus(cfg: Config, job: Job, read: Read) -> dict[str, str] | None:
    """The same for the rules that read the corpus. A demo corpus that is gone can be made again."""
    demo, seen = Path(cfg.outdir, DEMO), Path(cfg.outdir, content.SEEN)
    if corpus_files.DEMO in [*cfg.corpus.train, *(cfg.corpus.eval or [])] and not demo.exists():
        return None
    if job.rule == "shard":
        corpus = content.of_corpus(cfg.corpus.train, cfg.corpus.eval, demo, seen)
        return {"tokenizer": read("tokenizer")["identity"], "corpus": corpus}
    source = plan.tokenizer(cfg).source
    return {} if source else {"corpus": content.of_training_text(cfg.corpus.train, demo, seen)}


class Asked(NamedTuple):
    """What the user has asked Snakemake for. Targets are rules or files; none means the whole run."""

    targets: Sequence[str]
    anew: Sequence[str]  # rules and files to make again even if they are up to date
    all_anew: bool  # everything that the targets need
    targets_anew: bool  # the targets themselves


class Start(NamedTuple):
    """The jobs that a start runs, and those of them that it makes again whatever they were made from."""

    run: list[Job]
    anew: set[Job]


def start(cfg: Config, states: States, asked: Asked) -> Start:
    """The jobs of a start: those that are not up to date, those that are asked for, and all that read them,
    as far as the targets need them.
    """
    inputs = jobs(cfg)
    targets = named(cfg, asked.targets)
    whole = not asked.targets or bool({"all"} & set(asked.targets))
    needed = set(inputs) if whole else _with_inputs(inputs, targets)
    anew = named(cfg, asked.anew) | (targets if asked.targets_anew else set())
    anew = needed if asked.all_anew else anew
    needed |= _with_inputs(inputs, anew)
    run: set[Job] = set()
    for job, reads in inputs.items():
        others = any(i in run and not (i not in anew and spares(job, i, states)) for i in reads)
        if job in needed and (states[job].runs or job in anew or others):
            run.add(job)
    return Start([job for job in inputs if job in run], anew & run)


def named(cfg: Config, names: Iterable[str]) -> set[Job]:
    """The jobs of some rules and files. Names that are none of them are left out."""
    by_name: dict[str, set[Job]] = {}
    for job in jobs(cfg):
        by_name.setdefault(job.rule, set()).add(job)
        for output in job.outputs:
            by_name.setdefault(os.path.relpath(Path(cfg.outdir, output)), set()).add(job)
    known = (name if name in by_name else os.path.relpath(name) for name in names)
    return {job for name in known for job in by_name.get(name, ())}


def _with_inputs(inputs: dict[Job, list[Job]], some: set[Job]) -> set[Job]:
    """Some jobs, and all jobs whose outputs they need."""
    found, left = set(some), list(some)
    while left:
        new = [i for i in inputs[left.pop()] if i not in found]
        found.update(new)
        left += new
    return found
