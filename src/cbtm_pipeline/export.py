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
        share = cfg.route.calibration_share
        found = [(name, moe_folder.perplexity(net, outdir, cfg, share)) for name, net in rows]
        shown = [row for row in metrics["systems"] if row["system"] in ("dense", "seed") or row["headline"]]
        found += [(verdict.label(row), row["perplexity"]) for row in shown]
        for name, value in found:
            printable.show(f"{name:26}{value:10.2f}", end="\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", metavar="DIR", type=Path, help="a folder that does not exist or is empty")
    p.add_argument(
        "--moe", action="store_true", help="write one stock mixture-of-experts model for plain transformers"
    )
    p.add_argument("--steps", type=int, default=0, help="with --moe: train the routers for so many steps")
    p.add_argument("--measure", action="store_true", help="with --moe: its perplexity on held-out text")
    where.add_options(p)
    args = p.parse_args()
    if args.moe and args.model:
        expected = "the run that trained the experts, for their routers"
        raise ValueError(f"--model: with --moe. Expected {expected}. Give --outdir instead.")
    if args.moe:
        return export_moe(which_run.named(args), args.dir, args.steps, args.measure)
    folder = where.named(args)
    package.copy(folder, args.dir)
    n_bytes = sum(path.stat().st_size for path in package.files(args.dir))
    printable.show(f"{args.dir}: an ensemble of {n_bytes / 1e6:,.1f} MB", end="\n")


if __name__ == "__main__":
    cli.run(main)
