# Rules with priority: 1 run before the long trainings, so that problems with the clusters show early.
rule embed:
    input:
        shards=made("shards/manifest.json"),
        lender=lender("embed"),
    output:
        manifest=f"{OUT}/embed/manifest.json",
        embedder=f"{OUT}/embed/embedder.npz",
    log:
        f"{OUT}/logs/embed.log",
    priority: 1
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("embed"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.embed --config {params.config:q} --shards {input.shards:q} --out {output.manifest:q}"
        " --threads {threads} --log {log:q}"


rule fit_kmeans:
    input:
        vectors=made("embed/manifest.json"),
        shards=made("shards/manifest.json"),
        tokenizer=made("tokenizer/tokenizer.json"),
        lender=lender("fit_kmeans"),
    output:
        clusterer=f"{OUT}/cluster/clusterer.npz",
        top_terms=report(
            f"{OUT}/cluster/top_terms.json",
            caption="../report/top_terms.rst",
            category="Corpus",
        ),
    log:
        f"{OUT}/logs/fit_kmeans.log",
    priority: 1
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("fit_kmeans"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.fit_kmeans --config {params.config:q} --vectors {input.vectors:q} --shards {input.shards:q}"
        " --tokenizer {input.tokenizer:q} --out {output.clusterer:q} --log {log:q}"


rule assign:
    input:
        shards=made("shards/manifest.json"),
        vectors=made("embed/manifest.json"),
        clusterer=made("cluster/clusterer.npz"),
        lender=lender("assign"),
    output:
        f"{OUT}/assignments/manifest.json",
    log:
        f"{OUT}/logs/assign.log",
    priority: 1
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("assign"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.assign --config {params.config:q} --shards {input.shards:q} --vectors {input.vectors:q}"
        " --clusterer {input.clusterer:q} --out {output:q} --threads {threads} --log {log:q}"


rule assign_random:
    input:
        shards=made("shards/manifest.json"),
        lender=lender("assign_random"),
    output:
        f"{OUT}/random/manifest.json",
    log:
        f"{OUT}/logs/assign_random.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("assign_random"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.assign_random --config {params.config:q} --shards {input.shards:q} --out {output:q}"
        " --threads {threads} --log {log:q}"
