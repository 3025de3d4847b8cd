"""The systems that are compared on the reported documents: their rows for metrics.json, and their nll.

Shapes: D reported documents, K cluster experts.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cbtm_pipeline.mixture import ensemble, sweep
from cbtm_pipeline.mixture.routers import HeldOut
from cbtm_pipeline.mixture.scored import Scored

Row = dict[str, Any]  # an entry of `systems` in metrics.json
System = tuple[Row, np.ndarray]  # a part of the row, and the nll of each reported document (D,), nats

# The keys that depend on the kind of system; null where they do not apply.
NO_VALUES: Row = {
    "system": None,
    "router": None,
    "k": None,
    "top_k": None,
    "n_active": None,
    "temperature": None,
    "epsilon": None,
    "beta": None,
    "hysteresis": None,
    "fix_after": None,
    "passes": None,
    "calibration_nll": None,
    "train_flops": None,
    "n_parameters": None,
    "n_active_parameters": None,
    "calibrated": False,
    "headline": False,
}


@dataclass(frozen=True)
class Inputs:
    """What the systems are made of."""

    calibration: Scored  # documents on which settings are chosen
    reported: Scored  # documents on which systems are compared
    clusters: list[str]  # the cluster experts
    dense: list[str]  # the dense models
    randoms: list[str]  # the experts on random clusters; may be empty
    train_flops: dict[str, float]  # of each training, the seed's included
    n_parameters: dict[str, int]  # of each model
    begins: Mapping[str, str]  # the model that each one began as, by id; those from scratch are not there
    search_flops: dict[str, float]  # of all candidates of each training; empty where no rate was searched
    grid: sweep.Grid
    n_threads: int = 1  # of the sweep

    @property
    def k(self) -> int:
        return len(self.clusters)

    @cached_property
    def reported_clusters(self) -> HeldOut:
        """The reported documents under the cluster experts: a copy of N x K numbers, made once."""
        return _held_out(self.reported, self.clusters)

    def cost(self, experts: Iterable[str], n_active: int | None) -> Row:
        """Training FLOPs of these experts, and of all that they began as. All their parameters, and those of
        the `n_active` that read a token; embedding and output layer count in each.
        """
        names = left = list(experts)
        trained: list[str] = []
        while left:
            trained = [*left, *trained]
            left = list(dict.fromkeys(self.begins[name] for name in left if name in self.begins))
        sizes = sorted((self.n_parameters[name] for name in names), reverse=True)
        row: Row = {"train_flops": sum(self.train_flops[name] for name in trained)}
        row |= {"n_parameters": sum(sizes)}
        row |= {"n_active_parameters": None if n_active is None else sum(sizes[:n_active])}
        if self.search_flops:
            row["search_flops"] = sum(self.search_flops[name] for name in trained)
        return row


def make(inputs: Inputs) -> list[System]:
    """All systems, in the order of metrics.json."""
    return [
        *_single_models(inputs),
        *_random_mixtures(inputs),
        _uniform_mixture(inputs),
        *_ensembles(inputs),
        _oracle(inputs),
        *_single_experts(inputs),
    ]


def expert_nll(held_out: Scored, name: str) -> np.ndarray:
    """Nll of each document under one expert, (D,): the sum over its tokens, in nats."""
    return -ensemble.document_sums(held_out.logprob[name], held_out.offsets)


def _single_models(inputs: Inputs) -> Iterator[System]:
    """The seed and the dense models, each on its own."""
    for name in ["seed", *inputs.dense]:
        row = {"system": name, "n_active": 1, "passes": 1.0, **inputs.cost([name], 1)}
        yield row, expert_nll(inputs.reported, name)


def _single_experts(inputs: Inputs) -> Iterator[System]:
    """The cluster experts, each on its own, on the documents of all clusters."""
    for name in inputs.clusters:
        row = {"system": f"expert-{name}", "k": inputs.k, "n_active": 1, "passes": 1.0}
        yield {**row, **inputs.cost([name], 1)}, expert_nll(inputs.reported, name)


def _mixture_row(inputs: Inputs, system: str, experts: list[str], top_k: int | None = None) -> Row:
    """The row of a mixture of `top_k` of these `experts`; of all without it."""
    k = inputs.k
    row = {"system": system, "k": k, "top_k": top_k or k, "n_active": top_k or k, "passes": float(k)}
    return {**row, **inputs.cost(experts, top_k or k)}


def _random_mixtures(inputs: Inputs) -> Iterator[System]:
    """The control: experts on random clusters, with equal weights and with the Bayes posterior."""
    if not inputs.randoms:
        return
    row = _mixture_row(inputs, "random", inputs.randoms)
    held_out = _held_out(inputs.reported, inputs.randoms)
    yield row, sweep.mixture_nll(held_out, _uniform)
    posterior = {"router": "posterior", "epsilon": 0.0, "beta": 1.0}
    yield {**row, **posterior}, sweep.mixture_nll(held_out, _posterior)


def _uniform_mixture(inputs: Inputs) -> System:
    """The cluster experts with equal weights."""
    nll_D = sweep.mixture_nll(inputs.reported_clusters, _uniform)
    return _mixture_row(inputs, "uniform", inputs.clusters), nll_D


def _ensembles(inputs: Inputs) -> Iterator[System]:
    """The cluster experts under every router, with one row for each result of the sweep.

    `calibrated` marks the best setting of each router and top_k, and those whose active set stays. `headline`
    marks the best of each router. All are chosen on the calibration documents.
    """
    calibration = _held_out(inputs.calibration, inputs.clusters)
    results = sweep.sweep(calibration, inputs.reported_clusters, inputs.grid, inputs.n_threads)
    moving = [result for result in results if not result.setting.stays]
    calibrated = sweep.best(moving, lambda setting: (setting.router, setting.top_k))
    headlines = sweep.best(moving, lambda setting: setting.router)
    for setting, calibration_nll, nll_D, passes in results:
        row = {
            **_mixture_row(inputs, "ensemble", inputs.clusters, setting.top_k),
            **setting._asdict(),
            "passes": passes,
            "calibration_nll": calibration_nll,
            "calibrated": setting in calibrated or setting.stays,
            "headline": setting in headlines,
        }
        yield row, nll_D


def _oracle(inputs: Inputs) -> System:
    """The best single cluster expert of each document. The choice needs the document's nll: it is a bound."""
    reported = inputs.reported_clusters
    logprob_N = ensemble.oracle(reported.logprob_NK, reported.offsets)
    row = {"system": "oracle", "k": inputs.k, **inputs.cost(inputs.clusters, None)}
    return row, -ensemble.document_sums(logprob_N, reported.offsets)


