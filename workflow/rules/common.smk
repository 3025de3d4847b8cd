# What all rules share: the runs, their experts, and how a job begins. RUNS and OUT come from one_run.smk or study.smk.
# In a study, OUT has the wildcard {run}. Every function below finds its run by it.
import functools
import json
import re
import sys
from pathlib import Path


from cbtm_pipeline import config as schema
from cbtm_pipeline import compare, plan, plan_first, plan_search, preview
from cbtm_pipeline.base import cli, lock, printable, trust
from cbtm_pipeline.corpus import content
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops import interrupt, started, study, terminal
from cbtm_pipeline.provenance import kept, lent, records, stale
from cbtm_pipeline.slurm import request

RUN_CONFIG = f"{OUT}/config.json"
PLANNED = f"{OUT}/{content.PLANNED}"
DEMO = f"{OUT}/{stale.DEMO}"
CONDA = f"{workflow.basedir}/../envs/cbtm.yaml"
EXPERTS = list(dict.fromkeys(name for run in RUNS.values() for name in run.experts))
TRAININGS = list(dict.fromkeys(name for run in RUNS.values() for name in run.trainings))
FIRSTS = list(
    dict.fromkeys(
        name
        for run in RUNS.values()
        if run.config.cluster.second_round
        for name in plan_first.firsts(run.config)
    )
)
KINDS = list(dict.fromkeys(kind for run in RUNS.values() for kind in run.searched))
ADOPTED = list(dict.fromkeys(name for run in RUNS.values() for name in run.adopted))
SEARCHING = [name for name, run in RUNS.items() if run.searched]
TASK_MODELS = list(
    dict.fromkeys(name for run in RUNS.values() for name in run.task_models)
)


def run_of(wildcards):
    """The run that a job belongs to. Whoever asks first makes the start decide what it runs."""
    begin()
    return RUNS[wildcards.get("run", "")]


@functools.cache
def begin():
    """Decide what this start runs. Known once Snakemake has read its command line, so not while it reads this file.

    The records in the outdirs say it (stale.py), neither the times of files nor what Snakemake remembers: it runs
    what is forced or missing, and what reads that.
    """
    settings = workflow.dag_settings
    targets = sorted(settings.targets)
    asked = stale.Asked(
        targets=[] if set(targets) & WHOLE else targets,
        anew=sorted(settings.forcerun),
        all_anew=settings.forceall,
        targets_anew=settings.forcetargets,
    )
    for run in RUNS.values():
        run.begin(asked)
        workflow.dag.forcefiles.update(run.outdated())
    study.lend(RUNS)
    for line in preview.of_runs(RUNS):
        print(printable.printable(line), file=sys.stderr, flush=True)


def corpus(wildcards):
    """The corpus of a run."""
    run = run_of(wildcards)
    demo = run.path(stale.DEMO)
    return ancient([demo if path == corpus_files.DEMO else path for path in run.spoken])


def demo_flag(wildcards):
    """The option that says where the built-in corpus lies, for a run that reads it."""
    run = run_of(wildcards)
    return ["--demo", run.path(stale.DEMO)] if run.reads_demo else []


def made(*outputs):
    """Inputs that other rules make, below the outdir. Their times count only if these rules run in this start."""

    def paths(wildcards):
        found = [
            made_by(run_of(wildcards), output.format(**dict(wildcards.items())))
            for output in outputs
        ]
        return found if len(found) > 1 else found[0]

    return paths


def of_clusters(name):
    """The manifest, the clusterer or the terms of the clusters whose experts are evaluated."""

    def path(wildcards):
        run = run_of(wildcards)
        return made_by(run, run.clusters[name])

    return path


def first_scores(wildcards):
    """What the experts of the first round say of the training documents."""
    run = run_of(wildcards)
    names = plan_first.firsts(run.config)
    return [made_by(run, f"second/scores/{name}.npz") for name in names]


