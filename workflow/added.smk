"""One expert more for a finished run: what `cbtm add-expert` runs.

shard          the new documents, with the run's tokenizer
embed          the centre of the documents, and the expert that is nearest to it
train_expert   that expert, trained on the documents

The outdir is <outdir of the run>/added/NAME, and config.json there the config: that of the run with another corpus.
Nothing of the run is an output here. The names of the rules are those of the run, so a profile holds for both.
"""


include: "asked.smk"
include: "asked_shard.smk"


WORK = f"{OUT}/work/{NAME}"


wildcard_constraints:
    expert=NAME,


localrules:
    all,


rule all:
    default_target: True
    input:
        f"{OUT}/experts/{NAME}/model.safetensors",


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
        config=RUN_CONFIG,
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
        launch=launch("train_expert", "expert", WORK),
        config=RUN_CONFIG,
        tokenizer=ASKED["tokenizer"],
        # made by embed; no output, as it is a hard link that is older than the documents
        parent=f"{OUT}/parent/model.safetensors",
        work=WORK,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.train_expert --config {params.config:q} --expert {wildcards.expert} --added"
        " --data {input.data:q} --tokenizer {params.tokenizer:q} --seed-model {params.parent:q} --out {output:q}"
        " --work {params.work:q} --threads {threads} --log {log:q}"
