"""The table of routers, by the names that the config key route.routers takes.

A router weighs the experts at each token. To add one, write a function here and give it an entry in ROUTERS;
docs/extending.md lists the steps. The formulas are in `ensemble`.

Shapes: N tokens of all documents, K experts.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from cbtm_pipeline.mixture import ensemble


class HeldOut(NamedTuple):
    """What a router sees of the held-out documents. Document i is rows `offsets[i]` to `offsets[i + 1]`."""

    logprob_NK: np.ndarray  # log-probability of each token under each expert, nats
    d2_NK: np.ndarray  # squared distance from the prefix before the token to each centre
    offsets: np.ndarray


class Setting(NamedTuple):
    """A router with values for its parameters. A parameter that the router does not have is None."""

    router: str
    top_k: int
    temperature: float
    epsilon: float | None = None
    beta: float | None = None
    hysteresis: float | None = None
    fix_after: int | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Setting":
        """The setting of an ensemble's row of metrics.json."""
        return cls(**{name: row[name] for name in cls._fields})

    @property
    def stays(self) -> bool:
        """Whether its active set stays where it would change with every weight."""
        return (self.hysteresis or 1) > 1 or self.fix_after is not None


class Router(NamedTuple):
    """A router: its function, its parameters, and its colour in the report.

    The function returns natural-log weights, (N, K) float64. Row t may depend on the tokens before t alone. A
    weight of -inf means that the expert is not run for this token.
    """

    log_weights: Callable[[HeldOut, Setting], np.ndarray]
    parameters: tuple[
        Literal["epsilon", "beta"], ...
    ]  # besides top_k and temperature; section route has the values
    colour: Literal["c0", "c1", "c2", "c3", "c4", "c5", "grey"]  # a class of html/report.css
    may_stay: bool = False  # whether it has hysteresis and fix_after, too
    idle_alone: tuple[Literal["epsilon", "beta"], ...] = ()  # parameters without effect at top_k 1
    fast: bool = False  # whether `fast_filter` can evaluate it, too
    in_model: bool = False  # whether inference/modeling_cbtm.py has it, too


def _paper(held_out: HeldOut, setting: Setting) -> np.ndarray:
    return ensemble.paper_log_weights(held_out.d2_NK, setting.temperature, setting.top_k)


def _filter(held_out: HeldOut, setting: Setting) -> np.ndarray:
    assert setting.epsilon is not None and setting.beta is not None
    return ensemble.filter_log_weights(
        *held_out,
        setting.temperature,
        setting.epsilon,
        setting.beta,
        setting.top_k,
        setting.hysteresis or 1.0,
        setting.fix_after,
    )


ROUTERS: dict[str, Router] = {
    "paper": Router(_paper, parameters=(), colour="c1", fast=True, in_model=True),
    "filter": Router(
        _filter,
        parameters=("epsilon", "beta"),
        colour="c0",
        may_stay=True,
        idle_alone=("beta",),  # a single active expert has nothing to share
        fast=True,
        in_model=True,
    ),
}
