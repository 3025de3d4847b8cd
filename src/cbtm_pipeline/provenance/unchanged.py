"""Run a job's command, unless its outputs were made with its plan and from its inputs already.

    python -m cbtm_pipeline.provenance.unchanged --config results/config.json \\
        --rule train_expert --expert 3 -- python -m cbtm_pipeline.train_expert ...

A start runs every job that reads what another job makes again. Here, all inputs are there, and this process
sees whether they have become others. If not, it puts the outputs back that Snakemake has removed (kept.py).
Otherwise it becomes the command. So a job that has nothing to do never goes to Slurm.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from cbtm_pipeline import config
from cbtm_pipeline.base import cli
from cbtm_pipeline.provenance import chosen, kept, records, stale
from cbtm_pipeline.provenance.stale import Job


def is_done(cfg: config.Config, job: Job) -> bool:
    """Whether the job's outputs are there, or were kept and are put back."""
    outdir = Path(cfg.outdir)

    def read(rule: str, expert: str | None = None) -> dict[str, Any]:
        return records.read(outdir, rule, expert)

    try:
        expected, made_with = stale.identities(cfg, job, read), chosen.content(cfg, *job, read)
    except stale.DAMAGED:  # the command says what is wrong with its inputs
        return False
    return expected is not None and kept.give_back(outdir, job, made_with, expected)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True, type=Path, help="config.json in the folder of the outputs")
    p.add_argument("--rule", required=True, help="the rule of the job")
    p.add_argument(
        "--expert", help="the expert of the job, for train_expert and score_expert; for eval_task, the model"
    )
    p.add_argument("--log", type=Path, help="write a line to this file if there is nothing to do")
    p.add_argument("command", nargs="+", help="after --: the command that does the job")
    args = p.parse_args()
    job = Job(args.rule, args.expert)
    if is_done(config.read(args.config), job):
        label = {"train_expert": "expert", "score_expert": "score", "eval_task": "tasks"}.get(job.rule)
        cli.start_logging(f"{label} {job.expert}" if label else job.rule, args.log)
        cli.log.info("its plan and inputs are what they were, nothing to do")
        return
    os.execvp(args.command[0], args.command)


if __name__ == "__main__":
    cli.run(main)
