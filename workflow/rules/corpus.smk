rule demo_corpus:
    input:
        lender=lender("demo_corpus"),
    output:
        DEMO,
    log:
        f"{OUT}/logs/demo_corpus.log",
    conda:
        CONDA
    params:
        launch=launch("demo_corpus"),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.demo_corpus --out {output:q} --log {log:q}"


rule tokenizer:
    input:
        corpus,
        lender=lender("tokenizer"),
    output:
        tokenizer=f"{OUT}/tokenizer/tokenizer.json",
        card=f"{OUT}/tokenizer/card.json",
        config=f"{OUT}/tokenizer/tokenizer_config.json",
    log:
        f"{OUT}/logs/tokenizer.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("tokenizer"),
        config=RUN_CONFIG,
        demo=demo_flag,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.tokenizer --config {params.config:q} {params.demo:q} --out {output.tokenizer:q} --log {log:q}"


rule shard:
    input:
        corpus,
        tokenizer=made("tokenizer/tokenizer.json"),
        lender=lender("shard"),
    output:
        manifest=f"{OUT}/shards/manifest.json",
        quarantine=report(
            f"{OUT}/shards/quarantine.jsonl",
            caption="../report/quarantine.rst",
            category="Corpus",
        ),
    log:
        f"{OUT}/logs/shard.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("shard"),
        config=RUN_CONFIG,
        demo=demo_flag,
        planned=PLANNED,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.shard --config {params.config:q} --tokenizer {input.tokenizer:q} {params.demo:q}"
        " --workers {threads} --planned {params.planned:q} --out {output.manifest:q} --log {log:q}"
