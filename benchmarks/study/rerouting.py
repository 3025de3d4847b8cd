"""How often do the weights have to follow the text? From what runs have scored, without a forward pass.

    python benchmarks/study/rerouting.py results/study/runs/k=8,steps=200 ... --out docs/study/rerouting.json

The weights of a router are those of the last token whose position in its document is a multiple of the
interval. An interval as long as a document is one choice for all of it. The setting of each router is chosen
anew for each interval, on the calibration documents. All experts read all tokens, so `filter` knows what each
has predicted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline import config, eval_ensemble, plan, plan_search
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.mixture import bootstrap, ensemble, scored
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting
from cbtm_pipeline.mixture.scored import Scored

INTERVALS = (1, 4, 16, 64, 256)  # tokens; a held-out document of the study has at most 256


def held_weights(logw_NK: np.ndarray, offsets: np.ndarray, interval: int) -> np.ndarray:
    """Weights that are renewed every so many tokens of a document, and stay in between."""
    begin_N = np.repeat(offsets[:-1], np.diff(offsets))
    position_N = np.arange(len(logw_NK)) - begin_N
    return logw_NK[begin_N + position_N // interval * interval]


def document_nll(held_out: HeldOut, setting: Setting) -> np.ndarray:
    """Negative log-likelihood of each document for each interval, all experts active, (D, I)."""
    logw_NK = ROUTERS[setting.router].log_weights(held_out, setting)
    held = (held_weights(logw_NK, held_out.offsets, interval) for interval in INTERVALS)
    mixed = [ensemble.mix(held_out.logprob_NK, held_NK) for held_NK in held]
    return -np.stack([ensemble.document_sums(mixed_N, held_out.offsets) for mixed_N in mixed], axis=1)


def read(outdir: Path) -> tuple[config.Config, Scored]:
    """The config of a run, and its scored held-out documents."""
    cfg = config.read(outdir / "config.json")
    names = plan.evaluated(cfg)
    cards = {outdir / f"experts/{plan_search.base(name)}/card.json" for name in [*names, *plan.trained(cfg)]}
    scores = [outdir / f"scores/{name}.npz" for name in names]
    return cfg, scored.read(
        eval_ensemble.expected(cfg), outdir / "route/distances.npz", scores, sorted(cards)
    ).scored


def of_run(outdir: Path) -> dict[str, Any]:
    """For each router and interval, the ratio of perplexities to that with new weights at each token."""
    cfg, held_out = read(outdir)
    systems = artifact.read_sealed(outdir / "eval/metrics.json", "metrics")["systems"]
    rows = [row for row in systems if row["top_k"] == cfg.cluster.k and row["router"]]
    settings = dict.fromkeys(Setting.of(row) for row in rows)
    share, rng_seed = cfg.route.calibration_share, cfg.seed
    is_calibration_D = heldout.calibration_documents(held_out.doc_id_D, share, rng_seed)
    parts = [held_out.take(np.flatnonzero(mask_D)) for mask_D in (is_calibration_D, ~is_calibration_D)]
    calibration, reported = (
        HeldOut(part.experts(plan.cluster_experts(cfg)), part.d2_NK, part.offsets) for part in parts
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for router in dict.fromkeys(setting.router for setting in settings):
        tried = [setting for setting in settings if setting.router == router]
        nll_DI = _chosen(calibration, reported, tried)
        resamples = cfg.eval.bootstrap, rng_seed
        ratios = bootstrap.estimates(nll_DI, nll_DI[:, 0], parts[1].n_tokens_D, *resamples)
        found[router] = [{"interval": n, **ratio} for n, ratio in zip(INTERVALS, ratios, strict=True)]
    return {"run": outdir.name, "routers": found}


def _chosen(calibration: HeldOut, reported: HeldOut, tried: list[Setting]) -> np.ndarray:
    """Negative log-likelihoods of the reported documents with the best setting of each interval, (D, I)."""
    nll_SI = np.stack([document_nll(calibration, setting).sum(axis=0) for setting in tried])
    best_I = nll_SI.argmin(axis=0).tolist()
    by_setting = {i: document_nll(reported, tried[i]) for i in set(best_I)}
    return np.stack([by_setting[i][:, column] for column, i in enumerate(best_I)], axis=1)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    p.add_argument("--out", required=True, type=Path, help="JSON file")
    args = p.parse_args()
    content = [of_run(outdir) for outdir in args.runs]
    args.out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    cli.run(main)
