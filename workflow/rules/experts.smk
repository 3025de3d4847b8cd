# The resumable state in work/ is not an output, because Snakemake deletes outputs before a job starts and after it fails.
rule train_expert:
    input:
        unpack(expert_inputs),
    output:
        weights=f"{OUT}/experts/{{expert}}/model.safetensors",
        card=report(
            f"{OUT}/experts/{{expert}}/card.json",
            caption="../report/expert.rst",
            category="Models",
            labels={"model": "{expert}"},
        ),
        beside=[
            f"{OUT}/experts/{{expert}}/{name}"
            for name in expert_files.BESIDE
            if name != "card.json"
        ],
    log:
        f"{OUT}/logs/train_expert/{{expert}}.log",
    conda:
        CONDA
    params:
        launch=launch("train_expert", "expert", state_folder),
        config=RUN_CONFIG,
        work=state_folder,
        seed_model=lambda wildcards, input: (
            ["--seed-model", input.seed_model] if wildcards.expert != "seed" else []
        ),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.train_expert --config {params.config:q} --expert {wildcards.expert} --data {input.data:q}"
        " --tokenizer {input.tokenizer:q} {params.seed_model:q} --out {output.weights:q} --work {params.work:q}"
        " --threads {threads} --log {log:q}"


rule score_expert:
    input:
        expert=made("experts/{expert}/model.safetensors"),
        shards=made("shards/manifest.json"),
    output:
        f"{OUT}/scores/{{expert}}.npz",
    log:
        f"{OUT}/logs/score_expert/{{expert}}.log",
    conda:
        CONDA
    params:
        launch=launch("score_expert", "score"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.score_expert --config {params.config:q} --expert-weights {input.expert:q}"
        " --shards {input.shards:q} --out {output:q} --threads {threads} --log {log:q}"
