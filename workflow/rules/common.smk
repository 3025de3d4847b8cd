# What all rules share: the validated config, the experts, the environment of the jobs.
import functools
import json
import re
import sys
from pathlib import Path


include: "environment.smk"


from cbtm_pipeline import config as schema
from cbtm_pipeline import plan, plan_search, preview
from cbtm_pipeline.inference import harness
from cbtm_pipeline.provenance import kept, records, stale
from cbtm_pipeline.base import cli, lock, printable, read_yaml, trust
from cbtm_pipeline.corpus import content
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops import planned, terminal
from cbtm_pipeline.slurm import request

try:
    for path in ["config.yaml", *workflow.overwrite_configfiles]:
        read_yaml.read(
            path
        )  # a key that stands twice is an error, which Snakemake does not see
    planned.check_given_once(sys.argv)
    CONFIG = schema.validate(config)
    CORPUS_FILES = corpus_files.find(
        CONFIG.corpus.train, CONFIG.corpus.eval, CONFIG.outdir
    )
    STATES = stale.look(CONFIG)
    harness.check_at_start(CONFIG, STATES)
except (ValueError, OSError) as error:
    sys.exit(cli.explain(error))

OUT = str(Path(CONFIG.outdir))  # Snakemake warns of double slashes in names
RUN_CONFIG = f"{OUT}/config.json"
PLANNED = f"{OUT}/{content.PLANNED}"
CONDA = f"{workflow.basedir}/../envs/cbtm.yaml"
EXPERTS = plan.trained(CONFIG)
TRAININGS = list(plan.trainings(CONFIG))
SEARCHED = plan.searched(CONFIG)
ADOPTED = [name for names in SEARCHED.values() for name in names]
TASK_MODELS = stale.task_models(CONFIG)
MANIFESTS = {
    "corpus": "shards/manifest.json",
    "clusters": "assignments/manifest.json",
    "random": "random/manifest.json",
}
PRODUCERS = {output: job for job in STATES for output in job.outputs}
CLUSTERINGS = ["clusters", "random"] if plan.random_experts(CONFIG) else ["clusters"]


@functools.cache
def start():
    """The jobs of this start. Known once Snakemake has read its command line, so not while it reads this file."""
    settings = workflow.dag_settings
    asked = stale.Asked(
        targets=sorted(settings.targets),
        anew=sorted(settings.forcerun),
        all_anew=settings.forceall,
        targets_anew=settings.forcetargets,
    )
    found = stale.start(CONFIG, STATES, asked)
    for line in preview.lines(CONFIG, STATES, found):
        print(printable.printable(line), file=sys.stderr, flush=True)
    return found


def corpus(wildcards):
    """The corpus. Every run asks for this input before Snakemake decides what to run.

    So here, Snakemake is told which outputs to make again. The records in the outdir say it (stale.py), neither the
    times of files nor what Snakemake remembers: it runs what is forced or missing, and what reads that.
    """
    outputs = [f"{OUT}/{output}" for job in start().run for output in job.outputs]
    workflow.dag.forcefiles.update(
        output for output in outputs if Path(output).exists()
    )
    return ancient(CORPUS)


def made(*outputs):
    """Inputs that other rules make, below the outdir. Their times count only if these rules run in this start."""

    def paths(wildcards):
        named = [output.format(**dict(wildcards.items())) for output in outputs]
        found = [
            (
                f"{OUT}/{name}"
                if PRODUCERS[name] in start().run
                else ancient(f"{OUT}/{name}")
            )
            for name in named
        ]
        return found if len(found) > 1 else found[0]

    return paths


TOUCH = bool(
    {"--touch", "-t"} & set(sys.argv)
)  # makes nothing, so it must replace nothing


