"""Copy the ensemble of a finished run to a folder of its own, to give it away or to keep it.

    cbtm export DIR
    cbtm export DIR --model results/ensemble-law
    cbtm export --moe DIR

With --model, it is any other ensemble. Every file is verified, and everybody can read the copies. The folder
needs nothing from the run. It is also
`python -m cbtm_pipeline.export`.

With --moe, it is a mixture-of-experts model of a stock architecture instead, which engines load. That is
another model, with other probabilities.
"""

import argparse
from pathlib import Path

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact, cli, printable
from cbtm_pipeline.inference import package, where
from cbtm_pipeline.mixture import verdict
from cbtm_pipeline.ops import which_run


def export_moe(outdir: Path, to: Path, n_steps: int, measure: bool) -> None:
    """Write the mixture-of-experts model, and with `measure` print perplexities beside the ensemble's."""
    from cbtm_pipeline.inference import moe_folder  # only here: it needs torch

    made, mean = moe_folder.write(outdir, to, n_steps)
    printable.show(f"{to}: {type(made).__name__}, {made.num_parameters() / 1e6:,.1f} M parameters", end="\n")
    if measure:
        cfg = config.read(outdir / "config.json")
        metrics = artifact.read_sealed(outdir / "eval/metrics.json", "metrics")
        rows = [("average of all experts", mean), ("mixture-of-experts model", made)]
        cli.start_logging("export", None)
        cli.log.info("measures both models on the reported documents, which takes minutes")
        share = cfg.route.calibration_share
        found = [(name, moe_folder.perplexity(net, outdir, cfg, share)) for name, net in rows]
        shown = [row for row in metrics["systems"] if row["system"] in ("dense", "seed") or row["headline"]]
        found += [(verdict.label(row), row["perplexity"]) for row in shown]
        for name, value in found:
            printable.show(f"{name:26}{value:10.2f}", end="\n")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not fit together."""
    for option, is_given in (("--steps", args.steps is not None), ("--measure", args.measure)):
        if is_given and not args.moe:
            raise ValueError(f"{option}: without --moe. Expected both. Add --moe, or leave {option} out.")
    if args.moe and args.model:
        expected = "the run that trained the experts, for their routers"
        raise ValueError(f"--model: with --moe. Expected {expected}. Give --outdir instead.")
    if args.steps is not None and args.steps < 0:
        raise ValueError(f"--steps: {args.steps}. Expected a whole number of at least 0. Change it.")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", metavar="DIR", type=Path, help="a folder that does not exist or is empty")
    p.add_argument(
        "--moe", action="store_true", help="write one stock mixture-of-experts model for plain transformers"
    )
    p.add_argument("--steps", type=int, help="with --moe: train the routers for so many steps (0)")
    p.add_argument(
        "--measure", action="store_true", help="with --moe: its perplexity on held-out text, in minutes"
    )
    where.add_options(p)
    args = p.parse_args()
    check(args)
    if args.moe:
        return export_moe(which_run.named(args), args.dir, args.steps or 0, args.measure)
    folder = where.named(args)
    package.copy(folder, args.dir)
    n_bytes = sum(path.stat().st_size for path in package.files(args.dir))
    printable.show(f"{args.dir}: an ensemble of {n_bytes / 1e6:,.1f} MB", end="\n")


if __name__ == "__main__":
    cli.run(main)