def matrix(experts: list[str], reported: Scored) -> dict[str, Any]:
    """Perplexity of each cluster expert and of dense on the reported documents of each cluster.

    It is null for a cluster without reported documents.
    """
    k = len(experts)
    n_tokens_K = np.bincount(reported.cluster_D, weights=reported.n_tokens_D, minlength=k)

    def per_cluster(name: str) -> list[float | None]:
        nll_K = np.bincount(reported.cluster_D, weights=expert_nll(reported, name), minlength=k)
        return [
            math.exp(nll / n) if n else None
            for nll, n in zip(nll_K.tolist(), n_tokens_K.tolist(), strict=True)
        ]

    return {
        "experts": experts,
        "perplexity": [per_cluster(name) for name in experts],
        "dense": per_cluster("dense"),
        "n_documents": np.bincount(reported.cluster_D, minlength=k).tolist(),
        "n_tokens": n_tokens_K.astype(int).tolist(),
    }


def _held_out(documents: Scored, experts: list[str]) -> HeldOut:
    return HeldOut(documents.experts(experts), documents.d2_NK, documents.offsets)


def _uniform(block: HeldOut) -> np.ndarray:
    return ensemble.uniform_log_weights(*block.logprob_NK.shape)


def _posterior(block: HeldOut) -> np.ndarray:
    return ensemble.posterior_log_weights(block.logprob_NK, block.offsets)