def made_by(run, name):
    """An output of a run, by its path below the outdir, as an input."""
    return run.path(name) if run.produces(name) else ancient(run.path(name))


def of_experts(pattern, which="experts"):
    """Inputs that are made for each of some models: `experts` are scored, `trained` are all, `clusters` are packed."""

    def paths(wildcards):
        run = run_of(wildcards)
        clusters = plan.cluster_experts(run.config)
        names = {"experts": run.experts, "trained": run.trained, "clusters": clusters}[
            which
        ]
        return [made_by(run, pattern.format(name)) for name in names]

    return paths


def clusterings(wildcards):
    """The manifests of the clusters, and of the random ones if there are any."""
    run = run_of(wildcards)
    return [made_by(run, name) for name in run.clusterings]


def labels_read(wildcards):
    """The shards, where the result is told by the labels of documents."""
    run = run_of(wildcards)
    has_labels = run.config.corpus.label_field is not None
    return [made_by(run, "shards/manifest.json")] if has_labels else []


def lender(rule):
    """The outputs of this job in the run that lends them: they have to be there first. Nothing outside a study."""

    def paths(wildcards):
        expert = wildcards.get("expert")
        other = run_of(wildcards).lender(rule, expert)
        if other is None:
            return []
        is_demo = rule == lent.DEMO_RULE
        if is_demo:
            return ancient(other.path(stale.DEMO))
        return made_by(other, records.PLACES[rule].outputs[0].format(expert))

    return paths


TOUCH = bool(
    {"--touch", "-t"} & set(sys.argv)
)  # makes nothing, so it must replace nothing


def before_start():
    """Lock the outdirs, write the configs that the jobs read, and keep what they replace."""
    try:
        for run in RUNS.values():
            lock.hold(run.out)
    except ValueError as error:
        sys.exit(cli.explain(error))
    for run in RUNS.values():
        if open_to_all := trust.local_warning(Path(run.out)):
            print(printable.printable(open_to_all), file=sys.stderr, flush=True)
        if not TOUCH:
            prepare(run)
    if not TOUCH:
        interrupt.pass_on()


def prepare(run):
    """Write what the jobs of a run read, and keep what they replace."""
    out = Path(run.out)
    schema.write(run.config, out / "config.json")
    content.write_planned(run.corpus_files, out / content.PLANNED)
    kept.keep(out, run.start.run)
    if run.runs(stale.Job("eval_ensemble")) and is_whole():
        kept.put_away(out, run.folders, stale.packs(run.config))
    if run.runs(stale.Job("report")) and is_whole() and not run.task_models:
        kept.drop_tasks(out)


def after_success():
    """Drop what was kept and is in its place again. A run of a part, or --touch, drops nothing."""
    if is_whole() and not TOUCH:
        for run in RUNS.values():
            kept.tidy(Path(run.out), run.config.run.keep_replaced)


def is_whole():
    """Whether the run ends where its targets say, and not before."""
    return not workflow.dag_settings.until and not workflow.dag_settings.omit_from


def unless_done(run, job):
    """A check that ends a job if its plan and inputs are those that its outputs were made from, here or in the
    run that lends them.

    Nothing, if no earlier run has made outputs, or if the user wants them made again.
    """
    other = run.lender(*job)
    was_made = job in run.states and (
        run.states[job].record or kept.has(Path(run.out), job)
    )
    if (not was_made and other is None) or job in run.start.anew:
        return []
    expert = ["--expert", job.expert] if job.expert else []
    log = f"{job.rule}/{job.expert}.log" if job.expert else f"{job.rule}.log"
    check = [
        *("python", "-m", "cbtm_pipeline.provenance.unchanged"),
        *("--config", run.path("config.json"), "--log", run.path(f"logs/{log}")),
        *(["--lender", other.out] if other else []),
    ]
    return [*check, "--rule", job.rule, *expert, "--"]


