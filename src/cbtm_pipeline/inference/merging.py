"""Merging at test time: one model of averaged weights for each document, beside the ensemble (TTMM).

The first `prefix(n)` of a document's n tokens are its prompt. The router's weights after them average the
experts' weights (arXiv 2505.14136). The merged model reads the whole document, and its tokens after the
prompt are scored: the same tokens for all systems that are compared. Beside it stands one average for all
documents, weighted by the mean posterior of the calibration documents (BTM, arXiv 2208.03306).

Shapes: D documents, K experts, N tokens of all documents.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline.base.cli import Progress, log
from cbtm_pipeline.inference import document_scores
from cbtm_pipeline.mixture import ensemble, verdict
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting
from cbtm_pipeline.mixture.scored import Scored

PREFIX = 32  # tokens of a prompt, at most
FAR = 0.2  # a spread above which averages predict badly; as in modeling_cbtm


def prefix(n_tokens_D: np.ndarray) -> np.ndarray:
    """Tokens of each document's prompt: a quarter of it, at most PREFIX."""
    return np.minimum(PREFIX, n_tokens_D // 4)


class Merger:
    """Experts whose weights are averaged anew for each document."""

    def __init__(self, folders: Sequence[Path]):
        from cbtm_pipeline.base import device
        from cbtm_pipeline.training import model

        nets = [model.load(folder).eval() for folder in folders]
        self.net = copy.deepcopy(nets[0])
        device.move(self.net)
        self.parts = [dict(net.named_parameters()) for net in nets]

    def merge(self, weight_K: np.ndarray) -> float:
        """Average the experts. Returns their spread.

        That is the root mean square of their distances from the mean, divided by its norm.
        """
        import torch

        square, norm2 = 0.0, 0.0
        with torch.no_grad():
            for name, target in self.net.named_parameters():
                mean = torch.zeros_like(self.parts[0][name])
                for j in np.flatnonzero(weight_K).tolist():
                    tensor = self.parts[j][name]
                    mean.add_(tensor, alpha=float(weight_K[j]))
                    square += float(weight_K[j]) * float(tensor.square().sum())
                norm2 += float(mean.square().sum())
                target.copy_(mean)
        return math.sqrt(max(square - norm2, 0) / max(norm2, 1e-30))


def mean_posterior(logprob_NK: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The mean over documents of the Bayes posterior after a document, from equal priors, (K)."""
    columns = [ensemble.document_sums(column_N, offsets) for column_N in logprob_NK.T]
    sums_DK = np.stack(columns, 1)
    weight_DK = np.exp(sums_DK - sums_DK.max(1, keepdims=True))
    return (weight_DK / weight_DK.sum(1, keepdims=True)).mean(0)


def compare(
    metrics: dict[str, Any],
    calibration: Scored,
    reported: Scored,
    documents: Sequence[np.ndarray],
    folders: Sequence[Path],
    context: int,
    stride: int,
) -> dict[str, Any]:
    """The entry `merge` of metrics.json: perplexity and passes per token of the merged model, and of others.

    `documents` are the reported ones, `[sep, x_0, ...]`; `folders` those of the cluster experts. The router
    is the best mixture's. Logs a line if the experts are too far apart to average.
    """
    experts = metrics["matrix"]["experts"]
    held_out = HeldOut(reported.experts(experts), reported.d2_NK, reported.offsets)
    rows = [row for row in metrics["systems"] if row["system"] == "ensemble" and row["calibrated"]]
    best, n_D = verdict.headline(metrics), prefix(reported.n_tokens_D)
    position_N = np.arange(reported.offsets[-1]) - np.repeat(reported.offsets[:-1], reported.n_tokens_D)
    scored_N = position_N >= np.repeat(n_D, reported.n_tokens_D)
    logw_NK = ROUTERS[best["router"]].log_weights(held_out, Setting.of(best))
    merger, progress = Merger(folders), Progress("merged", 2 * len(scored_N), "tokens")
    merged, average, spreads, weights = [], [], [], []
    for begin, n, document in zip(reported.offsets[:-1].tolist(), n_D.tolist(), documents, strict=True):
        if len(document) > 1:
            weights.append(np.exp(logw_NK[begin + n]))
            spreads.append(merger.merge(weights[-1]))
            merged.append(document_scores.score(merger.net, document, context, stride))
            progress.add(len(document) - 1)
    merger.merge(mean_posterior(calibration.experts(experts), calibration.offsets))
    for document in documents:
        average.append(document_scores.score(merger.net, document, context, stride))
        progress.add(len(document) - 1)
    spread, weight_DK = float(np.mean(spreads)), np.stack(weights)
    entropy_D = -(weight_DK * np.log(np.where(weight_DK > 0, weight_DK, 1))).sum(1)
    if spread > FAR:
        log.warning(
            "eval.merge: experts %.2f of their mean's norm away from it. Expected at most %g, or their "
            "average predicts badly. Start from a pretrained seed (model.pretrained).",
            *(spread, FAR),
        )
    prompts = np.where(scored_N[:, None], -np.inf, logw_NK)
    passes = 1 + ensemble.passes_per_token(prompts, reported.offsets).sum() / len(scored_N)
    systems = [_system("merge", np.concatenate(merged)[scored_N], float(passes))]
    systems.append(_system("posterior average", np.concatenate(average)[scored_N], 1.0))
    for row in rows:
        weights_NK = ROUTERS[row["router"]].log_weights(held_out, Setting.of(row))
        mixed_N = ensemble.mix(held_out.logprob_NK, weights_NK)
        systems.append(_system(verdict.label(row), mixed_N[scored_N], row["passes"]))
    systems.append(_system("dense", reported.logprob["dense"][scored_N], 1.0))
    return {
        "prompt_tokens": float(n_D.mean()),
        "n_tokens": int(scored_N.sum()),
        "router": verdict.label(best),
        "averaged": float((weight_DK > 0).sum(1).mean()),
        "effective": float(np.exp(entropy_D).mean()),
        "spread": spread,
        "systems": systems,
    }


def _system(name: str, logprob_N: np.ndarray, passes: float) -> dict[str, Any]:
    return {"system": name, "perplexity": math.exp(-float(np.mean(logprob_N, dtype=float))), "passes": passes}
