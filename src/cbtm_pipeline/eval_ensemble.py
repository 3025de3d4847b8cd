"""Mix the experts on held-out text, and compare the systems.

    python -m cbtm_pipeline.eval_ensemble --config config.yaml --distances results/route/distances.npz \\
        --scores results/scores/*.npz --experts results/experts/*/card.json \\
        --clusters results/assignments/manifest.json --out results/eval/metrics.json

It writes metrics.json, and table.txt and documents.parquet beside it. One part of the held-out documents
serves to choose the routers' settings. The numbers are of the other part.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline import config, plan_first, plan_search
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.mixture import (
    bootstrap,
    by_label,
    documents,
    scored,
    search,
    sweep,
    switches,
    systems,
    verdict,
)
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting
from cbtm_pipeline.mixture.scored import Scored
from cbtm_pipeline.mixture.systems import Row, expert_nll
from cbtm_pipeline.plan import EvalPlan
from cbtm_pipeline.provenance import chosen, made_from, same_clusters

TABLE = "table.txt"  # beside metrics.json
Cards = dict[str, dict[str, Any]]  # card.json of the seed and of every expert


class Models(NamedTuple):
    """Held-out documents `[sep, x_0, ...]` in the order of the scores, and the cluster experts' folders."""

    documents: list[np.ndarray]
    folders: list[Path]


def evaluate(
    cfg: config.Config,
    held_out: Scored,
    cards: Cards,
    models: Models | None = None,
    choices: chosen.Choices | None = None,
    n_threads: int = 1,
    labelled: by_label.Labelled | None = None,
) -> dict[str, Any]:
    """Return the content of metrics.json without its meta record.

    `models` are there with eval.merge, `choices` where train.lr is a list, `labelled` with label_field.

    Raises ValueError when there are too few documents to calibrate on.
    """
    plan, dense = plans.eval_ensemble(cfg), plans.dense_experts(cfg)
    is_calibration_D = heldout.calibration_documents(held_out.doc_id_D, plan.calibration_share, plan.rng_seed)
    calibration = held_out.take(np.flatnonzero(is_calibration_D))
    rows_D = np.flatnonzero(~is_calibration_D)
    reported = held_out.take(rows_D)
    inputs = _inputs(cfg, calibration, reported, cards, choices or {}, n_threads)
    partial_rows, nlls = zip(*systems.make(inputs), strict=True)
    nll_DS = np.stack(nlls, axis=1)
    rows = _complete_rows(plan, reported, dense, list(partial_rows), nll_DS)
    metrics = {
        "n_documents": len(reported.doc_id_D),
        "n_tokens": int(reported.n_tokens_D.sum()),
        "n_bytes": int(reported.n_bytes_D.sum()),
        "calibration": {
            "n_documents": len(calibration.doc_id_D),
            "n_tokens": int(calibration.n_tokens_D.sum()),
        },
        "k": cfg.cluster.k,
        "dense": cfg.train.dense,
        "systems": rows,
        "comparisons": _comparisons(plan, reported, rows, nll_DS),
        "matrix": systems.matrix(plans.cluster_experts(cfg), reported),
        "flops": _flops(cfg, cards),
        "weights": {name: card["weights"] for name, card in cards.items()},
    }
    metrics |= _shown(metrics, reported, rows_D)
    metrics["warnings"] = verdict.at_the_ends(verdict.headline(metrics), plan.content())
    if choices:
        metrics["search"] = chosen.shown(choices)
        metrics["warnings"] += search.at_the_ends(metrics["search"])
    if labelled:
        best_D = nll_DS[:, rows.index(verdict.headline(metrics))]
        systems_D = by_label.Systems(best_D, {name: expert_nll(reported, name) for name in dense})
        resamples = plan.bootstrap, plan.rng_seed
        metrics["labels"] = by_label.content(labelled.take(rows_D), reported, systems_D, *resamples)
    if models:
        documents = [models.documents[i] for i in rows_D.tolist()]
        metrics["merge"] = _merged(cfg, metrics, calibration, reported, models._replace(documents=documents))
    return {**metrics, "verdict": verdict.sentences(metrics)}


def _inputs(
    cfg: config.Config,
    calibration: Scored,
    reported: Scored,
    cards: Cards,
    choices: chosen.Choices,
    n_threads: int,
) -> systems.Inputs:
    """What the systems are made of. The sweep tries the settings of section route."""
    plan = plans.eval_ensemble(cfg)
    return systems.Inputs(
        calibration=calibration,
        reported=reported,
        clusters=plans.cluster_experts(cfg),
        dense=plans.dense_experts(cfg),
        randoms=plans.random_experts(cfg),
        train_flops={name: card["train_flops"] for name, card in cards.items()},
        n_parameters={name: card["n_parameters"] for name, card in cards.items()},
        begins=_begins(cfg),
        search_flops=chosen.search_flops(cfg, cards, choices),
        grid=sweep.Grid(
            *(plan.routers, plan.top_k, plan.temperature, plan.epsilon, plan.beta),
            *(plan.hysteresis, plan.fix_after),
        ),
        n_threads=n_threads,
    )


