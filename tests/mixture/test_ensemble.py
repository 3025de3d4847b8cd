"""The mixture against slow literal versions of its formulas, and its properties on random numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.mixture import ensemble

EXAMPLES = settings(max_examples=40, deadline=None)
TOP_KS = [1, 2, 3, 7]


class Case:
    """Random documents: some of one token, some long, distances with ties."""

    def __init__(self, rng_seed: int, n_experts: int):
        rng = np.random.default_rng(rng_seed)
        self.offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 12, rng.integers(1, 6)))])
        shape = (self.offsets[-1], n_experts)
        self.logprob_NK = -rng.gamma(2.0, 2.0, shape).astype(np.float32)
        self.d2_NK = rng.choice([0.1, 0.4, 0.5, 1.3], shape).astype(np.float32)

    def filter(
        self,
        temperature: float = 0.2,
        epsilon: float = 0.05,
        beta: float = 0.8,
        top_k: int = 99,
        hysteresis: float = 1.0,
        fix_after: int | None = None,
        **changed: np.ndarray,
    ) -> np.ndarray:
        arrays = {"logprob_NK": self.logprob_NK, "d2_NK": self.d2_NK, "offsets": self.offsets, **changed}
        return ensemble.filter_log_weights(
            **arrays,
            temperature=temperature,
            epsilon=epsilon,
            beta=beta,
            top_k=top_k,
            hysteresis=hysteresis,
            fix_after=fix_after,
        )


cases = st.builds(Case, st.integers(0, 10_000), st.integers(1, 5))
temperatures = st.sampled_from([0.02, 0.2, 1.0, math.inf])


def literal_prior(d2_K, temperature):
    d2 = [float(value) for value in d2_K]
    nearness = [math.exp(-(value - min(d2)) / temperature) for value in d2]
    return [n / sum(nearness) for n in nearness]


def literal_top(w_K, top_k):
    """Indices of the top_k largest, of equals the lowest index, and the weights renormalised over them."""
    active = sorted(range(len(w_K)), key=lambda j: (-w_K[j], j))[:top_k]
    total = sum(w_K[j] for j in active)
    return active, [w_K[j] / total if j in active else 0.0 for j in range(len(w_K))]


def literal_active(w, top_k, before, t, hysteresis, fix_after):
    """The active set of token t: the largest weights, or those of before but for swaps that are worth it."""
    if t > 0 and fix_after is not None and t > fix_after:
        return before
    if t == 0 or hysteresis == 1:
        return set(literal_top(w, top_k)[0])
    active = set(before)
    for _ in before:
        others = [j for j in range(len(w)) if j not in active]
        lightest = min(sorted(active), key=lambda j: w[j])
        if not others or max(w[j] for j in others) <= hysteresis * w[lightest]:
            break
        active = active - {lightest} | {max(others, key=lambda j: w[j])}
    return active


def literal_filter(case, temperature, epsilon, beta, top_k, hysteresis=1, fix_after=None):
    """The formulas of `filter_log_weights`, one document, one token, one expert at a time."""
    weights = []
    for begin, end in zip(case.offsets, case.offsets[1:], strict=False):
        belief, active = literal_prior(case.d2_NK[begin], temperature), set()
        for n in range(begin, end):
            prior = literal_prior(case.d2_NK[n], temperature)
            w = [(1 - epsilon) * b + epsilon * p for b, p in zip(belief, prior, strict=True)]
            active = literal_active(w, top_k, active, n - begin, hysteresis, fix_after)
            weights.append([w[j] / sum(w[i] for i in active) if j in active else 0.0 for j in range(len(w))])
            credit = {j: w[j] * math.exp(case.logprob_NK[n, j]) ** beta for j in active}
            kept = sum(w[j] for j in active)
            belief = [kept * credit[j] / sum(credit.values()) if j in active else w[j] for j in range(len(w))]
    return np.array(weights)


@EXAMPLES
@given(cases, temperatures, st.sampled_from(TOP_KS))
def test_paper_is_its_formula(case, temperature, top_k):
    # Ties are broken by distance, which is exact, not by weight, which is rounded.
    expected = []
    for d2_K in case.d2_NK:
        active, _ = literal_top([-d for d in d2_K], top_k)
        prior = literal_prior(d2_K, temperature)
        expected.append(
            [prior[j] / sum(prior[i] for i in active) if j in active else 0.0 for j in range(len(d2_K))]
        )
    np.testing.assert_allclose(
        np.exp(ensemble.paper_log_weights(case.d2_NK, temperature, top_k)), expected, atol=1e-12
    )


@EXAMPLES
@given(
    cases,
    temperatures,
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.sampled_from(TOP_KS),
    st.sampled_from([1.0, 1.5, 4.0]),
    st.sampled_from([None, 0, 1, 3]),
)
def test_filter_is_its_formula(case, temperature, epsilon, beta, top_k, hysteresis, fix_after):
    # Distances without ties: the literal version may round two equal beliefs differently.
    case.d2_NK = case.d2_NK + np.random.default_rng(1).uniform(0, 0.01, case.d2_NK.shape)
    if math.isinf(temperature) and top_k < case.d2_NK.shape[1]:
        temperature = 3.0
    settings = (temperature, epsilon, beta, top_k, hysteresis, fix_after)
    expected = literal_filter(case, *settings)
    np.testing.assert_allclose(np.exp(case.filter(*settings)), expected, atol=1e-9)


@EXAMPLES
@given(cases, st.sampled_from(TOP_KS))
def test_filter_takes_the_lowest_index_among_equals(case, top_k):
    case.d2_NK[:] = 0.5
    first = case.filter(top_k=top_k)[case.offsets[:-1]]
    k = first.shape[1]
    expected = np.where(np.arange(k) < top_k, 1 / min(top_k, k), 0.0)
    np.testing.assert_allclose(np.exp(first), np.broadcast_to(expected, first.shape), atol=1e-12)


@EXAMPLES
@given(cases, st.sampled_from(TOP_KS), st.data())
def test_a_token_helps_to_choose_no_weights_but_later_ones(case, top_k, data):
    n = data.draw(st.integers(0, case.offsets[-1] - 1))
    document = int(np.searchsorted(case.offsets, n, side="right")) - 1
    before = case.filter(top_k=top_k)

    logprob_NK, d2_NK = case.logprob_NK.copy(), case.d2_NK.copy()
    logprob_NK[n] = np.random.default_rng(0).normal(-3, 2, logprob_NK.shape[1])
    d2_NK[n + 1 :] += np.random.default_rng(0).uniform(0, 1, d2_NK[n + 1 :].shape).astype(np.float32)
    after = case.filter(top_k=top_k, logprob_NK=logprob_NK, d2_NK=d2_NK)
    assert (after[: n + 1] == before[: n + 1]).all()

    others = np.r_[: case.offsets[document], case.offsets[document + 1] : case.offsets[-1]]
    after = case.filter(top_k=top_k, logprob_NK=logprob_NK)
    assert (after[others] == before[others]).all()
    paper_before = ensemble.paper_log_weights(case.d2_NK, 0.2, top_k)
    assert (ensemble.paper_log_weights(d2_NK, 0.2, top_k)[: n + 1] == paper_before[: n + 1]).all()


def test_a_token_does_change_later_weights():
    case = Case(3, 2)
    offsets = np.array([0, len(case.d2_NK)])
    case.logprob_NK[0] = [-1, -2]
    before = case.filter(offsets=offsets)
    case.logprob_NK[0] = [-2, -1]
    assert (case.filter(offsets=offsets)[1:] != before[1:]).all()


@EXAMPLES
@given(cases, st.integers(1, 8))
def test_the_future_of_a_document_need_not_exist(case, n_kept):
    """Weights while generating are those of the finished document."""
    end = min(n_kept, int(case.offsets[1]))
    alone = case.filter(logprob_NK=case.logprob_NK[:end], d2_NK=case.d2_NK[:end], offsets=np.array([0, end]))
    assert (alone == case.filter()[:end]).all()


@EXAMPLES
@given(st.builds(Case, st.integers(0, 10_000), st.just(1)), temperatures, st.sampled_from([0.0, 0.1, 1.0]))
def test_one_expert_is_itself_exactly(case, temperature, epsilon):
    paper = ensemble.paper_log_weights(case.d2_NK, temperature, 1)
    filtered = case.filter(temperature, epsilon, 1.0, 1)
    for logw_NK in (paper, filtered, ensemble.uniform_log_weights(len(paper), 1)):
        assert (logw_NK == 0).all()
        assert (ensemble.mix(case.logprob_NK, logw_NK) == case.logprob_NK[:, 0]).all()
    assert (ensemble.oracle(case.logprob_NK, case.offsets) == case.logprob_NK[:, 0]).all()


@EXAMPLES
@given(cases, temperatures, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(TOP_KS))
def test_identical_experts_mix_to_the_single_expert(case, temperature, epsilon, top_k):
    case.logprob_NK = np.repeat(case.logprob_NK[:, :1], case.logprob_NK.shape[1], axis=1)
    for logw_NK in (
        ensemble.paper_log_weights(case.d2_NK, temperature, top_k),
        case.filter(temperature, epsilon, 1.0, top_k),
        ensemble.uniform_log_weights(*case.d2_NK.shape),
    ):
        np.testing.assert_allclose(
            ensemble.mix(case.logprob_NK, logw_NK), case.logprob_NK[:, 0], rtol=0, atol=1e-12
        )


@EXAMPLES
@given(cases, temperatures, st.sampled_from(TOP_KS))
def test_epsilon_one_is_the_paper(case, temperature, top_k):
    # Without ties: the filter breaks them by weight, the paper's router by distance.
    case.d2_NK = np.random.default_rng(2).uniform(0, 1, case.d2_NK.shape)
    if math.isinf(temperature) and top_k < case.d2_NK.shape[1]:
        temperature = 3.0
    expected = ensemble.paper_log_weights(case.d2_NK, temperature, top_k)
    np.testing.assert_allclose(case.filter(temperature, 1.0, 1.0, top_k), expected, atol=1e-12)


@EXAMPLES
@given(cases)
def test_epsilon_zero_without_distances_is_the_bayes_posterior(case):
    logw_NK = ensemble.posterior_log_weights(case.logprob_NK, case.offsets)
    np.testing.assert_array_equal(logw_NK, case.filter(math.inf, 0.0, 1.0))
    for begin, end in zip(case.offsets, case.offsets[1:], strict=False):
        seen = np.cumsum(case.logprob_NK[begin:end].astype(np.float64), axis=0)
        seen = np.concatenate([np.zeros((1, seen.shape[1])), seen[:-1]])
        posterior = np.exp(seen - seen.max(axis=1, keepdims=True))
        posterior /= posterior.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(np.exp(logw_NK[begin:end]), posterior, atol=1e-12)


@EXAMPLES
@given(cases, st.sampled_from(TOP_KS), st.sampled_from([0.0, 0.05]))
def test_inactive_experts_are_never_read(case, top_k, epsilon):
    logw_NK = case.filter(epsilon=epsilon, top_k=top_k)
    hidden = np.where(np.isneginf(logw_NK), np.nan, case.logprob_NK)
    np.testing.assert_array_equal(case.filter(epsilon=epsilon, top_k=top_k, logprob_NK=hidden), logw_NK)
    np.testing.assert_array_equal(ensemble.mix(hidden, logw_NK), ensemble.mix(case.logprob_NK, logw_NK))


@EXAMPLES
@given(cases, temperatures, st.sampled_from([0.0, 0.05, 1.0]), st.sampled_from(TOP_KS))
def test_weights_sum_to_one_over_top_k_experts(case, temperature, epsilon, top_k):
    for logw_NK in (
        ensemble.paper_log_weights(case.d2_NK, temperature, top_k),
        case.filter(temperature, epsilon, 1.0, top_k),
    ):
        np.testing.assert_allclose(np.exp(logw_NK).sum(axis=1), 1, atol=1e-12)
        assert (np.isfinite(logw_NK).sum(axis=1) == min(top_k, logw_NK.shape[1])).all()


@EXAMPLES
@given(cases)
def test_paper_from_cold_to_hot(case):
    n, k = case.d2_NK.shape
    case.d2_NK = np.random.default_rng(4).permuted(np.tile(np.linspace(0.1, 1, k), (n, 1)), axis=1)
    top_1 = np.exp(ensemble.paper_log_weights(case.d2_NK, 1.0, 1))
    assert (top_1 == (case.d2_NK == case.d2_NK.min(axis=1, keepdims=True))).all()
    np.testing.assert_allclose(np.exp(ensemble.paper_log_weights(case.d2_NK, 1e-4, k)), top_1, atol=1e-12)
    np.testing.assert_allclose(
        ensemble.paper_log_weights(case.d2_NK, 1e12, k), ensemble.uniform_log_weights(n, k), atol=1e-9
    )
    infinite = ensemble.paper_log_weights(case.d2_NK, math.inf, k)
    assert (infinite == ensemble.paper_log_weights(0 * case.d2_NK, 1.0, k)).all()


@EXAMPLES
@given(cases, st.randoms(use_true_random=False), st.sampled_from(TOP_KS))
def test_the_order_of_the_experts_means_nothing(case, random, top_k):
    case.d2_NK = np.random.default_rng(5).uniform(0, 1, case.d2_NK.shape)
    order = list(range(case.d2_NK.shape[1]))
    random.shuffle(order)
    permuted = case.filter(top_k=top_k, logprob_NK=case.logprob_NK[:, order], d2_NK=case.d2_NK[:, order])
    np.testing.assert_allclose(np.exp(permuted), np.exp(case.filter(top_k=top_k))[:, order], atol=1e-12)
    paper = ensemble.paper_log_weights(case.d2_NK, 0.2, top_k)
    permuted = ensemble.paper_log_weights(case.d2_NK[:, order], 0.2, top_k)
    np.testing.assert_allclose(np.exp(permuted), np.exp(paper)[:, order], atol=1e-12)


@EXAMPLES
@given(cases, st.sampled_from(TOP_KS))
def test_mix_is_the_log_of_the_weighted_mean(case, top_k):
    logw_NK = ensemble.paper_log_weights(case.d2_NK, 0.3, top_k)
    expected = np.log((np.exp(logw_NK) * np.exp(case.logprob_NK.astype(np.float64))).sum(axis=1))
    np.testing.assert_allclose(ensemble.mix(case.logprob_NK, logw_NK), expected, atol=1e-12)


@EXAMPLES
@given(cases)
def test_oracle_is_the_best_single_expert_of_each_document(case):
    best = ensemble.document_sums(ensemble.oracle(case.logprob_NK, case.offsets), case.offsets)
    single_DK = [
        case.logprob_NK[b:e].astype(float).sum(axis=0)
        for b, e in zip(case.offsets, case.offsets[1:], strict=False)
    ]
    np.testing.assert_allclose(best, np.max(single_DK, axis=1), atol=1e-9)


def changes(logw_NK: np.ndarray, offsets: np.ndarray) -> int:
    """How often the active set changes within documents."""
    active_NK = np.isfinite(logw_NK)
    differs_N = (active_NK[1:] != active_NK[:-1]).any(axis=1)
    differs_N[offsets[1:-1] - 1] = False  # from one document to the next
    return int(differs_N.sum())


def test_a_set_with_hysteresis_changes_less_often_and_costs_fewer_passes():
    rng = np.random.default_rng(0)
    case = Case(0, 6)
    case.offsets = np.arange(0, 2001, 100)
    case.logprob_NK = -rng.gamma(2.0, 1.0, (2000, 6)).astype(np.float32)
    case.d2_NK = rng.uniform(0.3, 0.9, (2000, 6)).astype(np.float32)
    for top_k in (1, 2, 4):
        found = [case.filter(top_k=top_k, hysteresis=h) for h in (1, 2, 5, 1e9)]
        n_changes = [changes(logw_NK, case.offsets) for logw_NK in found]
        assert n_changes == sorted(n_changes, reverse=True) and n_changes[0] > 2 * n_changes[2]
        assert n_changes[-1] == 0
        passes = [ensemble.passes_per_token(logw_NK, case.offsets).sum() / 2000 for logw_NK in found]
        assert passes[0] > passes[2] >= passes[3] == top_k
    assert case.filter(top_k=2, fix_after=0).tolist() == case.filter(top_k=2, hysteresis=1e9).tolist()
    fixed = case.filter(top_k=2, fix_after=9)
    assert (fixed.reshape(20, 100, 6)[:, :10] == case.filter(top_k=2).reshape(20, 100, 6)[:, :10]).all()
    active = np.isfinite(fixed.reshape(20, 100, 6))
    assert (active[:, 9:] == active[:, 9:10]).all()


@EXAMPLES
@given(cases, st.sampled_from([1.0, 3.0]), st.sampled_from([None, 0, 2]))
def test_a_set_of_all_experts_has_nothing_to_keep(case, hysteresis, fix_after):
    np.testing.assert_array_equal(case.filter(hysteresis=hysteresis, fix_after=fix_after), case.filter())


@EXAMPLES
@given(cases, st.sampled_from(TOP_KS), st.sampled_from([1.5, 4.0]), st.sampled_from([None, 2]))
def test_what_an_inactive_expert_would_have_said_changes_no_set(case, top_k, hysteresis, fix_after):
    settings = {"top_k": top_k, "hysteresis": hysteresis, "fix_after": fix_after}
    logw_NK = case.filter(**settings)
    hidden = np.where(np.isneginf(logw_NK), np.nan, case.logprob_NK)
    np.testing.assert_array_equal(case.filter(**settings, logprob_NK=hidden), logw_NK)


def test_passes_count_what_a_new_expert_has_to_catch_up():
    active = ["101", "100", "011", "100", "010", "001", "001"]  # documents of 4, 1, 0 and 2 tokens
    logw_NK = np.array([[0.0 if x == "1" else -np.inf for x in tokens] for tokens in active])
    offsets = np.array([0, 4, 5, 5, 7])
    # in the first document, expert 0 reads 4 tokens, experts 1 and 2 read the 3 before their last prediction
    np.testing.assert_array_equal(ensemble.passes_per_token(logw_NK, offsets), [4 + 3 + 3, 1, 0, 2])
    np.testing.assert_array_equal(ensemble.passes_per_token(np.zeros((7, 3)), offsets), [12, 3, 0, 6])
    assert ensemble.passes_per_token(np.empty((0, 3)), np.array([0])).shape == (0,)


def test_a_document_without_tokens_has_no_weights_and_sums_to_zero():
    case = Case(7, 3)
    empty = np.sort(np.concatenate([case.offsets, [0, case.offsets[1], case.offsets[-1]]]))
    np.testing.assert_array_equal(case.filter(offsets=empty), case.filter())
    np.testing.assert_array_equal(ensemble.document_sums(np.ones(3), np.array([0, 0, 2, 2, 3])), [0, 2, 0, 1])
    none = ensemble.filter_log_weights(np.empty((0, 3)), np.empty((0, 3)), np.array([0, 0]), 0.1, 0.1, 1.0, 2)
    assert none.shape == (0, 3)


def test_the_belief_survives_where_probabilities_underflow():
    """One expert is 10 nats better on each of 2 000 tokens, then the other; exp(-20 000) rounds to 0."""
    logprob_NK = np.full((4000, 2), -11.0, np.float32)
    logprob_NK[:2000, 0] = logprob_NK[2000:, 1] = -1
    logw_NK = ensemble.filter_log_weights(
        logprob_NK, np.zeros((4000, 2)), np.array([0, 4000]), math.inf, 0.0, 1.0, 2
    )
    assert logw_NK[2000, 1] == pytest.approx(-20_000)
    assert logw_NK[3000, 1] == pytest.approx(-10_000)


def test_the_filter_follows_a_switch_and_the_posterior_does_not():
    logprob_NK = np.full((200, 2), -4.0, np.float32)
    logprob_NK[:100, 0] = logprob_NK[100:, 1] = -1
    arguments = (logprob_NK, np.zeros((200, 2)), np.array([0, 200]), math.inf)
    follows = ensemble.mix(logprob_NK, ensemble.filter_log_weights(*arguments, 0.01, 1.0, 2))
    sticks = ensemble.mix(logprob_NK, ensemble.filter_log_weights(*arguments, 0.0, 1.0, 2))
    assert follows[110:].mean() > -1.1
    assert sticks[110:150].mean() < -3.9
