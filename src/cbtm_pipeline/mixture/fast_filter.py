"""The routers `filter` and `paper` without logarithms, for many settings at once: faster than `ensemble`.

It is the recursion of `ensemble.filter_log_weights`, with probabilities in place of their logarithms:

    w(t)        = (1 - epsilon) b(t) + epsilon prior(t)         the top_k largest are active
    b_j(t + 1)  = w_j(t) g_j(t) * (sum of w) / (sum of w g)     sums over the active ones; g = p(x_t)^beta
                = w_j(t)                                        of an expert that is not active

The paper's router is the filter with epsilon = 1. So a token costs a few products for each expert, and a
logarithm once. What settings share is computed once: the prior, g for each beta. The results differ from
those of `ensemble` by rounding alone, as long as no weight falls below the smallest float64 (`Spread.holds`)
and no two experts have the same distances for long (`tied`). Two weights that are equal by chance may make
another expert active.

Shapes as in `ensemble`. All arrays have the experts first and the tokens in the order of their positions.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.mixture import ensemble
from cbtm_pipeline.mixture.routers import HeldOut, Setting

CACHED = 1 << 14  # weights of one position that stay in a CPU's cache
BLOCK = 1 << 22  # weights of one part: bounds the memory
TIES = 8  # tokens: those before the first term of a document have no distances yet
FLOOR = -650.0  # natural logarithm of the smallest weight that is safe


class Spread(NamedTuple):
    """How far apart experts are: the largest difference between two of them at any token."""

    logprob: float  # nats
    d2: float

    @classmethod
    def of(cls, held_out: HeldOut) -> "Spread":
        return cls(*(float(np.ptp(array_NK, axis=1).max(initial=0)) for array_NK in held_out[:2]))

    def holds(self, setting: Setting) -> bool:
        """Whether no weight can vanish: each is at least epsilon * prior, times the gain of a token."""
        if setting.epsilon == 0:
            return False
        smallest = np.log(setting.epsilon or 1) - self.d2 / setting.temperature
        return smallest - 2 * self.logprob * max(setting.beta or 0, 1) > FLOOR


class Prepared(NamedTuple):
    """Documents in the order of positions. `ratio_KN` is p_j(x) over that of the token's best expert."""

    ratio_KN: np.ndarray
    log_ratio_KN: np.ndarray
    best_N: np.ndarray  # log-probability of the best expert, nats
    d2_KN: np.ndarray
    ends_T: np.ndarray  # the documents that have position t are the first ones; their tokens end here
    document_N: np.ndarray  # index of the token's document among these


def tied(held_out: HeldOut) -> np.ndarray:
    """Which documents have many tokens with equal distances to two centres, bool (D,).

    There, weights of experts come so close that rounding decides which ones are active.
    """
    sorted_NK = np.sort(held_out.d2_NK, axis=1)
    tied_N = (np.diff(sorted_NK, axis=1) == 0).any(axis=1)
    return ensemble.document_sums(tied_N, held_out.offsets) > TIES


