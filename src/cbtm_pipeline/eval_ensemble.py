"""Mix the experts on held-out text and say how the ensemble compares: metrics.json, and table.txt beside it.

The router's settings are chosen on a part of the held-out documents that is not reported on. Every other number is of the reported part.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.mixture import bootstrap, ensemble, scored, sweep, verdict
from cbtm_pipeline.mixture.routers import HeldOut, Setting
from cbtm_pipeline.plan import EvalPlan

# What every row of `systems` says; null where it does not apply.
ROW = {
    **dict.fromkeys(
        (
            "system",
            "router",
            "k",
            "top_k",
            "n_active",
            "temperature",
            "epsilon",
            "beta",
            "calibration_nll",
            "train_flops",
        )
    ),
    "calibrated": False,
    "headline": False,
}


def evaluate(cfg: config.Config, held_out: scored.Scored, cards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All that metrics.json says, its meta record excepted. Raises ValueError when there are too few documents to calibrate on."""
    plan = plans.eval_ensemble(cfg)
    on_calibration_D = heldout.calibration_documents(held_out.doc_id_D, plan.calibration_share, plan.rng_seed)
    reported = held_out.take(np.flatnonzero(~on_calibration_D))
    calibration = held_out.take(np.flatnonzero(on_calibration_D))

    rows, nlls = zip(*_systems(cfg, plan, calibration, reported, cards), strict=True)
    nll_DS = np.stack(nlls, axis=1)
    n_tokens, n_bytes = int(reported.n_tokens_D.sum()), int(reported.n_bytes_D.sum())

    def ratios(reference_D: np.ndarray, nll_DS: np.ndarray = nll_DS) -> list[dict[str, Any]]:
        ratio_S = bootstrap.perplexity_ratio(nll_DS, reference_D, reported.n_tokens_D)
        ci95_S2 = bootstrap.ratio_intervals(
            nll_DS, reference_D, reported.n_tokens_D, plan.bootstrap, plan.rng_seed
        )
        return [
            {"ratio": float(ratio), "ci95": ci95.tolist()}
            for ratio, ci95 in zip(ratio_S, ci95_S2, strict=True)
        ]

    to_dense = {name: ratios(_nll(reported, name)) for name in plans.dense_experts(cfg)}
    systems = [
        {
            **ROW,
            **row,
            "nll": nll / n_tokens,
            "perplexity": math.exp(nll / n_tokens),
            "bits_per_byte": nll / n_bytes / math.log(2),
            "ratio_to_dense": to_dense["dense"][s]["ratio"],
            "ci95": to_dense["dense"][s]["ci95"],
            "ratios": {name: ratios_S[s] for name, ratios_S in to_dense.items()},
        }
        for s, (row, nll) in enumerate(zip(rows, nll_DS.sum(axis=0).tolist(), strict=True))
    ]
    metrics = {
        "n_documents": len(reported.doc_id_D),
        "n_tokens": n_tokens,
        "n_bytes": n_bytes,
        "calibration": {
            "n_documents": len(calibration.doc_id_D),
            "n_tokens": int(calibration.n_tokens_D.sum()),
        },
        "k": cfg.cluster.k,
        "dense": cfg.train.dense,
        "systems": systems,
        "comparisons": [
            {
                "system": verdict.label(systems[s]),
                "against": verdict.label(systems[r]),
                **ratios(nll_DS[:, r], nll_DS[:, s, None])[0],
            }
            for s, r in _pairs(systems)
        ],
        "matrix": _matrix(cfg, reported),
        "flops": _flops(cfg, cards),
        "weights": {name: card["weights"] for name, card in cards.items()},
    }
    return {**metrics, "verdict": verdict.sentences(metrics)}


