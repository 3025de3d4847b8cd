# The documents of a command, tokenised as the run's own.
rule shard:
    input:
        REQUEST,
    output:
        f"{OUT}/shards/manifest.json",
    log:
        f"{OUT}/logs/shard.log",
    conda:
        CONDA
    threads: 2
    params:
        launch=launch("shard"),
        config=RUN_CONFIG,
        planned=f"{OUT}/{content.PLANNED}",
        tokenizer=ASKED["tokenizer"],
        held_out=(
            ["--held-out", "--called=FILE"]
            if ASKED.get("held_out")
            else ["--unevaluated", "--called=--corpus"]
        ),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.shard --config {params.config:q} --tokenizer {params.tokenizer:q}"
        " {params.held_out:q} --workers {threads} --planned {params.planned:q} --out {output:q} --log {log:q}"