def parts(held_out: HeldOut, chosen_D: np.ndarray) -> list[np.ndarray]:
    """Indices of the chosen documents in parts, long documents first; those without a token are in none.

    One position of a part fits into a CPU's cache, and a part of more than one document into BLOCK.
    """
    n_experts = held_out.d2_NK.shape[1]
    n_tokens_D = np.diff(held_out.offsets)
    order_D = np.argsort(-n_tokens_D, kind="stable")
    left_D = order_D[(chosen_D & (n_tokens_D > 0))[order_D]]
    found = []
    while len(left_D):
        size = max(1, min(CACHED, BLOCK // int(n_tokens_D[left_D[0]])) // n_experts)
        found.append(left_D[:size])
        left_D = left_D[size:]
    return found


def prepared(held_out: HeldOut, some: np.ndarray) -> Prepared:
    """The documents with these indices, which are sorted by falling length."""
    n_tokens_D = np.diff(held_out.offsets)[some]
    n_at_T = np.searchsorted(-n_tokens_D, -np.arange(n_tokens_D[0]), "left")
    document_N = np.concatenate([np.arange(n) for n in n_at_T.tolist()])
    rows = held_out.offsets[:-1][some][document_N] + np.repeat(np.arange(len(n_at_T)), n_at_T)
    logprob_KN = held_out.logprob_NK[rows].T.astype(np.float64)
    best_N = logprob_KN.max(axis=0)
    log_ratio_KN = logprob_KN - best_N
    d2_KN = np.ascontiguousarray(held_out.d2_NK[rows].T, np.float64)
    return Prepared(np.exp(log_ratio_KN), log_ratio_KN, best_N, d2_KN, np.cumsum(n_at_T), document_N)


def costs(
    part: Prepared, settings: Sequence[Setting], count_passes: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Nll in nats and expert passes of each document of a part under each setting, (D,) both.

    The settings have one temperature. Without `count_passes`, the passes are zero.
    """
    n_experts, n_documents = len(part.d2_KN), part.ends_T[0]
    log_prior_NK = ensemble.paper_log_weights(part.d2_KN.T, settings[0].temperature, n_experts)
    prior_KN = np.exp(log_prior_NK.T)
    betas = dict.fromkeys(s.beta for s in settings)
    gains: dict[float | None, np.ndarray] = {
        beta: np.exp(beta * part.log_ratio_KN) for beta in betas if beta is not None and beta != 1
    }
    for s in settings:
        epsilon = 1.0 if s.epsilon is None else s.epsilon
        last_KD = np.zeros((n_experts, n_documents), np.int32) if count_passes else None
        probability_N = _filtered(part, prior_KN, gains.get(s.beta), epsilon, s.top_k, last_KD)
        logprob_N = np.log(probability_N) + part.best_N
        nll_D = -np.bincount(part.document_N, weights=logprob_N, minlength=n_documents)
        yield nll_D, np.zeros(n_documents) if last_KD is None else last_KD.sum(axis=0, dtype=np.float64)


def _filtered(
    part: Prepared,
    prior_KN: np.ndarray,
    gain_KN: np.ndarray | None,
    epsilon: float,
    top_k: int,
    last_KD: np.ndarray | None,
) -> np.ndarray:
    """Probability of each token under the mixture, over that of the token's best expert, (N,).

    `gain_KN` is `ratio_KN` to the power of beta; None for a beta of 1.
    `last_KD` gets 1 + the last position at which an expert was active in a document.
    """
    n_experts, n_tokens = prior_KN.shape
    mixed_N, total_N = np.empty(n_tokens), np.empty(n_tokens)
    belief_KM = prior_KN[:, : part.ends_T[0]]
    active_KM, weight_KM, credit_KM = (np.empty((n_experts, part.ends_T[0])) for _ in range(3))
    begin = 0
    for t, end in enumerate(part.ends_T.tolist(), 1):
        n = end - begin
        active, weight, credit = active_KM[:, :n], weight_KM[:, :n], credit_KM[:, :n]
        np.multiply(prior_KN[:, begin:end], epsilon, out=active)
        np.multiply(belief_KM[:, :n], 1 - epsilon, out=weight)
        weight += active
        is_active = ensemble.largest(weight, top_k)
        np.multiply(weight, is_active, out=active)
        if last_KD is not None:
            np.copyto(last_KD[:, :n], t, where=is_active)
        total, mixed = total_N[begin:end], mixed_N[begin:end]
        active.sum(axis=0, out=total)
        np.einsum("km,km->m", active, part.ratio_KN[:, begin:end], out=mixed)
        if (
            top_k == 1 or epsilon == 1
        ):  # one expert has nothing to share: rounding would break ties. Or all leaks
            credit[:] = weight
        else:
            np.multiply(active, (part.ratio_KN if gain_KN is None else gain_KN)[:, begin:end], out=credit)
            credit *= total / (mixed if gain_KN is None else credit.sum(axis=0))
            weight -= active
            credit += weight  # an expert that is not active keeps its weight
        belief_KM, credit_KM = credit_KM, belief_KM if begin else np.empty_like(credit_KM)
        begin = end
    return mixed_N / total_N