def expert_inputs(wildcards):
    """The data, the tokenizer and the model that a training begins as, if there is one."""
    inputs = {
        "data": run_of(wildcards).manifest(plan.data_of(wildcards.expert)[0]),
        "tokenizer": "tokenizer/tokenizer.json",
    }
    if first := plan.begins_as(run_of(wildcards).config, wildcards.expert):
        inputs["seed_model"] = f"experts/{first}/model.safetensors"
    return {name: made(output)(wildcards) for name, output in inputs.items()}


def kind_cards(wildcards):
    """The cards of all candidates of a kind, of which one rate is chosen."""
    run = run_of(wildcards)
    names = run.searched[wildcards.kind]
    return [card for name in names for card in candidate_cards(run, name)]


def expert_cards(wildcards):
    """The cards of the candidates of an expert."""
    return candidate_cards(run_of(wildcards), wildcards.expert)


def candidate_cards(run, expert):
    candidates = plan_search.candidates(run.config, expert)
    return [made_by(run, f"experts/{name}/card.json") for name in candidates]


def choice_of(wildcards):
    """The choice of the rate of an expert."""
    return made(f"search/{plan_search.kind(wildcards.expert)}.json")(wildcards)


def choices(wildcards):
    """All choices of a run that searches rates."""
    run = run_of(wildcards)
    return [made_by(run, f"search/{kind}.json") for kind in run.searched]


def task_model(wildcards):
    """The model that is given the tasks. It may be packed again without being another one (stale.spares)."""
    run = run_of(wildcards)
    weights, *_ = run.task_models[wildcards.expert].outputs
    if run.runs(stale.Job("eval_task", wildcards.expert)):
        return made(weights)(wildcards)
    return ancient(run.path(weights))


def task_results(wildcards):
    """The results of all models that are given the tasks."""
    run = run_of(wildcards)
    return [made_by(run, f"eval/tasks/{name}.json") for name in run.task_models]


def tasks_of_report(wildcards):
    """The table of the tasks, if the run has any."""
    run = run_of(wildcards)
    return [made_by(run, "eval/tasks.json")] if run.task_models else []


def study_inputs(wildcards):
    """The results of all runs of a study. Their table is made again if it is of other results."""
    begin()
    runs = RUNS.values()
    if not compare.is_of(Path(RESULTS[0]), [Path(run.out) for run in runs]):
        workflow.dag.forcefiles.update(name for name in RESULTS if Path(name).exists())
    return [made_by(run, "eval/metrics.json") for run in runs]


def state_folder(wildcards):
    """The folder in which a training keeps its resumable state."""
    return run_of(wildcards).path(f"work/{wildcards.expert}")


def beside(paths, name):
    """For each path, the file called `name` in the same folder."""
    return [str(Path(path).with_name(name)) for path in paths]


def shown_records(wildcards):
    """The artifacts whose plans the report shows, besides those of its inputs."""
    run = run_of(wildcards)
    return [
        run.path(records.PLACES[rule].record.format(expert))
        for rule, expert in records.SHOWN.items()
    ]


def launch(rule, name=None, state_folder=None):
    """What a rule's command begins with: perhaps a check that it has something to do, and perhaps a Slurm launcher.

    The launcher is there if the profile names a Slurm partition for the rule.
    """

    def prefix(wildcards, input, output, threads, resources):
        run, expert = run_of(wildcards), wildcards.get("expert")
        submit = request.command_line(
            name=f"{name}-{expert}" if name else rule,
            folder=run.path("slurm"),
            resources=dict(resources.items()),
            threads=threads,
            depends_on=json.dumps(
                plan.content(run.config, rule, expert), sort_keys=True
            ),
            inputs=[*input, *run.unspoken],
            outputs=output,
            work=state_folder(wildcards) if state_folder else None,
        )
        return [*unless_done(run, stale.Job(rule, expert)), *submit]

    return prefix