def expected(cfg: config.Config) -> scored.Expected:
    """What the config says about the distances and the scores of a run."""
    route, score = plans.route(cfg).content(), plans.score_expert(cfg).content()
    return scored.Expected(cfg.outdir, plans.evaluated(cfg), _begins(cfg), cfg.cluster.k, route, score)


def _begins(cfg: config.Config) -> dict[str, str]:
    """The model that each training begins as, by id. Those from scratch are left out."""
    return {name: first for name in plans.trained(cfg) if (first := plans.begins_as(cfg, name))}


def _merged(
    cfg: config.Config, metrics: dict[str, Any], calibration: Scored, reported: Scored, models: Models
) -> dict[str, Any]:
    """What one model of averaged weights for each of the reported documents gives."""
    from cbtm_pipeline.inference import merging  # only here: it needs torch

    score = plans.score_expert(cfg)
    return merging.compare(metrics, calibration, reported, *models, score.context, score.stride)


def read_shards(shards: Path, held_out: str) -> dict[str, Any]:
    """The manifest of the shards. Raises ValueError for other held-out text than `held_out`, an identity."""
    manifest = artifact.read_sealed(shards, "shards")
    if manifest["identity_eval"] != held_out:
        raise ValueError(
            f"{shards}: other held-out text than was scored. Expected the same. Start the workflow again."
        )
    return manifest


def read_models(
    of_shards: by_label.Manifest, cfg: config.Config, found: scored.Found, cards: list[Path]
) -> Models:
    """What eval.merge needs. Raises ValueError if a file is not the one that was scored."""
    shards, manifest = of_shards
    limit = plans.score_expert(cfg).max_document_tokens
    documents = [document for _, document in heldout.documents(shards.parent, manifest, limit)]
    by_name = {path.parent.name: path.parent for path in cards}
    folders = [by_name[name] for name in plans.cluster_experts(cfg)]
    for name, folder in zip(plans.cluster_experts(cfg), folders, strict=True):
        artifact.check_file(folder / "model.safetensors", found.cards[name]["weights"], "Make it again.")
    return Models(documents, folders)


def _shown(metrics: dict[str, Any], reported: Scored, row_D: np.ndarray) -> dict[str, Any]:
    """How the best mixture uses its experts, documents that show its switches, and some of each cluster.

    `row` of a document is its number among all held-out ones.
    """
    best, names = verdict.headline(metrics), metrics["matrix"]["experts"]
    held_out = HeldOut(reported.experts(names), reported.d2_NK, reported.offsets)
    logw_NK = ROUTERS[best["router"]].log_weights(held_out, Setting.of(best))
    about = reported.offsets, reported.cluster_D, reported.doc_id_D
    texts = switches.examples(logw_NK, reported.offsets, reported.doc_id_D)
    clusters = switches.typical(reported.d2_NK, *about)
    for one in [*texts, *(one for found in clusters for one in found)]:
        one["row"] = int(row_D[one["row"]])
    return {"texts": texts, "typical": clusters, "use": switches.use(logw_NK)}


def by_document(cfg: config.Config, held_out: Scored, metrics: dict[str, Any]) -> documents.Columns:
    """What is known of each held-out document: its cluster, what it was used for, and its nll."""
    best, names = verdict.headline(metrics), metrics["matrix"]["experts"]
    whole = HeldOut(held_out.experts(names), held_out.d2_NK, held_out.offsets)
    plan = plans.eval_ensemble(cfg)
    chosen_D = heldout.calibration_documents(held_out.doc_id_D, plan.calibration_share, plan.rng_seed)
    nll = {name: expert_nll(held_out, name) for name in held_out.logprob}
    return documents.Columns(
        held_out, chosen_D, {"ensemble": sweep.document_nll(whole, Setting.of(best)), **nll}
    )


def _complete_rows(
    plan: EvalPlan, reported: Scored, dense: list[str], partial_rows: list[Row], nll_DS: np.ndarray
) -> list[Row]:
    """Add to the row of each system its perplexity and its ratios to the dense models."""
    n_tokens, n_bytes = int(reported.n_tokens_D.sum()), int(reported.n_bytes_D.sum())
    ratios = {name: _ratios(plan, reported, nll_DS, expert_nll(reported, name)) for name in dense}
    return [
        {
            **systems.NO_VALUES,
            **row,
            "nll": nll / n_tokens,
            "perplexity": math.exp(nll / n_tokens),
            "bits_per_byte": nll / n_bytes / math.log(2),
            "ratio_to_dense": ratios["dense"][s]["ratio"],
            "ci95": ratios["dense"][s]["ci95"],
            "ratios": {name: ratios_S[s] for name, ratios_S in ratios.items()},
        }
        for s, (row, nll) in enumerate(zip(partial_rows, nll_DS.sum(axis=0).tolist(), strict=True))
    ]


