"""Nll of the filter under many settings at once, fast: it says which settings are worth an exact evaluation.

It is the recursion of `ensemble.filter_log_weights`, with probabilities in place of their logarithms:

    w(t)        = (1 - epsilon) b(t) + epsilon prior(t)         the top_k largest are active
    b_j(t + 1)  = w_j(t) g_j(t) * (sum of w) / (sum of w g)     sums over the active ones; g = p(x_t)^beta
                = w_j(t)                                        of an expert that is not active

So a token costs a few products for each expert, and a logarithm once. What settings share is computed once:
g for each beta, the prior for each temperature. The results differ from the exact ones by rounding alone,
far less than `sweep.SAME`, as long as no weight falls below the smallest float64 (`holds`) and no two experts
have the same distances for long (`tied`).

Shapes as in `ensemble`. All arrays have the experts first and the tokens in the order of their positions.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.mixture import ensemble
from cbtm_pipeline.mixture.routers import HeldOut, Setting

CACHED = 1 << 14  # weights of one position that stay in a CPU's cache
TIES = 8  # tokens: those before the first term of a document have no distances yet
FLOOR = -650.0  # natural logarithm of the smallest weight that is safe


class Prepared(NamedTuple):
    """Documents in the order of positions. `ratio_KN` is p_j(x) over that of the token's best expert."""

    ratio_KN: np.ndarray
    best: float  # log-probability of the best expert, summed over the tokens, nats
    log_ratio_KN: np.ndarray
    d2_KN: np.ndarray
    ends_T: np.ndarray


def holds(held_out: HeldOut, settings: Iterable[Setting]) -> bool:
    """Whether no weight can vanish under any of the settings, so that `nlls` may be used.

    A weight is at least epsilon * prior, times the gain of one token.
    """
    spread = float(np.ptp(held_out.logprob_NK, axis=1).max(initial=0))
    farthest = float(np.ptp(held_out.d2_NK, axis=1).max(initial=0))
    return all(
        s.epsilon and np.log(s.epsilon) - farthest / s.temperature - 2 * spread * max(s.beta or 0, 1) > FLOOR
        for s in settings
    )


def tied(held_out: HeldOut) -> np.ndarray:
    """Which documents have many tokens with equal distances to two centres, bool (D,).

    There, weights of experts come so close that rounding decides which ones are active.
    """
    sorted_NK = np.sort(held_out.d2_NK, axis=1)
    tied_N = (np.diff(sorted_NK, axis=1) == 0).any(axis=1)
    return ensemble.document_sums(tied_N, held_out.offsets) > TIES


def parts(held_out: HeldOut, chosen_D: np.ndarray) -> list[Prepared]:
    """The chosen documents in parts of which one position fits into a CPU's cache. Long ones come first."""
    n_experts = held_out.d2_NK.shape[1]
    n_tokens_D = np.diff(held_out.offsets)
    order_D = np.argsort(-n_tokens_D, kind="stable")
    order_D = order_D[chosen_D[order_D]]
    size = max(1, CACHED // n_experts)
    found = []
    for first in range(0, len(order_D), size):
        some = order_D[first : first + size]
        some = some[n_tokens_D[some] > 0]
        if len(some):
            found.append(_prepare(held_out, some))
    return found


def _prepare(held_out: HeldOut, some: np.ndarray) -> Prepared:
    """These documents, which are sorted by falling length."""
    n_tokens_D = np.diff(held_out.offsets)[some]
    n_at_T = np.searchsorted(-n_tokens_D, -np.arange(n_tokens_D[0]), "left")
    starts_D = held_out.offsets[:-1][some]
    rows = np.concatenate([starts_D[:n] + t for t, n in enumerate(n_at_T.tolist())])
    logprob_KN = held_out.logprob_NK[rows].T.astype(np.float64)
    best_N = logprob_KN.max(axis=0)
    log_ratio_KN = logprob_KN - best_N
    d2_KN = np.ascontiguousarray(held_out.d2_NK[rows].T, np.float64)
    return Prepared(np.exp(log_ratio_KN), float(best_N.sum()), log_ratio_KN, d2_KN, np.cumsum(n_at_T))


def nlls(part: Prepared, settings: Sequence[Setting]) -> np.ndarray:
    """The nll of all tokens of a part under each setting of the filter, (number of settings,), nats."""
    priors: Mapping[float, np.ndarray] = {
        temperature: np.exp(ensemble.paper_log_weights(part.d2_KN.T, temperature, len(part.d2_KN)).T)
        for temperature in dict.fromkeys(setting.temperature for setting in settings)
    }
    gains = {
        beta: part.ratio_KN if beta == 1 else np.exp(beta * part.log_ratio_KN)
        for beta in dict.fromkeys(setting.beta for setting in settings)
        if beta is not None
    }
    found = []
    for s in settings:
        assert s.epsilon is not None and s.beta is not None
        found.append(_nll(part, priors[s.temperature], gains[s.beta], s.epsilon, s.top_k))
    return np.array(found)


def _nll(part: Prepared, prior_KN: np.ndarray, gain_KN: np.ndarray, epsilon: float, top_k: int) -> float:
    """The nll of all tokens of a part under one setting."""
    n_experts, n_tokens = prior_KN.shape
    mixed_N, total_N = np.empty(n_tokens), np.empty(n_tokens)
    belief_KM = prior_KN[:, : part.ends_T[0]]
    leak_KM, weight_KM, credit_KM = (np.empty((n_experts, part.ends_T[0])) for _ in range(3))
    begin = 0
    for end in part.ends_T.tolist():
        n = end - begin
        leak, weight, credit = leak_KM[:, :n], weight_KM[:, :n], credit_KM[:, :n]
        np.multiply(prior_KN[:, begin:end], epsilon, out=leak)
        np.multiply(belief_KM[:, :n], 1 - epsilon, out=weight)
        weight += leak
        active = weight
        if top_k < n_experts:
            active = np.multiply(weight, ensemble.largest(weight, top_k), out=leak)
        total, mixed = total_N[begin:end], mixed_N[begin:end]
        active.sum(axis=0, out=total)
        np.einsum("km,km->m", active, part.ratio_KN[:, begin:end], out=mixed)
        if top_k == 1:  # a single expert has nothing to share, and rounding would break ties
            credit[:] = weight
        else:
            np.multiply(active, gain_KN[:, begin:end], out=credit)
            credit *= total / credit.sum(axis=0)
            if top_k < n_experts:
                weight -= active
                credit += weight  # an expert that is not active keeps its weight
        belief_KM, credit_KM = credit_KM, belief_KM if begin else np.empty_like(credit_KM)
        begin = end
    return -float(np.log(mixed_N / total_N).sum()) - part.best
