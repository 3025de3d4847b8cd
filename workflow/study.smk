"""A study: many settings as one DAG, which makes what they share once, and ends in one table and one page.

    snakemake -s workflow/study.smk --configfile study.yaml --cores 2

ops/study.py says what study.yaml holds. Each setting is an ordinary run in <outdir>/runs/NAME, made by the rules of the
Snakefile: here, OUT has the wildcard {run}. A job that several runs have is made in one of them; the others wait for it
and take its outputs (`lender` in rules/common.smk).

Snakemake's modules would give each run rules of its own names. Then no profile could name their resources, and each
module would decide on its own what to run.
"""


include: "rules/environment.smk"


import re

from cbtm_pipeline import compare
from cbtm_pipeline.base import cli, lock, read_yaml
from cbtm_pipeline.ops import planned, study, which_run

try:
    for path in workflow.overwrite_configfiles:
        read_yaml.read(path)
    planned.check_given_once(sys.argv)
    STUDY = study.read(config)
    RUNS = study.runs(STUDY)
except (ValueError, OSError) as error:
    sys.exit(cli.explain(error))

OUT = f"{STUDY.outdir}/{which_run.RUNS}/{{run}}"
RESULTS = [f"{STUDY.outdir}/{name}" for name in compare.RESULTS]
WHOLE = {"all", "study", *RESULTS}


include: "rules/common.smk"
include: "rules/corpus.smk"
include: "rules/cluster.smk"
include: "rules/experts.smk"
include: "rules/merge.smk"
include: "rules/tasks.smk"


terminal.be_brief(logger, workflow.output_settings)


wildcard_constraints:
    run="|".join(map(re.escape, RUNS)),
    expert="|".join(EXPERTS),


localrules:
    all,
    study,


onstart:
    try:
        lock.hold(STUDY.outdir)
    except ValueError as error:
        sys.exit(cli.explain(error))
    # This file marks the folder as one of outputs, which no corpus is read from.
    if not TOUCH:
        content.write_planned(
            [path for run in RUNS.values() for path in run.corpus_files],
            Path(STUDY.outdir, content.PLANNED),
        )
    before_start()


onsuccess:
    after_success()
    # a start for some runs alone makes no table
    if WHOLE.intersection(workflow.dag_settings.targets or ["all"]):
        print(compare.table(Path(STUDY.outdir)))


rule all:
    default_target: True
    input:
        RESULTS,
        [run.path("report.html") for run in RUNS.values()],
        [
            run.path("ensemble/files.json")
            for run in RUNS.values()
            if stale.packs(run.config)
        ],


rule study:
    input:
        study_inputs,
    output:
        RESULTS,
    log:
        f"{STUDY.outdir}/logs/study.log",
    conda:
        CONDA
    params:
        runs=[run.out for run in RUNS.values()],
        out=lambda wildcards, output: str(Path(output[0]).parent),
    shell:
        "exec python -m cbtm_pipeline.compare {params.runs:q} --out {params.out:q} --log {log:q} > /dev/null"
