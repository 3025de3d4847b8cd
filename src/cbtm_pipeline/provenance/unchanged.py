"""Run a job's command, unless its outputs were made with its plan and from its inputs already.

    python -m cbtm_pipeline.provenance.unchanged --config results/config.json \\
        --rule train_expert --expert 3 -- python -m cbtm_pipeline.train_expert ...

A start runs every job that reads what another job makes again. Here, all inputs are there, and this process
sees whether they have become others. If not, it puts the outputs back that Snakemake has removed (kept.py).
In a study, `--lender` names the folder of a run that has the same job: its outputs are taken if they fit
(lent.py). Otherwise this process becomes the command. So a job that has nothing to do never goes to Slurm.
"""

import argparse
import os
from pathlib import Path

from cbtm_pipeline import config
from cbtm_pipeline.base import cli
from cbtm_pipeline.provenance import chosen, kept, lent, records, stale
from cbtm_pipeline.provenance.stale import Job

NOTHING = "its plan and inputs are what they were, nothing to do"


def is_done(cfg: config.Config, job: Job, lender: Path | None = None) -> str:
    """Why the job has nothing to do: its outputs were kept and are put back, or the lender has them.

    Empty if it has to run.
    """
    outdir = Path(cfg.outdir)
    if job.rule == lent.DEMO_RULE:
        return f"taken from {lender}" if lender and lent.take_demo(lender, outdir) else ""

    def expected(beside: Path) -> dict[str, str] | None:
        """What the job would be made from now. What the job itself leaves lies in the folder `beside`."""
        try:
            there = cfg.model_copy(update={"outdir": str(beside)})
            return stale.identities(there, job, lambda *about: records.read(outdir, *about))
        except stale.DAMAGED:  # the command says what is wrong with its inputs
            return None

    try:
        made_with = chosen.content(cfg, *job, lambda *about: records.read(outdir, *about))
    except stale.DAMAGED:
        return ""
    made_from = expected(outdir)
    if made_from is not None and kept.give_back(outdir, job, made_with, made_from):
        return NOTHING
    if lender is None or (made_from := expected(lender)) is None:
        return ""
    is_lent = lent.take(lender, outdir, job, made_with, made_from)
    return f"taken from {lender}, which has the same plan and inputs" if is_lent else ""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True, type=Path, help="config.json in the folder of the outputs")
    p.add_argument("--rule", required=True, help="the rule of the job")
    p.add_argument(
        "--expert", help="the expert of the job, for train_expert and the scores; for eval_task, the model"
    )
    p.add_argument("--lender", type=Path, help="folder of a run of the study that has the same job")
    p.add_argument("--log", type=Path, help="write a line to this file if there is nothing to do")
    p.add_argument("command", nargs="+", help="after --: the command that does the job")
    args = p.parse_args()
    job = Job(args.rule, args.expert)
    if why := is_done(config.read(args.config), job, args.lender):
        label = {
            "train_expert": "expert",
            "score_expert": "score",
            "score_training": "training score",
            "eval_task": "tasks",
        }.get(job.rule)
        cli.start_logging(f"{label} {job.expert}" if label else job.rule, args.log)
        cli.log.info("%s", why)
        return
    os.execvp(args.command[0], args.command)


if __name__ == "__main__":
    cli.run(main)
