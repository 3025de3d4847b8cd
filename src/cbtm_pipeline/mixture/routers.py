"""The table of routers: what weighs the experts at each token, by the name that route.routers gives.

docs/extending.md says in eight lines how to add one. The formulas are in `ensemble`.

Shapes: N tokens, K experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.mixture import ensemble


class HeldOut(NamedTuple):
    """Held-out documents as a router sees them; the shapes are those of `ensemble`.

    Document i is rows `offsets[i]` to `offsets[i + 1]`.
    """

    logprob_NK: np.ndarray
    d2_NK: np.ndarray
    offsets: np.ndarray


class Setting(NamedTuple):
    """A router and its parameters; one that the router does not have is None."""

    router: str
    top_k: int
    temperature: float
    epsilon: float | None = None
    beta: float | None = None


class Router(NamedTuple):
    """`log_weights` gives (N, K) float64: row t from the tokens before t alone, -inf for an expert that is not run.

    `parameters` names those of epsilon and beta that the router has: the sweep tries the values of section route.
    `colour` is a class of the report's style sheet.
    """

    log_weights: Callable[[HeldOut, Setting], np.ndarray]
    parameters: tuple[str, ...]
    colour: str


def _paper(held_out: HeldOut, setting: Setting) -> np.ndarray:
    return ensemble.paper_log_weights(held_out.d2_NK, setting.temperature, setting.top_k)


def _filter(held_out: HeldOut, setting: Setting) -> np.ndarray:
    assert setting.epsilon is not None and setting.beta is not None
    return ensemble.filter_log_weights(
        *held_out, setting.temperature, setting.epsilon, setting.beta, setting.top_k
    )


ROUTERS: dict[str, Router] = {
    "paper": Router(_paper, parameters=(), colour="c1"),
    "filter": Router(_filter, parameters=("epsilon", "beta"), colour="c0"),
}
