"""The outdir that a command is about, as its user names it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cbtm_pipeline.base import read_yaml

RUNS = "runs"  # the folder of the runs, in that of a study


def add_options(p: argparse.ArgumentParser) -> None:
    """Add `--outdir` and `--configfile`."""
    p.add_argument("--outdir", type=Path, help="folder of a run; default: that of the config in this folder")
    p.add_argument(
        "--configfile",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a config with which the run was started, for its outdir; may be given again",
    )


def named(args: argparse.Namespace) -> Path:
    """The outdir that these options name."""
    return args.outdir or configured(args.configfile)


def configured(configfiles: Sequence[Path]) -> Path:
    """`outdir` of the last of these files that has the key, else of ./config.yaml.

    Raises ValueError for bad YAML.
    """
    outdir = "results"
    for path in [*([Path("config.yaml")] if Path("config.yaml").exists() else []), *configfiles]:
        content = read_yaml.read(path)
        if isinstance(content, dict):
            outdir = content.get("outdir", outdir)
    return Path(str(outdir)).expanduser()


def of_study(folder: Path) -> list[Path]:
    """The outdirs of the runs in the folder of a study; none if it is not one."""
    return sorted(path.parent for path in folder.glob(f"{RUNS}/*/config.json"))
