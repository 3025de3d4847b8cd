"""Paired bootstrap over documents: how much a ratio of perplexities depends on which documents were held out.

Shapes: S systems, D documents, R resamples.
"""

from typing import Any

import numpy as np

from cbtm_pipeline.corpus.heldout import MIN_REPORTED

CHUNK = 1 << 22  # document counts held in memory at once


def perplexity_ratio(nll_DS: np.ndarray, reference_D: np.ndarray, n_tokens_D: np.ndarray) -> np.ndarray:
    """Perplexity of each system divided by that of the reference, (S,).

    `nll_DS` and `reference_D` are sums over the tokens of each document, in nats. The ratio is exp of the
    difference in nll per token, so every token has the same weight.
    """
    return np.exp((nll_DS - reference_D[:, None]).sum(axis=0) / n_tokens_D.sum())


def ratio_intervals(
    nll_DS: np.ndarray,
    reference_D: np.ndarray,
    n_tokens_D: np.ndarray,
    n_resamples: int,
    rng_seed: int,
    level: float = 0.95,
) -> np.ndarray:
    """Percentile interval of `perplexity_ratio`, (S, 2), from documents drawn with replacement.

    All systems share each resample. Calls with the same D, n_resamples and rng_seed share their resamples,
    too. A system that equals the reference gets exactly [1, 1].
    """
    n_documents = len(n_tokens_D)
    excess_DS = nll_DS - reference_D[:, None]
    equal_D = np.full(n_documents, 1 / n_documents)
    rng = np.random.default_rng(rng_seed)
    log_ratios_RS = []
    for n in _chunks(n_resamples, max(1, CHUNK // n_documents)):
        counts_RD = rng.multinomial(n_documents, equal_D, size=n).astype(np.float64)
        # einsum, not @: the sums of a threaded BLAS depend on the number of threads
        total_RS = np.einsum("rd,ds->rs", counts_RD, excess_DS)
        log_ratios_RS.append(total_RS / np.einsum("rd,d->r", counts_RD, n_tokens_D)[:, None])
    tail = (1 - level) / 2
    return np.exp(np.quantile(np.concatenate(log_ratios_RS), [tail, 1 - tail], axis=0).T)


def estimates(
    nll_DS: np.ndarray, reference_D: np.ndarray, n_tokens_D: np.ndarray, n_resamples: int, rng_seed: int
) -> list[dict[str, Any]]:
    """For each system its `ratio` to the reference and the 95 % interval `ci95`, as metrics.json has them.

    The interval is None for too few documents to resample.
    """
    ratios = perplexity_ratio(nll_DS, reference_D, n_tokens_D).tolist()
    intervals: list[Any] = [None] * len(ratios)
    if len(n_tokens_D) >= MIN_REPORTED:
        intervals = ratio_intervals(nll_DS, reference_D, n_tokens_D, n_resamples, rng_seed).tolist()
    return [{"ratio": ratio, "ci95": ci95} for ratio, ci95 in zip(ratios, intervals, strict=True)]


def _chunks(total: int, size: int) -> list[int]:
    """Parts of at most `size` that add up to `total`."""
    return [min(size, total - begin) for begin in range(0, total, size)]
