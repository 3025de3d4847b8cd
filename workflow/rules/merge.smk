rule route:
    input:
        shards=f"{OUT}/shards/manifest.json",
        embedder=f"{OUT}/embed/embedder.npz",
        clusterer=f"{OUT}/cluster/clusterer.npz",
        tokenizer=f"{OUT}/tokenizer/tokenizer.json",
    output:
        f"{OUT}/route/distances.npz",
    log:
        f"{OUT}/logs/route.log",
    conda:
        CONDA
    params:
        launch=launch("route"),
        config=RUN_CONFIG,
        depends_on=parameters("route"),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.route --config {params.config:q} --shards {input.shards:q} --embedder {input.embedder:q}"
        " --clusterer {input.clusterer:q} --tokenizer {input.tokenizer:q} --out {output:q} --log {log:q}"


# The command's own output goes to /dev/null: the Snakefile prints the table at the end of the run.
rule eval_ensemble:
    input:
        distances=f"{OUT}/route/distances.npz",
        scores=expand(f"{OUT}/scores/{{expert}}.npz", expert=EXPERTS),
        experts=expand(f"{OUT}/experts/{{expert}}/model.safetensors", expert=EXPERTS),
    output:
        metrics=f"{OUT}/eval/metrics.json",
        table=f"{OUT}/eval/table.txt",
    log:
        f"{OUT}/logs/eval_ensemble.log",
    conda:
        CONDA
    params:
        launch=launch("eval_ensemble"),
        config=RUN_CONFIG,
        depends_on=parameters("eval_ensemble"),
        cards=lambda wildcards, input: beside(input.experts, "card.json"),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.eval_ensemble --config {params.config:q} --distances {input.distances:q}"
        " --scores {input.scores:q} --experts {params.cards:q} --out {output.metrics:q} --log {log:q}"
        " > /dev/null"


rule report:
    input:
        metrics=f"{OUT}/eval/metrics.json",
        top_terms=f"{OUT}/cluster/top_terms.json",
        assignments=f"{OUT}/assignments/manifest.json",
        shards=f"{OUT}/shards/manifest.json",
        experts=expand(f"{OUT}/experts/{{expert}}/model.safetensors", expert=EXPERTS),
    output:
        f"{OUT}/report.html",
    log:
        f"{OUT}/logs/report.log",
    conda:
        CONDA
    params:
        launch=launch("report"),
        config=RUN_CONFIG,
        logs=lambda wildcards, input: beside(input.experts, "metrics.jsonl"),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.report --config {params.config:q} --metrics {input.metrics:q} --top-terms {input.top_terms:q}"
        " --assignments {input.assignments:q} --shards {input.shards:q} --training {params.logs:q} --out {output:q} --log {log:q}"
