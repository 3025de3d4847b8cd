"""Give one model the tasks of eval.tasks, by lm-evaluation-harness.

    python -m cbtm_pipeline.eval_task --config results/config.json --name ensemble \\
        --model results/ensemble/files.json --out results/eval/tasks/ensemble.json --threads 2

The model is an expert, by its weights, or the ensemble, by its record. Its files are verified. With the name
`ensemble-top1`, one expert of the ensemble is active at a token.
"""

from pathlib import Path
from typing import Any

import torch

from cbtm_pipeline import config, plan_tasks
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.inference import harness, package
from cbtm_pipeline.provenance import expert_files, made_from, task_files

TOP1 = "ensemble-top1"


def read_model(path: Path) -> dict[str, Any]:
    """The record of a model whose files are as they were written. Raises ValueError otherwise."""
    return package.verify(path.parent) if path.name == package.FILES else expert_files.read_card(path)


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__)
    p.add_argument("--name", required=True, help="the model: an expert, ensemble or ensemble-top1")
    p.add_argument(
        "--model",
        required=True,
        type=Path,
        help="model.safetensors of the expert, or ensemble/files.json",
    )
    p.add_argument("--out", required=True, type=Path, help="JSON to write")
    p.add_argument("--threads", type=int, default=1, help="threads that the model computes with on a CPU")
    args = p.parse_args(argv)
    cli.start_logging(f"tasks {args.name}", args.log)
    cfg = config.read(args.config)
    task_files.check(cfg.eval.tasks)
    torch.set_num_threads(args.threads)
    model = read_model(args.model)
    identities = made_from.eval_task(model, task_files.identities(cfg.eval.tasks))
    rows = harness.evaluate(
        args.model.parent, cfg.eval.tasks, **({"n_active": 1} if args.name == TOP1 else {})
    )
    meta = artifact.make_meta(
        "task_results", identities, plan_tasks.eval_task(cfg).content(), model=args.name
    )
    artifact.write_sealed(args.out, {**meta, "rows": rows})
    cli.log.info("%s", harness.summary(rows))


if __name__ == "__main__":
    cli.run(main)
