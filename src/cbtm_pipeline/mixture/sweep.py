"""The sweep over routers. Settings are chosen on the calibration documents, and scored on the reported ones.

Shapes: N tokens, D documents, K experts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base import cli
from cbtm_pipeline.mixture import ensemble
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting

BLOCK = (
    1 << 22
)  # log-probabilities that are mixed at once; bounds the memory, whatever the size of the held-out text


class Grid(NamedTuple):
    """The values that are tried, as section route lists them."""

    routers: Sequence[str]
    top_k: Sequence[int]
    temperature: Sequence[float]
    epsilon: Sequence[float]
    beta: Sequence[float]


class Result(NamedTuple):
    """A setting, its nll per token on the calibration documents, and its nll on each reported document (nats)."""

    setting: Setting
    calibration_nll: float
    nll_D: np.ndarray


def document_nll(held_out: HeldOut, setting: Setting) -> np.ndarray:
    """Nll of each document under the mixture, (D,): the sum over its tokens, in nats."""
    log_weights = ROUTERS[setting.router].log_weights
    nll = []
    for block in _blocks(held_out):
        logprob_N = ensemble.mix(block.logprob_NK, log_weights(block, setting))
        nll.append(-ensemble.document_sums(logprob_N, block.offsets))
    return np.concatenate(nll)


def _blocks(held_out: HeldOut) -> Iterator[HeldOut]:
    """The documents in runs of at most about BLOCK log-probabilities; a document is never split."""
    n_documents = len(held_out.offsets) - 1
    size = max(1, BLOCK // held_out.d2_NK.shape[1])
    first = 0
    while first < n_documents:
        after = int(np.searchsorted(held_out.offsets, held_out.offsets[first] + size, side="right")) - 1
        last = max(first + 1, after)
        rows = slice(held_out.offsets[first], held_out.offsets[last])
        offsets = held_out.offsets[first : last + 1] - held_out.offsets[first]
        yield HeldOut(held_out.logprob_NK[rows], held_out.d2_NK[rows], offsets)
        first = last


def sweep(calibration: HeldOut, reported: HeldOut, grid: Grid) -> list[Result]:
    """One result for every router x top_k x temperature; a top_k above K counts as K, and duplicates are dropped.

    A router's further parameters are those that suit the temperature best on the calibration documents.
    """
    n_experts = calibration.d2_NK.shape[1]
    top_ks = dict.fromkeys(min(top_k, n_experts) for top_k in grid.top_k)
    points = list(dict.fromkeys(itertools.product(grid.routers, top_ks, grid.temperature)))
    progress = cli.Progress("sweep", len(points), "settings")
    results = []
    for router, top_k, temperature in points:
        names = ROUTERS[router].parameters
        values = itertools.product(*(getattr(grid, name) for name in names))
        settings = [
            Setting(router, top_k, temperature, **dict(zip(names, of_setting, strict=True)))
            for of_setting in values
        ]
        nlls = [
            float(document_nll(calibration, setting).sum() / calibration.offsets[-1]) for setting in settings
        ]
        lowest = nlls.index(min(nlls))
        results.append(Result(settings[lowest], nlls[lowest], document_nll(reported, settings[lowest])))
        progress.add(1, f"{router} top_k {top_k} temperature {temperature:g}")
    return results


def best(results: Iterable[Result], key: Callable[[Setting], Any]) -> list[Setting]:
    """For each value of `key`, the setting of lowest calibration nll; the first of equals."""
    found: dict[Any, Result] = {}
    for result in results:
        group = key(result.setting)
        if group not in found or result.calibration_nll < found[group].calibration_nll:
            found[group] = result
    return [result.setting for result in found.values()]
