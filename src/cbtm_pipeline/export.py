"""Copy the ensemble of a finished run to a folder of its own, to give it away or to keep it.

    cbtm export DIR

Every file is verified, and everybody can read the copies. The folder needs nothing from the run. It is also
`python -m cbtm_pipeline.export`.
"""

import argparse
from pathlib import Path

from cbtm_pipeline.base import cli, printable
from cbtm_pipeline.inference import package
from cbtm_pipeline.ops import which_run


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", metavar="DIR", type=Path, help="a folder that does not exist or is empty")
    which_run.add_options(p)
    args = p.parse_args()
    folder = which_run.named(args) / "ensemble"
    package.copy(folder, args.dir)
    n_bytes = sum(path.stat().st_size for path in package.files(args.dir))
    printable.show(f"{args.dir}: an ensemble of {n_bytes / 1e6:,.1f} MB", end="\n")


if __name__ == "__main__":
    cli.run(main)
