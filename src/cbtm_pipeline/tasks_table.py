"""Put the results of the tasks of all models side by side.

python -m cbtm_pipeline.tasks_table --results results/eval/tasks/*.json --out results/eval/tasks.json
"""

from pathlib import Path

from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.base.errors import run_again
from cbtm_pipeline.mixture import task_table
from cbtm_pipeline.provenance import made_from


def read(paths: list[Path]) -> dict[str, dict]:
    """The results by model. Raises ValueError unless all models were given the same tasks."""
    found, first = {}, None
    for path in sorted(paths):
        record = artifact.read_sealed(path, "task_results")
        tasks = {name: h for name, h in record["made_from"].items() if name != "model"}, record["made_with"]
        if first is None:
            first = tasks
        if tasks != first:
            raise ValueError(
                f"{path}: other tasks than in {sorted(paths)[0]}. Expected the same. {run_again(path)}"
            )
        found[record["model"]] = record
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__, config=False)
    p.add_argument(
        "--results",
        required=True,
        type=Path,
        nargs="+",
        help="eval/tasks/<model>.json of every model, in any order",
    )
    p.add_argument("--out", required=True, type=Path, help="tasks.json; tasks.txt is written beside it")
    args = p.parse_args(argv)
    cli.start_logging("tasks_table", args.log)
    found = read(args.results)
    models = task_table.order(list(found))
    rows = task_table.join({name: record["rows"] for name, record in found.items()})
    text = task_table.text(rows, models)
    with artifact.publish(path := args.out.with_suffix(".txt")) as tmp:
        tmp.write_text(text, "utf-8")
    meta = artifact.make_meta("tasks", made_from.tasks_table(found), {}, files=[path.name])
    content = {"models": models, "rows": rows, "table": artifact.identity(path)}
    artifact.write_sealed(args.out, {**meta, **content})
    cli.log.info("%d rows, %d models", len(rows), len(models))
    print(text, end="")


if __name__ == "__main__":
    cli.run(main)
