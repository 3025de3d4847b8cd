"""Look at a run, or at the machine for a run. Snakemake starts the run itself.

cbtm preview [TARGET ...]     what a start would run, why, at what cost, and which trained models it replaces
cbtm status [OUTDIR ...]      how a run is going
cbtm doctor [--profile NAME]  what would fail and what a run would cost, before anything is started
"""

import argparse
import importlib
import sys

from cbtm_pipeline.base import cli


def main() -> None:
    p = argparse.ArgumentParser(
        prog="cbtm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "command", choices=["preview", "status", "doctor"], help="for its options: cbtm COMMAND --help"
    )
    command = p.parse_args(sys.argv[1:2]).command
    sys.argv = [f"cbtm {command}", *sys.argv[2:]]
    cli.run(importlib.import_module(f"cbtm_pipeline.{command}").main)


if __name__ == "__main__":
    main()
