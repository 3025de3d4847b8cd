"""The sweep over settings of the routers: choose on the calibration documents, report on the others.

Shapes: N tokens, D documents, K experts.
"""

import itertools
import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.base import cli, parallel
from cbtm_pipeline.mixture import ensemble, screen
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting

BLOCK = 1 << 22  # log-probabilities mixed at once: bounds the memory for any amount of held-out text
SAME = 1e-7  # nats per token: far more than rounding changes, far less than settings differ
SLACK = math.log(1.01)  # nats per token: a set that stays may cost 1 % of the perplexity


class Grid(NamedTuple):
    """The values to try, as section route of the config lists them."""

    routers: Sequence[str]
    top_k: Sequence[int]
    temperature: Sequence[float]
    epsilon: Sequence[float]
    beta: Sequence[float]
    hysteresis: Sequence[float] = ()  # values above 1 are tried besides 1
    fix_after: Sequence[int] = ()


class Costs(NamedTuple):
    """What each document costs under a mixture, (D,): the sums over its tokens."""

    nll_D: np.ndarray  # nats
    passes_D: np.ndarray  # expert passes


class Result(NamedTuple):
    """A setting with its nll, in nats, and its expert passes."""

    setting: Setting
    calibration_nll: float  # per token of the calibration documents
    nll_D: np.ndarray  # of each reported document
    passes: float  # per token of the reported documents


def document_costs(held_out: HeldOut, setting: Setting) -> Costs:
    """Nll and expert passes of each document under a router's mixture."""
    nll, passes = [], []
    for block in blocks(held_out):
        logw_NK = ROUTERS[setting.router].log_weights(block, setting)
        nll.append(-ensemble.document_sums(ensemble.mix(block.logprob_NK, logw_NK), block.offsets))
        passes.append(ensemble.passes_per_token(logw_NK, block.offsets))
    return Costs(np.concatenate(nll), np.concatenate(passes))


def document_nll(held_out: HeldOut, setting: Setting) -> np.ndarray:
    """Nll of each document under a router's mixture, (D,): the sum over its tokens, in nats."""
    log_weights = ROUTERS[setting.router].log_weights
    return mixture_nll(held_out, lambda block: log_weights(block, setting))


def mixture_nll(held_out: HeldOut, log_weights: Callable[[HeldOut], np.ndarray]) -> np.ndarray:
    """Nll of each document under the mixture with these weights, (D,): the sum over its tokens, in nats."""
    nll = []
    for block in blocks(held_out):
        logprob_N = ensemble.mix(block.logprob_NK, log_weights(block))
        nll.append(-ensemble.document_sums(logprob_N, block.offsets))
    return np.concatenate(nll)


def blocks(held_out: HeldOut) -> Iterator[HeldOut]:
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


def sweep(calibration: HeldOut, reported: HeldOut, grid: Grid, n_threads: int = 1) -> list[Result]:
    """Return one result for each router x top_k x temperature, and those of sets that stay (`_staying`).

    A top_k above K counts as K, and duplicates are dropped. The router's other parameters get those values of
    the grid that have the lowest nll on the calibration documents. The number of threads changes no bit.
    """
    n_experts = calibration.d2_NK.shape[1]
    top_ks = dict.fromkeys(min(top_k, n_experts) for top_k in grid.top_k)
    groups = list(dict.fromkeys(itertools.product(grid.routers, top_ks)))
    temperatures = list(dict.fromkeys(grid.temperature))
    progress = cli.Progress("sweep", len(groups) * len(temperatures), "settings")
    nlls = _Nlls(calibration)

    def choose(router: str, top_k: int, temperature: float) -> tuple[Result, dict[Setting, float]]:
        """The best setting at this temperature, and the nll of all that were tried."""
        tried = nlls.of(_settings(router, top_k, temperature, grid))
        best = min(tried, key=lambda setting: tried[setting])
        found = _result(reported, best, tried[best])
        progress.add(1, f"{router} top_k {top_k} temperature {temperature:g}")
        return found, tried

    results = []
    with ThreadPoolExecutor(n_threads) as pool:
        points = [(*group, temperature) for group in groups for temperature in temperatures]
        chosen = parallel.in_order(pool, lambda point: choose(*point), points, n_threads)
        for router, top_k in groups:
            tried: dict[Setting, float] = {}
            for result, some in itertools.islice(chosen, len(temperatures)):
                results.append(result)
                tried |= some
            if ROUTERS[router].may_stay and top_k < n_experts:
                staying = _staying(calibration, nlls, tried, grid, pool)
                results += [_result(reported, *found) for found in staying]
    return results


