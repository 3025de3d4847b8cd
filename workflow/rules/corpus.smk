DEMO = f"{OUT}/demo/corpus.jsonl.zst"
DEMO_FLAG = f"--demo {DEMO}" if schema.DEMO in CORPUS_FILES else ""
CORPUS = [DEMO if path == schema.DEMO else path for path in CORPUS_FILES]


rule demo_corpus:
    output:
        DEMO,
    log:
        f"{OUT}/logs/demo_corpus.log",
    shell:
        "{PYTHON} -m cbtm_pipeline.demo_corpus --out {output:q} --log {log:q}"


rule tokenizer:
    input:
        CORPUS,
    output:
        f"{OUT}/tokenizer/tokenizer.json",
    params:
        parameters("tokenizer"),
    log:
        f"{OUT}/logs/tokenizer.log",
    threads: 2
    shell:
        "{PYTHON} -m cbtm_pipeline.tokenizer --config {OUT:q}/config.json {DEMO_FLAG} --out {output:q} --log {log:q}"


rule shard:
    input:
        CORPUS,
        tokenizer=f"{OUT}/tokenizer/tokenizer.json",
    output:
        f"{OUT}/shards/manifest.json",
    params:
        parameters("shard"),
    log:
        f"{OUT}/logs/shard.log",
    threads: 2
    shell:
        "{PYTHON} -m cbtm_pipeline.shard --config {OUT:q}/config.json --tokenizer {input.tokenizer:q} {DEMO_FLAG}"
        " --workers {threads} --out {output:q} --log {log:q}"