def _ratios(
    plan: EvalPlan, reported: Scored, nll_DS: np.ndarray, reference_D: np.ndarray
) -> list[dict[str, Any]]:
    """Perplexity of each system relative to the reference, with its 95 % interval."""
    return bootstrap.estimates(nll_DS, reference_D, reported.n_tokens_D, plan.bootstrap, plan.rng_seed)


def _comparisons(
    plan: EvalPlan, reported: Scored, rows: list[Row], nll_DS: np.ndarray
) -> list[dict[str, Any]]:
    """Compare each router's headline with the headlines before it, and with the mixtures without a router."""
    references = [s for s, row in enumerate(rows) if row["system"] in ("uniform", "random", "oracle")]
    headlines = [s for s, row in enumerate(rows) if row["headline"]]
    return [
        {
            "system": verdict.label(rows[s]),
            "against": verdict.label(rows[r]),
            **_ratios(plan, reported, nll_DS[:, s, None], nll_DS[:, r])[0],
        }
        for n_before, s in enumerate(headlines)
        for r in [*headlines[:n_before], *references]
    ]


def _flops(cfg: config.Config, cards: Cards) -> dict[str, float]:
    """Training FLOPs of the seed, the first stage, the experts and each control, and FLOPs of inference.

    `forward_per_token` is the forward pass of one model over one token: a third of its training FLOPs. That
    of dense-large, a larger model, stands apart.
    """
    groups = {
        "seed": ["seed"],
        **({plan_search.kind(first[0]): first} if (first := plan_first.firsts(cfg)) else {}),
        "experts": plans.cluster_experts(cfg),
        **{name: [name] for name in plans.dense_experts(cfg)},
    }
    if random_experts := plans.random_experts(cfg):
        groups["random"] = random_experts
    flops = {group: sum(cards[name]["train_flops"] for name in names) for group, names in groups.items()}
    forward = {"forward_per_token": cards["seed"]["flops_per_token"] / 3}
    if plans.LARGE in cards:
        forward[f"forward_per_token_{plans.LARGE}"] = cards[plans.LARGE]["flops_per_token"] / 3
    return {**flops, **forward}


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__)
    p.add_argument("--distances", required=True, type=Path, help="distances.npz")
    cards = "of the seed and of every expert, in any order"
    manifests = "assignments/manifest.json, and random/manifest.json for random experts"
    for name, what in (
        ("scores", f"score files {cards}"),
        ("experts", f"card.json {cards}"),
        ("clusters", manifests),
    ):
        p.add_argument(f"--{name}", required=True, type=Path, nargs="+", help=what)
    p.add_argument("--shards", type=Path, help="shards/manifest.json, for eval.merge and corpus.label_field")
    p.add_argument("--choices", type=Path, nargs="*", default=[], help="search/*.json, if train.lr is a list")
    p.add_argument("--threads", type=cli.whole, default=1, help="threads; no number depends on it")
    p.add_argument("--out", required=True, type=Path, help="metrics.json; the other files go beside it")
    args = p.parse_args(argv)
    cli.start_logging("eval", args.log)
    cfg = config.read(args.config)

    found = scored.read(expected(cfg), args.distances, args.scores, args.experts)
    manifests, field = same_clusters.check(found, args.experts, args.clusters), cfg.corpus.label_field
    models, labelled, shards = None, None, None
    if cfg.eval.merge or field:
        if args.shards is None:
            p.error("--shards: expected with eval.merge and with corpus.label_field.")
        shards = read_shards(args.shards, found.distances["made_from"]["held_out"])
        models = read_models((args.shards, shards), cfg, found, args.experts) if cfg.eval.merge else None
        labelled = by_label.read(field, (args.shards, shards), manifests["clusters"]) if field else None
    choices = chosen.read(cfg, args.choices, found.cards)
    metrics = evaluate(cfg, found.scored, found.cards, models, choices, args.threads, labelled)
    if "second_round" in manifests["clusters"][1]:
        metrics["flops"]["second_round"] = manifests["clusters"][1]["second_round"]["flops"]
    table = verdict.table(metrics)
    with artifact.publish(args.out.with_name(TABLE)) as tmp:
        tmp.write_text(table, "utf-8")
    identities = made_from.eval_ensemble(found.distances, found.scores, choices, shards if field else None)
    by_document_path = args.out.with_name(documents.NAME)
    documents.write(by_document_path, by_document(cfg, found.scored, metrics), identities, labelled)
    beside = {"table": artifact.identity(args.out.with_name(TABLE))}
    beside["documents"] = artifact.identity(by_document_path)
    meta = artifact.make_meta(
        "metrics", identities, plans.eval_ensemble(cfg).content(), files=[TABLE, documents.NAME]
    )
    artifact.write_sealed(args.out, {**meta, **beside, **metrics})
    for warning in metrics["warnings"]:
        cli.log.warning("%s", warning)
    cli.log.info("%s", metrics["verdict"][0])
    print(table, end="")


if __name__ == "__main__":
    cli.run(main)
