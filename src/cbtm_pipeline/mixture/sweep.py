"""The sweep over settings of the routers: choose on the calibration documents, report on the others.

Shapes: N tokens, D documents, K experts.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from cbtm_pipeline.base import cli, parallel
from cbtm_pipeline.mixture import ensemble, fast_filter
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting

BLOCK = 1 << 22  # log-probabilities mixed at once: bounds the memory for any amount of held-out text
SLACK = math.log(1.01)  # nats per token: a set that stays may cost 1 % of the perplexity

A = TypeVar("A")


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
    with ThreadPoolExecutor(n_threads) as pool:
        settings = {
            group: [_settings(*group, temperature, grid) for temperature in temperatures] for group in groups
        }
        every = [setting for group in groups for some in settings[group] for setting in some]
        tried = _Evaluation(calibration, pool, n_threads, "tried").nlls(every)
        chosen: dict[Setting, float] = {}
        for group in groups:
            for some in settings[group]:
                best = min(some, key=lambda setting: tried[setting])
                chosen[best] = tried[best]
            if ROUTERS[group[0]].may_stay and group[1] < n_experts:
                of_group = {setting: tried[setting] for some in settings[group] for setting in some}
                chosen |= _staying(calibration, of_group, grid, pool)
        costs = _Evaluation(reported, pool, n_threads, "reported").costs(list(chosen))
    n_tokens = max(reported.offsets[-1], 1)
    return [
        Result(setting, nll, costs[setting].nll_D, float(costs[setting].passes_D.sum() / n_tokens))
        for setting, nll in chosen.items()
    ]


class _Evaluation:
    """Held-out documents, and what settings cost on them: fast where `fast_filter` can evaluate them."""

    def __init__(self, held_out: HeldOut, pool: Executor, n_threads: int, what: str):
        self.held_out, self.pool, self.n_threads, self.what = held_out, pool, n_threads, what
        self.spread = fast_filter.Spread.of(held_out)
        tied_D = fast_filter.tied(held_out)
        self.parts = fast_filter.parts(held_out, ~tied_D)
        self.tied_D = np.flatnonzero(tied_D)
        self.tied = held_out if tied_D.all() else _documents(held_out, self.tied_D)

    def nlls(self, settings: Sequence[Setting]) -> dict[Setting, float]:
        """The nll of each setting, per token."""
        nlls = dict.fromkeys(settings, 0.0)
        for _, setting, nll in self._evaluated(settings, lambda costs: float(costs.nll_D.sum()), False):
            nlls[setting] += nll
        return {setting: nll / max(self.held_out.offsets[-1], 1) for setting, nll in nlls.items()}

    def costs(self, settings: Sequence[Setting]) -> dict[Setting, Costs]:
        """The costs of each document under each setting."""
        n_documents = len(self.held_out.offsets) - 1
        costs = {setting: Costs(np.zeros(n_documents), np.zeros(n_documents)) for setting in settings}
        for some, setting, found in self._evaluated(settings, lambda costs: costs, True):
            costs[setting].nll_D[some], costs[setting].passes_D[some] = found
        return costs

    def _evaluated(
        self, settings: Sequence[Setting], kept: Callable[[Costs], A], count_passes: bool
    ) -> Iterator[tuple[np.ndarray, Setting, A]]:
        """Indices of documents, a setting, and what is kept of its costs there, for every such pair."""

        def fast(some: np.ndarray, settings: Sequence[Setting]) -> list[A]:
            part = fast_filter.prepared(self.held_out, some)
            return [kept(Costs(*costs)) for costs in fast_filter.costs(part, settings, count_passes)]

        def exact(documents: HeldOut, setting: Setting) -> list[A]:
            return [kept(document_costs(documents, setting))]

        are_fast = {s: ROUTERS[s.router].fast and not s.stays and self.spread.holds(s) for s in settings}
        tasks: list[tuple[Callable[[], list[A]], np.ndarray, list[Setting]]] = []
        for temperature in dict.fromkeys(setting.temperature for setting in settings):
            some = [s for s in settings if s.temperature == temperature and are_fast[s]]
            tasks += [(partial(fast, part, some), part, some) for part in self.parts if some]
            tasks += [(partial(exact, self.tied, s), self.tied_D, [s]) for s in some if len(self.tied_D)]
        every = np.arange(len(self.held_out.offsets) - 1)
        tasks += [(partial(exact, self.held_out, s), every, [s]) for s in settings if not are_fast[s]]
        progress = cli.Progress(f"settings {self.what}", len(tasks), "parts")
        work = parallel.in_order(self.pool, lambda task: task[0](), tasks, self.n_threads)
        for (_, some, of_task), found in zip(tasks, work, strict=True):
            yield from ((some, setting, result) for setting, result in zip(of_task, found, strict=True))
            progress.add(1)


def _documents(held_out: HeldOut, some: np.ndarray) -> HeldOut:
    """The documents with these indices."""
    n_tokens_D = np.diff(held_out.offsets)[some]
    offsets = np.concatenate([[0], np.cumsum(n_tokens_D)])
    rows = np.arange(offsets[-1]) + np.repeat(held_out.offsets[:-1][some] - offsets[:-1], n_tokens_D)
    return HeldOut(held_out.logprob_NK[rows], held_out.d2_NK[rows], offsets)


def _staying(
    calibration: HeldOut, tried: dict[Setting, float], grid: Grid, pool: Executor
) -> Iterator[tuple[Setting, float]]:
    """Settings of a router and a top_k whose active set stays, with their calibration nll.

    First the one with hysteresis: the fewest passes among those at most SLACK above the best of `tried`; none
    if there is none. Then the one with fix_after: the lowest nll. To save time, both start from settings of
    `tried` that are at most SLACK above the best themselves, and a setting's hysteresis grows as long as it
    stays there: a set that stays hardly ever gains.
    """
    n_tokens, limit = calibration.offsets[-1], min(tried.values()) + SLACK
    near = [setting for setting, nll in tried.items() if nll <= limit]

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

    def nll_of(setting: Setting) -> float:
        return float(document_nll(calibration, setting).sum() / n_tokens)

    sticky = [found for some in pool.map(sticky_from, near) for found in some]
    if sticky:
        _, nll, setting = min(sticky, key=lambda found: found[:2])
        yield setting, nll
    fixed = [s._replace(fix_after=n) for s in near for n in dict.fromkeys(grid.fix_after)]
    if fixed:
        found = list(pool.map(nll_of, fixed))
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