def before_start():
    """Lock the outdir, write the config that the jobs read, and keep what they replace."""
    try:
        lock.hold(OUT)
    except ValueError as error:
        sys.exit(cli.explain(error))
    if open_to_all := trust.local_warning(Path(OUT)):
        print(printable.printable(open_to_all), file=sys.stderr, flush=True)
    if TOUCH:
        return
    schema.write(CONFIG, RUN_CONFIG)
    content.write_planned(CORPUS_FILES, Path(PLANNED))
    kept.keep(Path(OUT), start().run)
    if stale.Job("eval_ensemble") in start().run and is_whole():
        kept.put_away(Path(OUT), plan.folders(CONFIG), stale.packs(CONFIG))
    if stale.Job("report") in start().run and is_whole() and not TASK_MODELS:
        kept.drop_tasks(Path(OUT))


def after_success():
    """Drop what was kept and is in its place again. A run of a part, or --touch, drops nothing."""
    if is_whole() and not TOUCH:
        kept.tidy(Path(OUT), CONFIG.run.keep_replaced)


def is_whole():
    """Whether the run ends where its targets say, and not before."""
    return not workflow.dag_settings.until and not workflow.dag_settings.omit_from


def unless_done(job):
    """A check that ends a job if its plan and inputs are those that its outputs were made from.

    Nothing, if no earlier run has made outputs, or if the user wants them made again.
    """
    if (
        job not in STATES
        or job in start().anew
        or not (STATES[job].record or kept.has(Path(OUT), job))
    ):
        return []
    expert = ["--expert", job.expert] if job.expert else []
    log = (
        f"{OUT}/logs/{job.rule}/{job.expert}.log"
        if job.expert
        else f"{OUT}/logs/{job.rule}.log"
    )
    check = [
        "python",
        "-m",
        "cbtm_pipeline.provenance.unchanged",
        "--config",
        RUN_CONFIG,
        "--log",
        log,
    ]
    return [*check, "--rule", job.rule, *expert, "--"]


def expert_inputs(wildcards):
    """The data, the tokenizer and the seed model of a training. Those from scratch have no seed model."""
    inputs = {
        "data": MANIFESTS[plan.data_of(wildcards.expert)[0]],
        "tokenizer": "tokenizer/tokenizer.json",
    }
    if plan.branches(wildcards.expert):
        inputs["seed_model"] = "experts/seed/model.safetensors"
    return {name: made(output)(wildcards) for name, output in inputs.items()}


def kind_cards(wildcards):
    """The cards of all candidates of a kind, of which one rate is chosen."""
    return made(
        *(card for name in SEARCHED[wildcards.kind] for card in candidate_cards(name))
    )(wildcards)


def expert_cards(wildcards):
    """The cards of the candidates of an expert."""
    return made(*candidate_cards(wildcards.expert))(wildcards)


def candidate_cards(expert):
    return [
        f"experts/{name}/card.json" for name in plan_search.candidates(CONFIG, expert)
    ]


def choice_of(wildcards):
    """The choice of the rate of an expert."""
    return made(f"search/{plan_search.kind(wildcards.expert)}.json")(wildcards)


def task_model(wildcards):
    """The model that is given the tasks. It may be packed again without being another one (stale.spares)."""
    weights, *_ = TASK_MODELS[wildcards.expert].outputs
    if stale.Job("eval_task", wildcards.expert) in start().run:
        return made(weights)(wildcards)
    return ancient(f"{OUT}/{weights}")


def state_folder(wildcards):
    """The folder in which a training keeps its resumable state."""
    return f"{OUT}/work/{wildcards.expert}"


def beside(paths, name):
    """For each path, the file called `name` in the same folder."""
    return [str(Path(path).with_name(name)) for path in paths]


def launch(rule, name=None, state_folder=None):
    """What a rule's command begins with: perhaps a check that it has something to do, and perhaps a Slurm launcher.

    The launcher is there if the profile names a Slurm partition for the rule.
    """

    def prefix(wildcards, input, output, threads, resources):
        expert = wildcards.get("expert")
        submit = request.command_line(
            name=f"{name}-{expert}" if name else rule,
            folder=f"{OUT}/slurm",
            resources=dict(resources.items()),
            threads=threads,
            depends_on=json.dumps(plan.content(CONFIG, rule, expert), sort_keys=True),
            inputs=input,
            outputs=output,
            work=state_folder(wildcards) if state_folder else None,
        )
        return [*unless_done(stale.Job(rule, expert)), *submit]

    return prefix
