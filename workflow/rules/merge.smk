rule route:
    input:
        shards=f"{OUT}/shards/manifest.json",
        embedder=f"{OUT}/embed/embedder.npz",
        clusterer=f"{OUT}/cluster/clusterer.npz",
        tokenizer=f"{OUT}/tokenizer/tokenizer.json",
    output:
        f"{OUT}/route/distances.npz",
    params:
        parameters("route"),
    log:
        f"{OUT}/logs/route.log",
    shell:
        "{PYTHON} -m cbtm_pipeline.route --config {OUT:q}/config.json --shards {input.shards:q} --embedder {input.embedder:q}"
        " --clusterer {input.clusterer:q} --tokenizer {input.tokenizer:q} --out {output:q} --log {log:q}"


rule eval_ensemble:
    input:
        distances=f"{OUT}/route/distances.npz",
        scores=expand(f"{OUT}/scores/{{expert}}.npz", expert=EXPERTS),
        experts=expand(f"{OUT}/experts/{{expert}}/model.safetensors", expert=EXPERTS),
    output:
        f"{OUT}/eval/metrics.json",
        f"{OUT}/eval/table.txt",
    params:
        parameters("eval_ensemble"),
        cards=lambda wildcards, input: [str(Path(path).with_name("card.json")) for path in input.experts],
    log:
        f"{OUT}/logs/eval_ensemble.log",
    shell:
        "{PYTHON} -m cbtm_pipeline.eval_ensemble --config {OUT:q}/config.json --distances {input.distances:q}"
        " --scores {input.scores:q} --experts {params.cards:q} --out {output[0]:q} --log {log:q}"


rule report:
    input:
        metrics=f"{OUT}/eval/metrics.json",
        top_terms=f"{OUT}/cluster/top_terms.json",
        assignments=f"{OUT}/assignments/manifest.json",
        shards=f"{OUT}/shards/manifest.json",
        experts=expand(f"{OUT}/experts/{{expert}}/model.safetensors", expert=EXPERTS),
    output:
        f"{OUT}/report.html",
    params:
        logs=lambda wildcards, input: [str(Path(path).with_name("metrics.jsonl")) for path in input.experts],
    log:
        f"{OUT}/logs/report.log",
    shell:
        "{PYTHON} -m cbtm_pipeline.report --config {OUT:q}/config.json --metrics {input.metrics:q} --top-terms {input.top_terms:q}"
        " --assignments {input.assignments:q} --shards {input.shards:q} --training {params.logs:q} --out {output:q} --log {log:q}"
