"""Make the candidate with the chosen learning rate the expert.

    python -m cbtm_pipeline.adopt --choice results/search/experts.json --expert 0 \\
        --candidates results/experts/0@*/card.json --out results/experts/0/model.safetensors

The weights become a second link, which needs no space; the small files are copied.
"""

import shutil
from pathlib import Path

from cbtm_pipeline import plan_search
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.base.publish import link_or_copy
from cbtm_pipeline.provenance import expert_files
from cbtm_pipeline.provenance.expert_files import WEIGHTS
from cbtm_pipeline.training import expert_card


def adopt(candidate: Path, folder: Path) -> None:
    """Publish all files of the folder `candidate` in the expert's `folder`, the weights last.

    The candidate's files have to be verified. An evaluation in the model card stays if the weights are the
    same.
    """
    readme, weights = folder / expert_card.README, artifact.identity(candidate / WEIGHTS)
    before = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    for path in expert_files.all_files(candidate):
        with artifact.publish(folder / path.relative_to(candidate)) as tmp:
            if path.name == WEIGHTS:
                link_or_copy(path, tmp)
            elif path.name == expert_card.README:
                text = expert_card.with_evaluation_of(path.read_text("utf-8"), before, weights)
                tmp.write_text(text, "utf-8")
            else:
                shutil.copyfile(path, tmp)


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__, config=False)
    p.add_argument("--choice", required=True, type=Path, help="search/<kind>.json")
    p.add_argument("--expert", required=True, help="the expert, such as 0")
    p.add_argument(
        "--candidates", required=True, type=Path, nargs="+", help="card.json of its candidates, in any order"
    )
    p.add_argument("--out", required=True, type=Path, help="model.safetensors to publish")
    args = p.parse_args(argv)
    cli.start_logging(f"adopt {args.expert}", args.log)
    choice = artifact.read_sealed(args.choice, "choice")
    name = plan_search.candidate(args.expert, choice["chosen"])
    folder = next((path.parent for path in args.candidates if path.parent.name == name), None)
    if folder is None:
        raise ValueError(f"--candidates: no card of {name}. Expected it. Add it to the command line.")
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder / WEIGHTS}: deleted when another rate was chosen (run.keep_replaced). Expected the "
            "weights of the chosen rate. Start the workflow again: it trains them."
        )
    card = expert_files.read_card(folder / WEIGHTS)
    artifact.check_made_from(args.choice, choice, name, card["seal"])
    adopt(folder, args.out.parent)
    cli.log.info("%s is %s", args.out.parent, name)


if __name__ == "__main__":
    cli.run(main)