class _Nlls:
    """The nll of settings on the calibration documents, per token."""

    def __init__(self, calibration: HeldOut):
        self.calibration = calibration
        self.n_tokens = int(calibration.offsets[-1])
        self.lock = threading.Lock()

    @cached_property
    def parts(self) -> tuple[list[screen.Prepared], HeldOut]:
        """The documents that can be screened, and the others."""
        tied_D = screen.tied(self.calibration)
        return screen.parts(self.calibration, ~tied_D), _documents(self.calibration, np.flatnonzero(tied_D))

    def of(self, settings: Sequence[Setting]) -> dict[Setting, float]:
        """The nll of each setting: exact for the lowest ones, for others perhaps up to rounding alone."""
        router = ROUTERS[settings[0].router]
        if not router.screened or len(settings) == 1 or not screen.holds(self.calibration, settings):
            return {setting: self.exact(setting) for setting in settings}
        with self.lock:  # two threads would prepare the documents twice
            parts, others = self.parts
        nlls = np.zeros(len(settings))
        if others.offsets[-1]:
            nlls += [document_nll(others, setting).sum() for setting in settings]
        nlls = sum((screen.nlls(part, settings) for part in parts), nlls) / self.n_tokens
        lowest = nlls.min() + SAME
        return {
            setting: self.exact(setting) if nll <= lowest else nll
            for setting, nll in zip(settings, nlls.tolist(), strict=True)
        }

    def exact(self, setting: Setting) -> float:
        return float(document_nll(self.calibration, setting).sum() / self.n_tokens)


def _documents(held_out: HeldOut, some: np.ndarray) -> HeldOut:
    """The documents with these indices."""
    n_tokens_D = np.diff(held_out.offsets)[some]
    offsets = np.concatenate([[0], np.cumsum(n_tokens_D)])
    rows = np.arange(offsets[-1]) + np.repeat(held_out.offsets[:-1][some] - offsets[:-1], n_tokens_D)
    return HeldOut(held_out.logprob_NK[rows], held_out.d2_NK[rows], offsets)


def _result(reported: HeldOut, setting: Setting, calibration_nll: float) -> Result:
    nll_D, passes_D = document_costs(reported, setting)
    return Result(setting, calibration_nll, nll_D, float(passes_D.sum() / max(reported.offsets[-1], 1)))


def _staying(
    calibration: HeldOut, nlls: _Nlls, tried: dict[Setting, float], grid: Grid, pool: Executor
) -> Iterator[tuple[Setting, float]]:
    """Settings of a router and a top_k whose active set stays, with their calibration nll.

    First the one with hysteresis: the fewest passes among those at most SLACK above the best of `tried`; none
    if there is none. Then the one with fix_after: the lowest nll. To save time, both start from settings of
    `tried` that are at most SLACK above the best themselves, and a setting's hysteresis grows as long as it
    stays there: a set that stays hardly ever gains.
    """
    n_tokens, limit = calibration.offsets[-1], min(tried.values()) + SLACK
    near = [
        setting
        for setting, nll in tried.items()
        if (nlls.exact(setting) if abs(nll - limit) <= SAME else nll) <= limit
    ]

    def sticky_from(start: Setting) -> list[tuple[float, float, Setting]]:
        found = []
        for hysteresis in sorted({value for value in grid.hysteresis if value > 1}):
            setting = start._replace(hysteresis=hysteresis)
            costs = document_costs(calibration, setting)
            nll = float(costs.nll_D.sum() / n_tokens)
            if nll > limit:
                break
            found.append((float(costs.passes_D.sum()), nll, setting))
        return found

    sticky = [found for some in pool.map(sticky_from, near) for found in some]
    if sticky:
        _, nll, setting = min(sticky, key=lambda found: found[:2])
        yield setting, nll
    fixed = [s._replace(fix_after=n) for s in near for n in dict.fromkeys(grid.fix_after)]
    if fixed:
        found = list(pool.map(nlls.exact, fixed))
        yield fixed[found.index(min(found))], min(found)


def _settings(router: str, top_k: int, temperature: float, grid: Grid) -> list[Setting]:
    """Settings of a router at this top_k and temperature, for all combinations of its other parameters.

    A parameter without effect gets its first value.
    """
    names, idle = ROUTERS[router].parameters, ROUTERS[router].idle_alone if top_k == 1 else ()
    combinations = itertools.product(*(getattr(grid, name)[: 1 if name in idle else None] for name in names))
    hysteresis = 1.0 if ROUTERS[router].may_stay else None
    return [
        Setting(router, top_k, temperature, **dict(zip(names, values, strict=True)), hysteresis=hysteresis)
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
