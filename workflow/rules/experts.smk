# README.md and tensorboard/ are for people: no outputs, as nothing may be trained again if one of them is deleted.
# The resumable state in work/ is not an output, because Snakemake deletes outputs before a job starts and after it fails.
rule train_expert:
    input:
        unpack(expert_inputs),
        lender=lender("train_expert"),
    output:
        weights=f"{OUT}/experts/{{expert}}/model.safetensors",
        card=report(
            f"{OUT}/experts/{{expert}}/card.json",
            caption="../report/expert.rst",
            category="Models",
            labels={"model": "{expert}"},
        ),
        config=f"{OUT}/experts/{{expert}}/config.json",
        files=f"{OUT}/experts/{{expert}}/files.json",
        generation=f"{OUT}/experts/{{expert}}/generation_config.json",
        metrics=f"{OUT}/experts/{{expert}}/metrics.jsonl",
        tokenizer=f"{OUT}/experts/{{expert}}/tokenizer.json",
        tokenizer_config=f"{OUT}/experts/{{expert}}/tokenizer_config.json",
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
        lender=lender("score_expert"),
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
