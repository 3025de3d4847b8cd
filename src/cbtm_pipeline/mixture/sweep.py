"""The sweep over settings of the routers: choose on the calibration documents, report on the others.

Shapes: N tokens, D documents, K experts.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.base import cli
from cbtm_pipeline.mixture import ensemble
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting

BLOCK = 1 << 22  # log-probabilities mixed at once: bounds the memory for any amount of held-out text


class Grid(NamedTuple):
    """The values to try, as section route of the config lists them."""

    routers: Sequence[str]
    top_k: Sequence[int]
    temperature: Sequence[float]
    epsilon: Sequence[float]
    beta: Sequence[float]


class Result(NamedTuple):
    """A setting with its nll, in nats."""

    setting: Setting
    calibration_nll: float  # per token of the calibration documents
    nll_D: np.ndarray  # of each reported document


def document_nll(held_out: HeldOut, setting: Setting) -> np.ndarray:
    """Nll of each document under a router's mixture, (D,): the sum over its tokens, in nats."""
    log_weights = ROUTERS[setting.router].log_weights
    return mixture_nll(held_out, lambda block: log_weights(block, setting))


def mixture_nll(held_out: HeldOut, log_weights: Callable[[HeldOut], np.ndarray]) -> np.ndarray:
    """Nll of each document under the mixture with these weights, (D,): the sum over its tokens, in nats."""
    nll = []
    for block in _blocks(held_out):
        logprob_N = ensemble.mix(block.logprob_NK, log_weights(block))
        nll.append(-ensemble.document_sums(logprob_N, block.offsets))
    return np.concatenate(nll)


def _blocks(held_out: HeldOut) -> Iterator[HeldOut]:
    """Cut into blocks of whole documents: at most BLOCK log-probabilities each, or a single document."""
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
    """Return one result for each router x top_k x temperature.

    A top_k above K counts as K, and duplicates are dropped. The router's other parameters get those values of
    the grid that have the lowest nll on the calibration documents.
    """
    n_experts = calibration.d2_NK.shape[1]
    top_ks = dict.fromkeys(min(top_k, n_experts) for top_k in grid.top_k)
    points = list(dict.fromkeys(itertools.product(grid.routers, top_ks, grid.temperature)))
    progress = cli.Progress("sweep", len(points), "settings")
    results = []
    for router, top_k, temperature in points:
        settings = _settings(router, top_k, temperature, grid)
        n_tokens = calibration.offsets[-1]
        nlls = [float(document_nll(calibration, setting).sum() / n_tokens) for setting in settings]
        lowest = nlls.index(min(nlls))
        results.append(Result(settings[lowest], nlls[lowest], document_nll(reported, settings[lowest])))
        progress.add(1, f"{router} top_k {top_k} temperature {temperature:g}")
    return results


def _settings(router: str, top_k: int, temperature: float, grid: Grid) -> list[Setting]:
    """Settings of a router at this top_k and temperature, for all combinations of its other parameters."""
    names = ROUTERS[router].parameters
    combinations = itertools.product(*(getattr(grid, name) for name in names))
    return [
        Setting(router, top_k, temperature, **dict(zip(names, values, strict=True)))
        for values in combinations
    ]


def best(results: Iterable[Result], key: Callable[[Setting], Hashable]) -> list[Setting]:
    """For each value of `key`, the setting with the lowest calibration nll; the first of equals."""
    found: dict[Hashable, Result] = {}
    for result in results:
        group = key(result.setting)
        if group not in found or result.calibration_nll < found[group].calibration_nll:
            found[group] = result
    return [result.setting for result in found.values()]
