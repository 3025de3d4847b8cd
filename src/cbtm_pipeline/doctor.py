"""Find what would fail or hang, and what a run will cost, before anything is submitted: `cbtm doctor`.

    cbtm doctor --configfile mine.yaml --profile slurm

Prints one line per check: `ok`, `warn` or `FAIL`. The exit status is 1 if any check FAILs. The command starts
nothing and leaves nothing behind. It is also `python -m cbtm_pipeline.doctor`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from cbtm_pipeline.base import cli
from cbtm_pipeline.base.printable import printable
from cbtm_pipeline.ops import cost, fit_checks, k_checks, label_checks, run_checks, slurm_checks
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line

Check = Callable[[Facts], Iterator[Line]]
CHECKS = (  # in this order: later checks use what earlier ones found
    run_checks.check_config,
    slurm_checks.check_slurm,
    slurm_checks.check_profile,
    slurm_checks.check_jobs,
    slurm_checks.check_machine,
    slurm_checks.check_records,
    fit_checks.check_tokenizer,
    run_checks.check_model,
    fit_checks.check_seed,
    k_checks.check_k,
    fit_checks.check_held_out,
    label_checks.check_labels,
    run_checks.check_encoder,
    run_checks.check_tasks,
    run_checks.check_folder,
    run_checks.check_files,
    slurm_checks.check_stops,
    run_checks.check_disk,
)


def run(facts: Facts, checks: Sequence[Check] = ()) -> Iterator[Line]:
    """All findings, of `checks` or of CHECKS.

    A check that cannot be done is a finding, too; the others still run.
    """
    for check in checks or CHECKS:
        try:
            yield from check(facts)
        except ValueError as error:
            yield from (("FAIL", line) for line in str(error).splitlines())
        except OSError as error:
            found = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            todo = "Check the path, its rights and the free space"
            yield "FAIL", f"{found}. Expected to read or write it. {todo}"
        except Exception as error:  # the output of Slurm, Snakemake or transformers may change one day
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield "warn", f"{check.__name__}: not done ({found}). Expected an answer. Look at it by hand"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--configfile", nargs="+", action="extend", default=[], metavar="FILE", help="as given to snakemake"
    )
    p.add_argument("--profile", help="as given to snakemake; without it, a run on this machine")
    args = p.parse_args()
    profile = args.profile or os.environ.get("SNAKEMAKE_PROFILE") or None
    facts, n = Facts(args.configfile, profile), {"ok": 0, "warn": 0, "FAIL": 0}
    for level, text in run(facts):
        n[level] += 1
        line = printable(" ".join(text.split()))
        print(f"{level:<5} {line}{'' if line.endswith(('.', '?')) else '.'}", flush=True)
    if facts.config:
        rules = [job.rule for job in facts.jobs]
        print(f"\n{cost.table(facts.config, rules, facts.model, facts.machine)}")
    print(f"\n{n['FAIL']} FAIL, {n['warn']} warn, {n['ok']} ok")
    sys.exit(1 if n["FAIL"] else 0)


if __name__ == "__main__":
    cli.run(main)
