"""The systems that are compared on the reported documents: their rows for metrics.json, and their nll.

Shapes: D reported documents, K cluster experts.
"""

from collections.abc import Iterable, Iterator
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
    grid: sweep.Grid
    n_threads: int = 1  # of the sweep

    @property
    def k(self) -> int:
        return len(self.clusters)

    @cached_property
    def reported_clusters(self) -> HeldOut:
        """The reported documents under the cluster experts: a copy of N x K numbers, made once."""
        return _held_out(self.reported, self.clusters)

    def all_train_flops(self, experts: Iterable[str]) -> float:
        """Training FLOPs of these experts and of the seed."""
        return sum(self.train_flops[name] for name in dict.fromkeys(["seed", *experts]))


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
        row = {"system": name, "n_active": 1, "passes": 1.0, "train_flops": inputs.all_train_flops([name])}
        yield row, expert_nll(inputs.reported, name)


def _single_experts(inputs: Inputs) -> Iterator[System]:
    """The cluster experts, each on its own, on the documents of all clusters."""
    for name in inputs.clusters:
        row = {"system": f"expert-{name}", "k": inputs.k, "n_active": 1, "passes": 1.0}
        row["train_flops"] = inputs.all_train_flops([name])
        yield row, expert_nll(inputs.reported, name)


def _mixture_row(inputs: Inputs, system: str, experts: list[str]) -> Row:
    """The row of a mixture of all `experts`."""
    k, flops = inputs.k, inputs.all_train_flops(experts)
    return {
        **{"system": system, "k": k, "top_k": k, "n_active": k, "passes": float(k)},
        "train_flops": flops,
    }


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
            **_mixture_row(inputs, "ensemble", inputs.clusters),
            **setting._asdict(),
            "n_active": setting.top_k,
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
    row = {"system": "oracle", "k": inputs.k, "train_flops": inputs.all_train_flops(inputs.clusters)}
    return row, -ensemble.document_sums(logprob_N, reported.offsets)


def _held_out(documents: Scored, experts: list[str]) -> HeldOut:
    return HeldOut(documents.experts(experts), documents.d2_NK, documents.offsets)


def _uniform(block: HeldOut) -> np.ndarray:
    return ensemble.uniform_log_weights(*block.logprob_NK.shape)


def _posterior(block: HeldOut) -> np.ndarray:
    return ensemble.posterior_log_weights(block.logprob_NK, block.offsets)
