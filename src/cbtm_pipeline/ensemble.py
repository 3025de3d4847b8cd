"""Pack the cluster experts and their router as one model of transformers: the folder results/ensemble.

    python -m cbtm_pipeline.ensemble --config results/config.json --metrics results/eval/metrics.json \\
        --embedder results/embed/embedder.npz --clusterer results/cluster/clusterer.npz \\
        --top-terms results/cluster/top_terms.json --tokenizer results/tokenizer/tokenizer.json \\
        --experts results/experts/[0-9]*/model.safetensors --out results/ensemble/files.json

The model is the best mixture of metrics.json: its router, with the settings that were chosen on the
calibration documents. Everything that is packed is verified, and is of one run.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.base.errors import make_again, run_again
from cbtm_pipeline.corpus import encoding
from cbtm_pipeline.inference import model_card, package
from cbtm_pipeline.mixture import verdict
from cbtm_pipeline.mixture.routers import ROUTERS
from cbtm_pipeline.plan_base import EnsemblePlan
from cbtm_pipeline.provenance import expert_files, made_from

TABLE = "table.txt"  # beside metrics.json
NAMES = {  # of the settings in metrics.json, as keys of the model's configuration
    "router": "router",
    "top_k": "n_active",
    "temperature": "router_temperature",
    "epsilon": "epsilon",
    "beta": "beta",
    "hysteresis": "hysteresis",
    "fix_after": "fix_after",
}

Record = dict[str, Any]


class Files(NamedTuple):
    """What the folder is made from. `experts`: the weights of the cluster experts, in any order."""

    metrics: Path
    embedder: Path
    clusterer: Path
    top_terms: Path
    tokenizer: Path
    experts: list[Path]


def best(metrics: Record) -> Record:
    """The row of the best mixture, by the calibration documents, of those whose router the model has.

    Raises ValueError if there is none.
    """
    rows = [row for row in metrics["systems"] if not row["headline"] or ROUTERS[row["router"]].in_model]
    if not any(row["headline"] for row in rows):
        known = " or ".join(name for name, router in ROUTERS.items() if router.in_model)
        raise ValueError(f"route.routers: none that the model has. Expected {known}. Add it.")
    return verdict.headline({**metrics, "systems": rows})


def settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture of a row of metrics.json, as keys of the model's configuration."""
    return {key: row[name] for name, key in NAMES.items() if row.get(name) is not None}


def read_experts(weights: list[Path], names: list[str], tokenizer: str, evaluated: Mapping[str, str]) -> dict:
    """Folder and card of each expert, in the order of `names`. `tokenizer` is its identity.

    Raises ValueError if one is missing or damaged, or is not the `evaluated` one (hashes of weights by name).
    """
    found = {}
    for path in weights:
        card = expert_files.read_card(path)
        artifact.check_made_from(path, card, "tokenizer", tokenizer)
        if card["weights"] != evaluated.get(card["expert"]):
            raise ValueError(
                f"{path}: not the expert that was evaluated. Expected the weights that metrics.json names. "
                f"{run_again(path)}"
            )
        found[card["expert"]] = path.parent, card
    if sorted(found) != sorted(names):
        raise ValueError(
            f"--experts: {', '.join(sorted(found)) or 'none'}. Expected {', '.join(names)}. "
            "Give the weights of every cluster expert."
        )
    return {name: found[name] for name in names}


def base_model(weights: Path) -> str | None:
    """The model on the hub that the experts' seed is; None if it is none, or if its card is not there."""
    path = weights.parents[1] / "seed/card.json"
    card = artifact.read_sealed(path, "expert") if path.exists() else {}
    return card["made_with"].get("pretrained") if "pretrained_commit" in card else None


def make(files: Files, out: Path, plan: EnsemblePlan) -> Record:
    """Write the folder of `out`. Returns the row of the mixture."""
    metrics = artifact.read_sealed(files.metrics, "metrics")
    table = files.metrics.with_name(TABLE)
    artifact.check_file(table, metrics["table"], partial(make_again, files.metrics))
    tokenizer = encoding.read_card(files.tokenizer)
    embedder, about = artifact.read_npz(files.embedder, "embedder")
    if "E_VD" not in embedder:
        raise ValueError(
            "embed.encoder: set. Expected the linear embedding, by which the model routes. Leave it out."
        )
    clusterer, fitted = artifact.read_npz(files.clusterer, "clusterer")
    artifact.check_made_from(files.clusterer, fitted, "embedder", about["seal"])
    terms = artifact.read_sealed(files.top_terms, "top_terms")
    artifact.check_made_from(files.top_terms, terms, "clusterer", fitted["seal"])
    experts = read_experts(
        files.experts, metrics["matrix"]["experts"], tokenizer["identity"], metrics["weights"]
    )
    cards = {name: card for name, (_, card) in experts.items()}
    row = best(metrics)
    tags = {name: own for name in cards if (own := config.tags_of(plan.tags or {}, name))}
    parts = package.Parts(
        embedding_VD=embedder["E_VD"],
        centres_KD=clusterer["centres_KD"],
        experts={name: folder for name, (folder, _) in experts.items()},
        tokenizer=files.tokenizer.parent,
        separator_id=tokenizer["separator_id"],
        vocab_size=tokenizer["vocab_size"],
        settings={**settings(row), "tags": tags},
        readme=model_card.render(
            row, table.read_text("utf-8"), cards, terms["top_terms"], tags, base_model(files.experts[0])
        ),
        top_terms=files.top_terms,
    )
    identities = made_from.ensemble(metrics, fitted, terms, tokenizer, cards)
    package.write(parts, out, artifact.make_meta("ensemble", identities, plan.content()))
    return row


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__, config=False)
    p.add_argument("--config", type=Path, help="config.json, for the tags of the experts; default: none")
    p.add_argument("--metrics", required=True, type=Path, help="eval/metrics.json, with table.txt beside it")
    p.add_argument("--embedder", required=True, type=Path, help="embed/embedder.npz")
    p.add_argument("--clusterer", required=True, type=Path, help="cluster/clusterer.npz")
    p.add_argument("--top-terms", required=True, type=Path, help="cluster/top_terms.json")
    p.add_argument("--tokenizer", required=True, type=Path, help="tokenizer/tokenizer.json")
    p.add_argument(
        "--experts",
        required=True,
        type=Path,
        nargs="+",
        help="model.safetensors of each cluster expert, in any order",
    )
    p.add_argument("--out", required=True, type=Path, help="files.json, in a folder of its own")
    args = p.parse_args(argv)
    cli.start_logging("ensemble", args.log)
    files = Files(args.metrics, args.embedder, args.clusterer, args.top_terms, args.tokenizer, args.experts)
    plan = plans.ensemble(config.read(args.config)) if args.config else EnsemblePlan()
    row = make(files, args.out, plan)
    cli.log.info("%s: %s, one model of %d experts", args.out.parent, verdict.label(row), row["k"])


if __name__ == "__main__":
    cli.run(main)
