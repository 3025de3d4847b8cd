MANIFESTS = {"corpus": "shards/manifest.json", "clusters": "assignments/manifest.json", "random": "random/manifest.json"}


def expert_inputs(wildcards):
    """The data and the seed model of an expert; the seed itself starts from nothing."""
    inputs = {"data": f"{OUT}/{MANIFESTS[plan.data_of(wildcards.expert)[0]]}", "tokenizer": f"{OUT}/tokenizer/tokenizer.json"}
    return inputs if wildcards.expert == "seed" else inputs | {"seed_model": f"{OUT}/experts/seed/model.safetensors"}


# The resumable state in work/ is no output: Snakemake deletes outputs before a job starts and after it fails.
rule train_expert:
    input:
        unpack(expert_inputs),
    output:
        f"{OUT}/experts/{{expert}}/model.safetensors",
    params:
        plan=lambda wildcards: parameters("train_expert", wildcards.expert),
        seed_model=lambda wildcards, input: f"--seed-model {input.seed_model}" if "seed_model" in input.keys() else "",
    log:
        f"{OUT}/logs/train_expert/{{expert}}.log",
    resources:
        gpu=1,
    shell:
        "exec {PYTHON} -m cbtm_pipeline.train_expert --config {OUT:q}/config.json --expert {wildcards.expert} --data {input.data:q}"
        " --tokenizer {input.tokenizer:q} {params.seed_model} --out {output:q} --work {OUT:q}/work/{wildcards.expert}"
        " --threads {threads} --log {log:q}"


rule score_expert:
    input:
        expert=f"{OUT}/experts/{{expert}}/model.safetensors",
        shards=f"{OUT}/shards/manifest.json",
    output:
        f"{OUT}/scores/{{expert}}.npz",
    params:
        parameters("score_expert"),
    log:
        f"{OUT}/logs/score_expert/{{expert}}.log",
    resources:
        gpu=1,
    shell:
        "{PYTHON} -m cbtm_pipeline.score_expert --config {OUT:q}/config.json --expert-weights {input.expert:q}"
        " --shards {input.shards:q} --out {output:q} --threads {threads} --log {log:q}"
