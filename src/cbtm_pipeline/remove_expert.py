"""Write an ensemble without one expert. No other expert changes, and the ensemble that it comes from stays.

    cbtm remove-expert NAME --from DIR --out DIR

To leave an expert out for a while, no new folder is needed: see --exclude of the other commands. It is also
`python -m cbtm_pipeline.remove_expert`.
"""

import argparse
from pathlib import Path

import numpy as np

from cbtm_pipeline.base import cli, printable
from cbtm_pipeline.inference import changed_set, package


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", metavar="NAME", help="the expert that goes")
    p.add_argument(
        "--from", dest="base", required=True, type=Path, metavar="DIR", help="folder of an ensemble"
    )
    p.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a folder that does not exist or is empty"
    )
    args = p.parse_args()
    package.check_new(args.out, args.base)
    found = changed_set.read(args.base)
    row = found.row(args.name)
    if len(found.names) == 1:
        raise ValueError(f"{args.name}: the only expert. Expected one to be left. Name another ensemble.")
    less = found._replace(
        names=[name for name in found.names if name != args.name],
        centres_KD=np.delete(found.centres_KD, row, 0),
        terms=[own for i, own in enumerate(found.terms) if i != row],
        tags={name: own for name, own in found.tags.items() if name != args.name},
    )
    change = changed_set.Change(f"expert {args.name} was removed.", {"what": "removed", "expert": args.name})
    changed_set.write(less, change, args.out)
    printable.show(f"{args.out}: {len(less.names)} experts, without {args.name}", end="\n")


if __name__ == "__main__":
    cli.run(main)
