"""One expert more for a finished run: what `cbtm add-expert` runs.

shard          the new documents, with the run's tokenizer
embed          the centre of the documents, and the expert that is nearest to it
train_expert   that expert, trained on the documents

The outdir is <outdir of the run>/added/NAME, and config.json there the config: that of the run with another corpus.
Nothing of the run is an output here. The names of the rules are those of the run, so a profile holds for both.
"""


include: "rules/environment.smk"


from cbtm_pipeline import config as schema
from cbtm_pipeline import plan_added
from cbtm_pipeline.base import artifact, cli, lock
from cbtm_pipeline.corpus import content
from cbtm_pipeline.ops import terminal
from cbtm_pipeline.slurm import request

try:
    CONFIG = schema.validate(config)
    ASKED = artifact.read_sealed(f"{CONFIG.outdir}/request.json", "request")
except (ValueError, OSError) as error:
    sys.exit(cli.explain(error))

OUT = CONFIG.outdir
NAME = ASKED["expert"]
CONDA = f"{workflow.basedir}/../envs/cbtm.yaml"
# The request holds the identities of all that is read. Times of files decide nothing.
REQUEST = ancient(f"{OUT}/request.json")
WORK = f"{OUT}/work/{NAME}"

terminal.be_brief(logger, workflow.output_settings)


def launch(rule, name=None, state_folder=None):
    """The Slurm launcher that a rule's command begins with, if the profile names a partition for the rule."""

    def prefix(wildcards, input, output, threads, resources):
        return request.command_line(
            name=name or f"{rule}-{NAME}",
            folder=f"{OUT}/slurm",
            resources=dict(resources.items()),
            threads=threads,
            depends_on=artifact.fingerprint(ASKED),
            inputs=input,
            outputs=output,
            work=state_folder,
        )

    return prefix


wildcard_constraints:
    expert=NAME,


localrules:
    all,


onstart:
    lock.hold(OUT)


rule all:
    default_target: True
    input:
        f"{OUT}/experts/{NAME}/model.safetensors",


rule shard:
    input:
        REQUEST,
    output:
        f"{OUT}/shards/manifest.json",
    log:
        f"{OUT}/logs/shard.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("shard"),
        config=f"{OUT}/config.json",
        planned=f"{OUT}/{content.PLANNED}",
        tokenizer=ASKED["tokenizer"],
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.shard --config {params.config:q} --tokenizer {params.tokenizer:q}"
        " --workers {threads} --planned {params.planned:q} --out {output:q} --log {log:q}"


rule embed:
    input:
        shards=f"{OUT}/shards/manifest.json",
    output:
        f"{OUT}/branch.npz",
    log:
        f"{OUT}/logs/embed.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("embed"),
        config=f"{OUT}/config.json",
        ensemble=ASKED["ensemble"],
        seal=ASKED["ensemble_seal"],
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.inference.branch --config {params.config:q} --shards {input.shards:q}"
        " --ensemble {params.ensemble:q} --seal {params.seal:q} --out {output:q} --log {log:q}"


# The resumable state in work/ is not an output, because Snakemake deletes outputs before a job starts and after it fails.
rule train_expert:
    input:
        data=f"{OUT}/shards/manifest.json",
        branch=f"{OUT}/branch.npz",
    output:
        f"{OUT}/experts/{{expert}}/model.safetensors",
    log:
        f"{OUT}/logs/train_expert/{{expert}}.log",
    conda:
        CONDA
    params:
        launch=launch("train_expert", f"expert-{NAME}", WORK),
        config=f"{OUT}/config.json",
        tokenizer=ASKED["tokenizer"],
        # made by embed; no output, as it is a hard link that is older than the documents
        parent=f"{OUT}/parent/model.safetensors",
        work=WORK,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.train_expert --config {params.config:q} --expert {wildcards.expert} --added"
        " --data {input.data:q} --tokenizer {params.tokenizer:q} --seed-model {params.parent:q} --out {output:q}"
        " --work {params.work:q} --threads {threads} --log {log:q}"