def _systems(
    cfg: config.Config,
    plan: EvalPlan,
    calibration: scored.Scored,
    reported: scored.Scored,
    cards: dict[str, dict[str, Any]],
) -> Iterable[tuple[dict[str, Any], np.ndarray]]:
    """Every system as (what its row says, nll of each reported document)."""

    def flops(names: Iterable[str]) -> float:
        return sum(cards[name]["train_flops"] for name in dict.fromkeys(["seed", *names]))

    def nll_D(logprob_N: np.ndarray) -> np.ndarray:
        return -ensemble.document_sums(logprob_N, reported.offsets)

    k, clusters, randoms = cfg.cluster.k, plans.cluster_experts(cfg), plans.random_experts(cfg)
    for name in ["seed", *plans.dense_experts(cfg)]:
        yield {"system": name, "n_active": 1, "train_flops": flops([name])}, _nll(reported, name)

    uniform_NK = ensemble.uniform_log_weights(len(reported.d2_NK), k)
    all_k = {"k": k, "top_k": k, "n_active": k}
    if randoms:
        logprob_NK = reported.experts(randoms)
        mixture = {"system": "random", **all_k, "train_flops": flops(randoms)}
        yield mixture, nll_D(ensemble.mix(logprob_NK, uniform_NK))
        # the filter that knows no cluster and forgets nothing is the Bayes posterior over the experts
        posterior = Setting("filter", k, math.inf, epsilon=0.0, beta=1.0)
        part = HeldOut(logprob_NK, np.zeros_like(reported.d2_NK), reported.offsets)
        yield (
            {**mixture, "router": "posterior", "epsilon": 0.0, "beta": 1.0},
            sweep.document_nll(part, posterior),
        )

    logprob_NK = reported.experts(clusters)
    trained = {"k": k, "train_flops": flops(clusters)}
    yield {"system": "uniform", **all_k, **trained}, nll_D(ensemble.mix(logprob_NK, uniform_NK))
    results = sweep.sweep(
        HeldOut(calibration.experts(clusters), calibration.d2_NK, calibration.offsets),
        HeldOut(logprob_NK, reported.d2_NK, reported.offsets),
        sweep.Grid(plan.routers, plan.top_k, plan.temperature, plan.epsilon, plan.beta),
    )
    calibrated = sweep.best(results, lambda setting: (setting.router, setting.top_k))
    headlines = sweep.best(results, lambda setting: setting.router)
    for setting, calibration_nll, nll in results:
        chosen = {
            "calibration_nll": calibration_nll,
            "calibrated": setting in calibrated,
            "headline": setting in headlines,
        }
        yield {"system": "ensemble", **trained, "n_active": setting.top_k, **setting._asdict(), **chosen}, nll
    yield {"system": "oracle", **trained}, nll_D(ensemble.oracle(logprob_NK, reported.offsets))
    for name in clusters:
        yield (
            {"system": f"expert-{name}", "k": k, "n_active": 1, "train_flops": flops([name])},
            _nll(reported, name),
        )


def _nll(held_out: scored.Scored, name: str) -> np.ndarray:
    """Nll of each document under one expert, (D,)."""
    return -ensemble.document_sums(held_out.logprob[name], held_out.offsets)


def _pairs(systems: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Which systems are compared directly (indices): each router's headline with the headlines before it and with the controls."""
    controls = [i for i, row in enumerate(systems) if row["system"] in ("uniform", "random", "oracle")]
    headlines = [i for i, row in enumerate(systems) if row["headline"]]
    return [(i, j) for n, i in enumerate(headlines) for j in [*headlines[:n], *controls]]


def _matrix(cfg: config.Config, reported: scored.Scored) -> dict[str, Any]:
    """Perplexity of each expert, and of dense, on the reported documents of each cluster; null where a cluster has none."""
    k, cluster_D = cfg.cluster.k, reported.cluster_D
    n_tokens_K = np.bincount(cluster_D, weights=reported.n_tokens_D, minlength=k)

    def per_cluster(name: str) -> list[float | None]:
        nll_K = np.bincount(cluster_D, weights=_nll(reported, name), minlength=k)
        return [
            math.exp(nll / n) if n else None
            for nll, n in zip(nll_K.tolist(), n_tokens_K.tolist(), strict=True)
        ]

    return {
        "experts": plans.cluster_experts(cfg),
        "perplexity": [per_cluster(name) for name in plans.cluster_experts(cfg)],
        "dense": per_cluster("dense"),
        "n_documents": np.bincount(cluster_D, minlength=k).tolist(),
        "n_tokens": n_tokens_K.astype(int).tolist(),
    }


def _flops(cfg: config.Config, cards: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Training FLOPs, apart for whoever they were spent on, and those of one model's forward pass over one token: a third of training's."""
    groups = {
        "seed": ["seed"],
        "experts": plans.cluster_experts(cfg),
        **{name: [name] for name in plans.dense_experts(cfg)},
    }
    if randoms := plans.random_experts(cfg):
        groups["random"] = randoms
    flops = {group: sum(cards[name]["train_flops"] for name in names) for group, names in groups.items()}
    return {**flops, "forward_per_token": cards["seed"]["flops_per_token"] / 3}


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--distances", required=True, type=Path, help="distances.npz")
    p.add_argument(
        "--scores",
        required=True,
        type=Path,
        nargs="+",
        help="score files of the seed and of every expert, in any order",
    )
    p.add_argument(
        "--experts",
        required=True,
        type=Path,
        nargs="+",
        help="card.json of the seed and of every expert, in any order",
    )
    p.add_argument("--out", required=True, type=Path, help="metrics.json; table.txt is written beside it")
    args = p.parse_args()
    cli.start_logging("eval", args.log)
    cfg = config.read(args.config)

    experts, k = ["seed", *plans.experts(cfg)], cfg.cluster.k
    route, score = plans.route(cfg).content(), plans.score_expert(cfg).content()
    expected = scored.Expected(cfg.outdir, experts, k, route, score)
    held_out, cards, made_from = scored.read(expected, args.distances, args.scores, args.experts)
    metrics = evaluate(cfg, held_out, cards)
    table = verdict.table(metrics)
    with artifact.publish(args.out.with_name("table.txt")) as tmp:
        tmp.write_text(table, "utf-8")
    artifact.write_json(args.out, {**artifact.make_meta("metrics", made_from), **metrics})
    print(table, end="")


if __name__ == "__main__":
    cli.run(main)
