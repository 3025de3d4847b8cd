"""Any text under the models of a finished run: what `cbtm score` runs with --profile or --cores.

shard          the documents, all held out, with the run's tokenizer
route          the distances of their prefixes to the centres of the ensemble
score_expert   their log-probabilities under one expert or baseline

The outdir is <outdir of the run>/scored/NAME, and config.json there the config: that of the run with another corpus.
Nothing of the run is an output here. The command names the outputs that it wants, and mixes. The names of the rules are
those of the run, so a profile holds for both.
"""


include: "asked.smk"
include: "asked_shard.smk"


wildcard_constraints:
    expert="|".join(ASKED["weights"]),


rule route:
    input:
        shards=f"{OUT}/shards/manifest.json",
    output:
        f"{OUT}/route/distances.npz",
    log:
        f"{OUT}/logs/route.log",
    conda:
        CONDA
    params:
        launch=launch("route"),
        config=RUN_CONFIG,
        ensemble=ASKED["ensemble"],
        tokenizer=ASKED["tokenizer"],
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.route --config {params.config:q} --shards {input.shards:q}"
        " --ensemble {params.ensemble:q} --tokenizer {params.tokenizer:q} --out {output:q} --log {log:q}"


rule score_expert:
    input:
        shards=f"{OUT}/shards/manifest.json",
    output:
        f"{OUT}/scores/{{expert}}.npz",
    log:
        f"{OUT}/logs/score_expert/{{expert}}.log",
    conda:
        CONDA
    params:
        launch=launch("score_expert", "score"),
        config=RUN_CONFIG,
        weights=lambda wildcards: ASKED["weights"][wildcards.expert],
        ensemble=lambda wildcards: (
            ["--ensemble", ASKED["ensemble"]]
            if wildcards.expert in ASKED["experts"]
            else []
        ),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.score_expert --config {params.config:q} --expert-weights {params.weights:q}"
        " {params.ensemble:q} --shards {input.shards:q} --out {output:q} --threads {threads} --log {log:q}"
