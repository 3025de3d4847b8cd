# Run only if eval.tasks names tasks: `report` asks for their table then.
rule eval_task:
    input:
        model=task_model,
        lender=lender("eval_task"),
    output:
        f"{OUT}/eval/tasks/{{expert}}.json",
    log:
        f"{OUT}/logs/eval_task/{{expert}}.log",
    wildcard_constraints:
        expert="|".join(TASK_MODELS) or "none",
    conda:
        CONDA
    params:
        launch=launch("eval_task", "tasks"),
        config=RUN_CONFIG,
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.eval_task --config {params.config:q} --name {wildcards.expert} --model {input.model:q}"
        " --out {output:q} --threads {threads} --log {log:q}"


# The command's own output goes to /dev/null: the Snakefile prints the table at the end of the run.
rule tasks_table:
    input:
        task_results,
    output:
        results=f"{OUT}/eval/tasks.json",
        table=report(
            f"{OUT}/eval/tasks.txt",
            caption="../report/tasks.rst",
            category="Result",
        ),
    log:
        f"{OUT}/logs/tasks_table.log",
    conda:
        CONDA
    params:
        launch=launch("tasks_table"),
    shell:
        "exec {params.launch:q} python -m cbtm_pipeline.tasks_table --results {input:q} --out {output.results:q} --log {log:q} > /dev/null"
