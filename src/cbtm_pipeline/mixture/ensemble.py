"""The mixture: router weights and mixed probabilities, from log-probabilities that were scored once.

    p(x_t | x_<t) = sum_j w_j(t) p_j(x_t | x_<t)

Two routers give the weights w. `paper_log_weights` looks at the prefix alone (C-BTM, section 2.3).
`filter_log_weights` also looks at how well each expert predicted the tokens of the prefix. It treats the best
expert as a hidden state that may switch (fixed share, Herbster and Warmuth 1998), and it restarts from the
paper's weights. In both, row t depends on the tokens before t alone: a token never helps to choose its own
weights.

Shapes: N tokens of all documents, one document after the other; D documents; K experts; T positions in the
longest document; M documents that have a token at position t. `logprob_NK` is the natural log-probability of
each token under each expert. `d2_NK` is the squared distance from the prefix before that token to each
centre. Document i is rows `offsets[i]` to `offsets[i + 1]`. Weights are natural logarithms: -inf means that
the expert is not run. Internal arrays have the experts first (`_KN`), so that numpy works along the tokens.
"""

import math

import numpy as np


def paper_log_weights(d2_NK: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """Weights of the paper's router, (N, K) float64.

    They are the softmax of -d2 / temperature over the `top_k` nearest centres; the others are -inf. Among
    equally near centres, the lowest index comes first. An infinite temperature gives equal weights.
    """
    nearness_KN = -np.ascontiguousarray(d2_NK.T, np.float64)
    active_KN = largest(nearness_KN, top_k)
    nearness_KN = (nearness_KN - nearness_KN.max(axis=0)) / temperature
    nearness_KN[~active_KN] = -np.inf
    return (nearness_KN - _log_sum_exp(nearness_KN)).T


def filter_log_weights(
    logprob_NK: np.ndarray,
    d2_NK: np.ndarray,
    offsets: np.ndarray,
    temperature: float,
    epsilon: float,
    beta: float,
    top_k: int,
    hysteresis: float = 1.0,
    fix_after: int | None = None,
) -> np.ndarray:
    """Weights of the filtering router, (N, K) float64.

    It keeps a belief b over the experts. Every token corrects the belief, and a share epsilon of it leaks to
    the paper's weights:

        prior_j(t)  proportional to  exp(-d2_j(t) / temperature)
        w(t)        = (1 - epsilon) b(t) + epsilon prior(t)
        b_j(t + 1)  proportional to  w_j(t) p_j(x_t)^beta          b(0) = prior(0)

    The top_k largest of w(t), renormalised, mix the prediction of token t.

    With top_k < K, only the active experts have seen token t. They divide their total weight among themselves
    in proportion to w_j p_j^beta, and the others keep theirs: the update of specialists (Freund, Schapire,
    Singer and Warmuth 1997). The log-probabilities of inactive experts are not used. epsilon = 1 is the
    paper's router; epsilon = 0 with an infinite temperature and beta = 1 is the Bayes posterior over experts.

    A new active expert has to catch up, so two parameters make the set stay. An active expert is replaced
    only by one that weighs more than `hysteresis` times as much (`_sticky`); 1 chooses anew at each token.
    The set of token `fix_after` stays to the end of the document.
    """
    by_position_N, ends_T = _by_position(offsets)
    prior_NK = paper_log_weights(d2_NK, temperature, d2_NK.shape[1])
    logprior_KN = np.ascontiguousarray(prior_NK.T[:, by_position_N])
    gain_KN = beta * logprob_NK.T[:, by_position_N].astype(np.float64)
    logw_KN = np.empty_like(logprior_KN)
    with np.errstate(divide="ignore"):
        log_stay, log_leak = np.log1p(-epsilon), np.log(epsilon)

    logb_KM = logprior_KN[:, : ends_T[0]] if len(ends_T) else logprior_KN
    active_KM, last_choice = np.zeros(logb_KM.shape, bool), math.inf if fix_after is None else fix_after
    for t, (begin, end) in enumerate(zip([0, *ends_T[:-1]], ends_T, strict=False)):
        belief_KM = _log_add(log_stay + logb_KM[:, : end - begin], log_leak + logprior_KN[:, begin:end])
        active_KM = active_KM[:, : end - begin]
        if t == 0 or (hysteresis == 1 and t <= last_choice):
            active_KM = largest(belief_KM, top_k)
        elif top_k < len(belief_KM) and t <= last_choice:
            active_KM = _sticky(belief_KM, active_KM, math.log(hysteresis))
        mixed_KM = np.where(active_KM, belief_KM, -np.inf)
        log_total_M = _log_sum_exp(mixed_KM)
        mixed_KM -= log_total_M
        logw_KN[:, begin:end] = mixed_KM

        credit_KM = np.where(active_KM, mixed_KM + gain_KN[:, begin:end], -np.inf)
        share_KM = credit_KM - _log_sum_exp(credit_KM)  # exactly 0 for a single active expert: ties stay ties
        logb_KM = np.where(active_KM, share_KM + log_total_M, belief_KM)

    logw_NK = np.empty(d2_NK.shape)
    logw_NK[by_position_N] = logw_KN.T
    return logw_NK


def _by_position(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of the tokens in which all documents advance together, one position at a time.

    The longest document comes first. Then the documents that have a token at position t are the first M of
    those that had one at t - 1, and their rows are contiguous. They end at `ends_T[t]`.
    """
    n_tokens_D = np.diff(offsets)
    order_D = np.argsort(-n_tokens_D, kind="stable")
    position_N = np.arange(offsets[-1]) - np.repeat(offsets[:-1], n_tokens_D)
    rank_N = np.repeat(np.argsort(order_D), n_tokens_D)
    return np.lexsort((rank_N, position_N)), np.cumsum(np.bincount(position_N))


def posterior_log_weights(logprob_NK: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Bayes posterior over the experts given the prefix, from equal priors, (N, K) float64."""
    no_d2_NK = np.zeros(logprob_NK.shape, np.float32)
    n_experts = logprob_NK.shape[1]
    return filter_log_weights(logprob_NK, no_d2_NK, offsets, math.inf, 0.0, 1.0, n_experts)


def uniform_log_weights(n_tokens: int, n_experts: int) -> np.ndarray:
    """Equal weights, (n_tokens, n_experts) float64."""
    return np.full((n_tokens, n_experts), -np.log(n_experts))


def mix(logprob_NK: np.ndarray, logw_NK: np.ndarray) -> np.ndarray:
    """Log-probability of each token under the mixture, (N,) float64. It ignores experts of weight -inf."""
    logw_KN = np.ascontiguousarray(logw_NK.T)
    return _log_sum_exp(np.where(np.isneginf(logw_KN), -np.inf, logw_KN + logprob_NK.T))


def oracle(logprob_NK: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Log-probability of each token under the best single expert of its document, (N,) float64.

    The choice uses the document's own log-probabilities, so no router can make it.
    """
    total_KD = np.stack([document_sums(logprob_N, offsets) for logprob_N in logprob_NK.T])
    best_N = np.repeat(total_KD.argmax(axis=0), np.diff(offsets))
    return logprob_NK[np.arange(len(best_N)), best_N].astype(np.float64)


def passes_per_token(logw_NK: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Expert passes of each document, the sum over its tokens, (D,) float64. Catching up is counted.

    An expert that is active at position t has read the t + 1 tokens before that prediction. So it costs its
    last active position + 1, and nothing if it is never active. The mean over tokens is the sum over
    documents, divided by the number of tokens.
    """
    n_tokens_D = np.diff(offsets)
    position_N = np.arange(offsets[-1]) - np.repeat(offsets[:-1], n_tokens_D)
    read_NK = np.where(np.isneginf(logw_NK), 0, position_N[:, None] + 1)
    passes_D, filled_D = np.zeros(len(n_tokens_D)), n_tokens_D > 0
    if filled_D.any():
        passes_D[filled_D] = np.maximum.reduceat(read_NK, offsets[:-1][filled_D]).sum(axis=1)
    return passes_D


def document_sums(value_N: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of a value over the tokens of each document, (D,) float64."""
    n_documents = len(offsets) - 1
    document_N = np.repeat(np.arange(n_documents), np.diff(offsets))
    return np.bincount(document_N, weights=value_N, minlength=n_documents)


def largest(value_KN: np.ndarray, top_k: int) -> np.ndarray:
    """Mask of the `top_k` largest values of each column. Among equal values, the lowest index comes first."""
    n_experts = len(value_KN)
    if top_k >= n_experts:
        return np.ones(value_KN.shape, bool)
    threshold_N = _threshold(value_KN, top_k)
    mask_KN = value_KN >= threshold_N
    if np.count_nonzero(mask_KN) == top_k * mask_KN.shape[1]:
        return mask_KN
    (ties,) = np.nonzero(mask_KN.sum(axis=0) > top_k)
    above_KN, equal_KN = value_KN[:, ties] > threshold_N[ties], value_KN[:, ties] == threshold_N[ties]
    mask_KN[:, ties] = above_KN | (equal_KN & (equal_KN.cumsum(axis=0) <= top_k - above_KN.sum(axis=0)))
    return mask_KN


def _threshold(value_KN: np.ndarray, top_k: int) -> np.ndarray:
    """The top_k-th largest value of each column, (N,). Passes along the tokens are faster than sorting.

    Groups of 2 or 4 rows are sorted, then merged in pairs: the largest values of two sorted groups a and b
    are max(a_i, b_(width - 1 - i)). A bitonic merge puts them in order again (Batcher 1968).
    """
    n_experts, n_columns = value_KN.shape
    if top_k == 1:
        return value_KN.max(axis=0)
    if top_k > 4:
        return np.partition(value_KN, n_experts - top_k, axis=0)[n_experts - top_k]
    width = 2 if top_k == 2 else 4
    n_groups = 1 << max(0, (n_experts - 1) // width).bit_length()
    if missing := n_groups * width - n_experts:
        value_KN = np.concatenate([value_KN, np.full((missing, n_columns), -np.inf)])
    ranks = list(value_KN.reshape(width, n_groups, n_columns))  # the i-th largest of each group, once sorted
    _swap(ranks, [(0, 1), (2, 3), (0, 2), (1, 3), (1, 2)])
    while (half := len(ranks[0]) // 2) > 0:
        ranks = [np.maximum(a[:half], b[half:]) for a, b in zip(ranks, reversed(ranks), strict=True)]
        _swap(ranks, [(0, 2), (1, 3), (0, 1), (2, 3)])
    return ranks[top_k - 1][0]


def _swap(ranks: list[np.ndarray], pairs: list[tuple[int, int]]) -> None:
    """Put the larger value of each pair first, pair after pair."""
    for i, j in pairs:
        if j < len(ranks):
            ranks[i], ranks[j] = np.maximum(ranks[i], ranks[j]), np.minimum(ranks[i], ranks[j])


def _sticky(value_KM: np.ndarray, active_KM: np.ndarray, margin: float) -> np.ndarray:
    """The active set of each column after swaps, bool (K, M).

    A swap replaces the smallest active value by the largest other one, if that is larger by more than
    `margin`. There are at most as many swaps as active values. Among equals, the lowest index is swapped.
    """
    active_KM, left_M = active_KM.copy(), np.arange(value_KM.shape[1])
    for _ in range(int(active_KM[:, :1].sum())):
        value_KL, active_KL = value_KM[:, left_M], active_KM[:, left_M]
        lightest_L = np.where(active_KL, value_KL, np.inf).argmin(axis=0)
        heaviest_L = np.where(active_KL, -np.inf, value_KL).argmax(axis=0)
        columns_L = np.arange(len(left_M))
        swaps_L = value_KL[heaviest_L, columns_L] > value_KL[lightest_L, columns_L] + margin
        left_M = left_M[swaps_L]
        if not len(left_M):
            break
        active_KM[lightest_L[swaps_L], left_M] = False
        active_KM[heaviest_L[swaps_L], left_M] = True
    return active_KM


def _log_sum_exp(value_KN: np.ndarray) -> np.ndarray:
    """log(sum(exp(value))) of each column, (N,); exact for a single finite value."""
    largest_N = value_KN.max(axis=0)
    return largest_N + np.log(np.exp(value_KN - largest_N).sum(axis=0))


def _log_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """log(exp(a) + exp(b)), several times faster than np.logaddexp. Not both may be -inf."""
    return np.maximum(a, b) + np.log1p(np.exp(-np.abs(a - b)))
