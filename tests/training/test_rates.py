"""The choice of a learning rate."""

import math

from hypothesis import given
from hypothesis import strategies as st

from cbtm_pipeline.training import rates
from cbtm_pipeline.training.rates import Validated

LOSS = st.floats(0.1, 10)
MODELS = st.lists(st.tuples(LOSS, st.integers(1, 10**6)), min_size=1, max_size=9)


@given(MODELS)
def test_the_loss_of_a_rate_is_that_of_all_validation_tokens(models: list[tuple[float, int]]) -> None:
    found = rates.mean_loss([Validated(*model) for model in models])
    total = sum(n for _, n in models)
    assert found is not None and math.isclose(found, sum(loss * n for loss, n in models) / total)


@given(MODELS)
def test_a_rate_with_which_one_model_diverges_has_no_loss(models: list[tuple[float, int]]) -> None:
    validated = [Validated(*model) for model in models]
    assert rates.mean_loss([*validated, Validated(None, 5, diverged=True)]) is None
    assert rates.mean_loss([*validated, Validated(None, 0)]) == rates.mean_loss(validated)
    assert rates.mean_loss([Validated(None, 0)]) is None


def test_experts_get_one_rate_together_though_each_prefers_another() -> None:
    losses = {0.1: [(1.0, 10), (3.0, 30)], 0.2: [(2.0, 10), (2.5, 30)]}
    means = {rate: rates.mean_loss([Validated(*one) for one in of_rate]) for rate, of_rate in losses.items()}
    assert means == {0.1: 2.5, 0.2: 2.375} and rates.best(means) == 0.2


@given(st.dictionaries(st.floats(1e-6, 1), st.none() | LOSS, max_size=6))
def test_the_lowest_loss_is_chosen_and_the_smaller_rate_of_equal_ones(
    losses: dict[float, float | None],
) -> None:
    chosen, known = rates.best(losses), {rate: loss for rate, loss in losses.items() if loss is not None}
    assert (chosen is None) == (not known)
    assert chosen is None or chosen == sorted(known, key=lambda rate: (known[rate], rate))[0]
