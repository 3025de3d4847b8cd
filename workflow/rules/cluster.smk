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


# With cluster.second_round, experts of a first round score training documents, and these go to the one that predicts them best.
rule score_training:
    input:
        expert=made("experts/{expert}/model.safetensors"),
        shards=made("shards/manifest.json"),
        lender=lender("score_training"),
    output:
        f"{OUT}/second/scores/{{expert}}.npz",
    log:
        f"{OUT}/logs/score_training/{{expert}}.log",
    wildcard_constraints:
        expert="|".join(map(re.escape, FIRSTS)) or "none",
    conda:
        CONDA
    params:
        launch=launch("score_training", "training-score"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.score_training --config {params.config:q} --expert-weights {input.expert:q}"
        " --shards {input.shards:q} --out {output:q} --threads {threads} --log {log:q}"


rule second_round:
    input:
        shards=made("shards/manifest.json"),
        vectors=made("embed/manifest.json"),
        assignments=made("assignments/manifest.json"),
        scores=first_scores,
        tokenizer=made("tokenizer/tokenizer.json"),
        lender=lender("second_round"),
    output:
        manifest=f"{OUT}/second/manifest.json",
        clusterer=f"{OUT}/second/clusterer.npz",
        top_terms=f"{OUT}/second/top_terms.json",
    log:
        f"{OUT}/logs/second_round.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("second_round"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.second_round --config {params.config:q} --shards {input.shards:q}"
        " --vectors {input.vectors:q} --assignments {input.assignments:q} --scores {input.scores:q} --tokenizer {input.tokenizer:q}"
        " --out {output.manifest:q} --threads {threads} --log {log:q}"
