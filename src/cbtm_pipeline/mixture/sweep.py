"""The sweep over routers: settings are chosen on the calibration documents, and every setting's result is told on the reported ones.

Shapes: N tokens, D documents, K experts.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base import cli
from cbtm_pipeline.mixture import ensemble

BLOCK = 1 << 22  # log-probabilities that are mixed at once: memory is bounded by this, not by the held-out text


class Setting(NamedTuple):
    """A router and its parameters; `epsilon` and `beta` belong to `filter` alone."""

    router: str
    top_k: int
    temperature: float
    epsilon: float | None = None
    beta: float | None = None


class Part(NamedTuple):
    """Some documents as the mixture sees them: see `ensemble`."""

    logprob_NK: np.ndarray
    d2_NK: np.ndarray
    offsets: np.ndarray


class Result(NamedTuple):
    """A setting, its nll per token on the calibration part, and its nll on each document of the reported part (nats)."""

    setting: Setting
    calibration_nll: float
    nll_D: np.ndarray


def calibration_documents(doc_ids: Iterable[str], share: float, rng_seed: int) -> np.ndarray:
    """Mask of the share of the documents on which settings are chosen, (D,) bool: those with the smallest keyed hash of their id.

    At least one document lies on each side. Raises ValueError when there is only one.
    """
    key = str(rng_seed).encode()
    hashes = [hashlib.blake2b(str(doc_id).encode(), digest_size=16, key=key).digest() for doc_id in doc_ids]
    if len(hashes) < 2:
        raise ValueError(
            f"corpus.eval: {len(hashes)} held-out document. Expected at least 2, one to choose the router's settings on and one to report. "
            "Give more held-out documents or raise corpus.eval_fraction."
        )
    n_calibration = min(max(1, round(share * len(hashes))), len(hashes) - 1)
    mask_D = np.zeros(len(hashes), bool)
    mask_D[sorted(range(len(hashes)), key=lambda i: (hashes[i], i))[:n_calibration]] = True
    return mask_D


def log_weights(part: Part, setting: Setting) -> np.ndarray:
    """The router's log weights, (N, K)."""
    if setting.router == "paper":
        return ensemble.paper_log_weights(part.d2_NK, setting.temperature, setting.top_k)
    assert setting.router == "filter" and setting.epsilon is not None and setting.beta is not None
    return ensemble.filter_log_weights(*part, setting.temperature, setting.epsilon, setting.beta, setting.top_k)


def document_nll(part: Part, setting: Setting) -> np.ndarray:
    """Nll of each document under the mixture, (D,): the sum over its tokens, in nats."""
    nll = [-ensemble.document_sums(ensemble.mix(b.logprob_NK, log_weights(b, setting)), b.offsets) for b in _blocks(part)]
    return np.concatenate(nll)


def _blocks(part: Part) -> Iterator[Part]:
    """The part in runs of whole documents of at most about BLOCK log-probabilities."""
    n_documents = len(part.offsets) - 1
    size = max(1, BLOCK // part.d2_NK.shape[1])
    first = 0
    while first < n_documents:
        last = max(first + 1, int(np.searchsorted(part.offsets, part.offsets[first] + size, side="right")) - 1)
        rows = slice(part.offsets[first], part.offsets[last])
        yield Part(part.logprob_NK[rows], part.d2_NK[rows], part.offsets[first : last + 1] - part.offsets[first])
        first = last


def sweep(calibration: Part, reported: Part, route: dict[str, Any]) -> list[Result]:
    """One result for every router x top_k x temperature of the config's section `route`, duplicates dropped; a top_k above K counts as K.

    The filter's epsilon and beta are those that suit the temperature best on the calibration part.
    """
    n_experts = calibration.d2_NK.shape[1]
    top_ks = dict.fromkeys(min(top_k, n_experts) for top_k in route["top_k"])
    grid = list(dict.fromkeys(itertools.product(route["routers"], top_ks, route["temperature"])))
    progress = cli.Progress("sweep", len(grid), "settings")
    results = []
    for router, top_k, temperature in grid:
        more = [(None, None)] if router == "paper" else list(itertools.product(route["epsilon"], route["beta"]))
        settings = [Setting(router, top_k, temperature, epsilon, beta) for epsilon, beta in more]
        nlls = [float(document_nll(calibration, setting).sum() / calibration.offsets[-1]) for setting in settings]
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
