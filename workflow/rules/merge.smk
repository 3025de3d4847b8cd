rule route:
    input:
        shards=made("shards/manifest.json"),
        embedder=made("embed/embedder.npz"),
        clusterer=of_clusters("clusterer"),
        tokenizer=made("tokenizer/tokenizer.json"),
        lender=lender("route"),
    output:
        f"{OUT}/route/distances.npz",
    log:
        f"{OUT}/logs/route.log",
    conda:
        CONDA
    params:
        launch=launch("route"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.route --config {params.config:q} --shards {input.shards:q} --embedder {input.embedder:q}"
        " --clusterer {input.clusterer:q} --tokenizer {input.tokenizer:q} --out {output:q} --log {log:q}"


# The command's own output goes to /dev/null: the Snakefile prints the table at the end of the run.
rule eval_ensemble:
    input:
        distances=made("route/distances.npz"),
        scores=of_experts("scores/{}.npz"),
        experts=of_experts("experts/{}/model.safetensors", "trained"),
        clusters=clusterings,
        choices=choices,
        labels=labels_read,
    output:
        metrics=f"{OUT}/eval/metrics.json",
        table=report(
            f"{OUT}/eval/table.txt",
            caption="../report/table.rst",
            category="Result",
        ),
        documents=f"{OUT}/eval/documents.parquet",
    log:
        f"{OUT}/logs/eval_ensemble.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("eval_ensemble"),
        config=RUN_CONFIG,
        cards=lambda wildcards, input: beside(input.experts, "card.json"),
        choices=lambda wildcards, input: (
            ["--choices", *input.choices] if input.choices else []
        ),
        shards=lambda wildcards: (
            ["--shards", run_of(wildcards).path("shards/manifest.json")]
            if run_of(wildcards).config.eval.merge
            or run_of(wildcards).config.corpus.label_field
            else []
        ),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.eval_ensemble --config {params.config:q} --distances {input.distances:q}"
        " --scores {input.scores:q} --experts {params.cards:q} --clusters {input.clusters:q} {params.choices:q} {params.shards:q}"
        " --threads {threads} --out {output.metrics:q} --log {log:q}"
        " > /dev/null"


rule report:
    input:
        metrics=made("eval/metrics.json"),
        top_terms=of_clusters("top_terms"),
        assignments=of_clusters("assignments"),
        shards=made("shards/manifest.json"),
        experts=of_experts("experts/{}/model.safetensors", "trained"),
        tasks=tasks_of_report,
    output:
        report(
            f"{OUT}/report.html",
            caption="../report/report.rst",
            category="Result",
        ),
    log:
        f"{OUT}/logs/report.log",
    conda:
        CONDA
    params:
        launch=launch("report"),
        logs=lambda wildcards, input: beside(input.experts, "metrics.jsonl"),
        tokenizer=f"{OUT}/tokenizer/tokenizer.json",
        records=shown_records,
        tasks=lambda wildcards, input: ["--tasks", *input.tasks] if input.tasks else [],
        demo=lambda wildcards: demo_flag(wildcards)[:1],
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.report --metrics {input.metrics:q} --top-terms {input.top_terms:q}"
        " --assignments {input.assignments:q} --shards {input.shards:q} --training {params.logs:q} --records {params.records:q} --tokenizer {params.tokenizer:q} {params.tasks:q} {params.demo:q} --out {output:q} --log {log:q}"


# The result as one model. `all` asks for it where the model can be what was evaluated (stale.packs).
rule ensemble:
    input:
        metrics=made("eval/metrics.json"),
        embedder=made("embed/embedder.npz"),
        clusterer=of_clusters("clusterer"),
        top_terms=of_clusters("top_terms"),
        tokenizer=made("tokenizer/tokenizer.json"),
        experts=of_experts("experts/{}/model.safetensors", "clusters"),
    output:
        report(
            f"{OUT}/ensemble/files.json",
            caption="../report/ensemble.rst",
            category="Models",
            labels={"model": "ensemble"},
        ),
    log:
        f"{OUT}/logs/ensemble.log",
    conda:
        CONDA
    params:
        launch=launch("ensemble"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.ensemble --config {params.config:q} --metrics {input.metrics:q} --embedder {input.embedder:q}"
        " --clusterer {input.clusterer:q} --top-terms {input.top_terms:q} --tokenizer {input.tokenizer:q} --experts {input.experts:q}"
        " --out {output:q} --log {log:q}"
