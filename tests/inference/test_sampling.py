"""Tokens are drawn with the probabilities that temperature and top_p leave."""

from collections import Counter

import pytest
import torch

from cbtm_pipeline.inference import sampling

P = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
N = 20_000


def shares(temperature: float, top_p: float) -> list[float]:
    rows = P.log().expand(N, -1)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sampling.draw(rows, temperature, top_p, [generator] * N))
    return [counts[i] / N for i in range(len(P))]


def test_draws_have_the_given_probabilities() -> None:
    assert shares(1, 1) == pytest.approx(P.tolist(), abs=0.015)
    assert shares(1, 1)[1] == 0


def test_temperature_sharpens() -> None:
    expected = (P**2 / (P**2).sum()).tolist()
    assert shares(0.5, 1) == pytest.approx(expected, abs=0.015)
    assert shares(0, 1) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(("top_p", "n_kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.99, 4)])
def test_top_p_keeps_the_smallest_set_with_that_share(top_p: float, n_kept: int) -> None:
    kept = torch.tensor([0.5, 0.3, 0.15, 0.05])[:n_kept]
    found = shares(1, top_p)
    assert [found[i] for i in (0, 2, 3, 4)][:n_kept] == pytest.approx((kept / kept.sum()).tolist(), abs=0.015)
    assert sum(share > 0 for share in found) == n_kept


def test_answers_have_generators_of_their_own() -> None:
    both = [torch.rand(3, generator=g).tolist() for g in sampling.generators(5, 0, 2)]
    second = torch.rand(3, generator=sampling.generators(5, 1, 1)[0]).tolist()
    assert both[0] != both[1] == second
    assert torch.rand(1, generator=sampling.generators(None, 0, 1)[0]) != torch.rand(
        1, generator=sampling.generators(None, 0, 1)[0]
    )


def test_the_most_probable_come_first() -> None:
    found = sampling.most_probable(P.log(), 10)
    assert [i for i, _ in found] == [0, 2, 3, 4, 1]
    assert found[-1][1] == sampling.LEAST, "JSON has no infinity"
