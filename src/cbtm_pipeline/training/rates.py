"""The choice of a learning rate by the validation losses of its candidates."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Validated(NamedTuple):
    """A candidate's validation loss, nats per token, and how many validation tokens its model has.

    The loss is None where the training diverged, or has no validation tokens.
    """

    loss: float | None
    n_tokens: int
    diverged: bool = False


def mean_loss(candidates: Sequence[Validated]) -> float | None:
    """The loss over all validation tokens of the models of a kind, which were trained with one rate.

    A model without validation tokens does not count. None if a model diverged, or if no model counts.
    """
    counted = [one for one in candidates if one.n_tokens and one.loss is not None]
    if not counted or any(one.diverged for one in candidates):
        return None
    total = math.fsum(one.n_tokens for one in counted)
    return math.fsum(one.n_tokens * (one.loss or 0.0) for one in counted) / total


def best(losses: Mapping[float, float | None]) -> float | None:
    """The rate with the lowest loss, the smaller one of two that are equal. None if no rate has a loss."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: (known[rate], rate), default=None)
