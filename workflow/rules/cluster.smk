rule embed:
    input:
        shards=f"{OUT}/shards/manifest.json",
    output:
        f"{OUT}/embed/manifest.json",
        f"{OUT}/embed/embedder.npz",
    params:
        parameters("embed"),
    log:
        f"{OUT}/logs/embed.log",
    threads: 2
    shell:
        "{PYTHON} -m cbtm_pipeline.embed --config {OUT:q}/config.json --shards {input.shards:q} --out {output[0]:q} --log {log:q}"


rule fit_kmeans:
    input:
        vectors=f"{OUT}/embed/manifest.json",
        shards=f"{OUT}/shards/manifest.json",
        tokenizer=f"{OUT}/tokenizer/tokenizer.json",
    output:
        f"{OUT}/cluster/clusterer.npz",
        f"{OUT}/cluster/top_terms.json",
    params:
        parameters("fit_kmeans"),
    log:
        f"{OUT}/logs/fit_kmeans.log",
    threads: 2
    shell:
        "{PYTHON} -m cbtm_pipeline.fit_kmeans --config {OUT:q}/config.json --vectors {input.vectors:q} --shards {input.shards:q}"
        " --tokenizer {input.tokenizer:q} --out {output[0]:q} --log {log:q}"


rule assign:
    input:
        shards=f"{OUT}/shards/manifest.json",
        vectors=f"{OUT}/embed/manifest.json",
        clusterer=f"{OUT}/cluster/clusterer.npz",
    output:
        f"{OUT}/assignments/manifest.json",
    params:
        parameters("assign"),
    log:
        f"{OUT}/logs/assign.log",
    shell:
        "{PYTHON} -m cbtm_pipeline.assign --config {OUT:q}/config.json --shards {input.shards:q} --vectors {input.vectors:q}"
        " --clusterer {input.clusterer:q} --out {output:q} --log {log:q}"


rule assign_random:
    input:
        shards=f"{OUT}/shards/manifest.json",
    output:
        f"{OUT}/random/manifest.json",
    params:
        parameters("assign_random"),
    log:
        f"{OUT}/logs/assign_random.log",
    shell:
        "{PYTHON} -m cbtm_pipeline.assign --random --config {OUT:q}/config.json --shards {input.shards:q} --out {output:q}"
        " --log {log:q}"
