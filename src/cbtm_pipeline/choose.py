"""Choose the learning rate of a kind of model: the one with the lowest validation loss.

    python -m cbtm_pipeline.choose --config results/config.json --kind experts \\
        --candidates results/experts/*@*/card.json --out results/search/experts.json

The loss of a rate is the mean over the validation tokens of all models of the kind: experts are given one
rate together. None of the documents that are reported on has a say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbtm_pipeline import config, plan, plan_search
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.provenance import made_from
from cbtm_pipeline.training import rates


def choose(
    models: list[str], tried: tuple[float, ...], cards: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """What search/<kind>.json says: the chosen rate, and each rate's loss and training FLOPs.

    `cards` are those of the candidates of all `models`, by id. Raises ValueError if no rate has a loss.
    """
    found = []
    for rate in tried:
        of_rate = [cards[plan_search.candidate(name, rate)] for name in models]
        validated = [
            rates.Validated(card["validation_loss"], card["n_validation_tokens"], "diverged" in card)
            for card in of_rate
        ]
        flops = sum(card["train_flops"] for card in of_rate)
        found.append({"lr": rate, "validation_loss": rates.mean_loss(validated), "train_flops": flops})
    chosen = rates.best({row["lr"]: row["validation_loss"] for row in found})
    if chosen is None:
        raise ValueError(
            f"train.lr: no rate of {', '.join(f'{rate:g}' for rate in tried)} has a validation loss for "
            f"{', '.join(models)}. Expected one. Lower the rates if they diverged, or raise "
            "train.validation_share."
        )
    return {"chosen": chosen, "candidates": found}


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__)
    p.add_argument("--kind", required=True, help="seed, experts, random, or the name of a dense model")
    p.add_argument(
        "--candidates", required=True, type=Path, nargs="+", help="card.json of the candidates, in any order"
    )
    p.add_argument("--out", required=True, type=Path, help="JSON to write")
    args = p.parse_args(argv)
    cli.start_logging(f"choose {args.kind}", args.log)
    cfg = config.read(args.config)
    kinds = plan.searched(cfg)
    if args.kind not in kinds:
        p.error(
            f"--kind: {args.kind}. Expected one of {', '.join(kinds) or 'no kind, as train.lr is a number'}."
        )
    models, tried = kinds[args.kind], plan_search.choose(cfg)
    expected = [name for model in models for name in plan_search.candidates(cfg, model)]
    paths = {path.parent.name: path for path in args.candidates}
    if missing := [name for name in expected if name not in paths]:
        raise ValueError(
            f"--candidates: no card of {', '.join(missing)}. Expected one for each candidate. Add it to the "
            "command line."
        )
    cards = {name: artifact.read_sealed(paths[name], "expert") for name in expected}
    found = choose(models, tried.rates, cards)
    meta = artifact.make_meta("choice", made_from.choose(cards), tried.content(), of=args.kind, **found)
    artifact.write_sealed(args.out, meta)
    losses = (
        f"{row['lr']:g}: {loss:.4f}"
        if (loss := row["validation_loss"]) is not None
        else f"{row['lr']:g}: none"
        for row in found["candidates"]
    )
    cli.log.info("rate %g, by validation losses %s", found["chosen"], ", ".join(losses))


if __name__ == "__main__":
    cli.run(main)
