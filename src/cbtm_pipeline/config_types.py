"""The types of numbers in the config, and of learning rates."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    """Take `2e-4` as a number, which YAML 1.1 reads as text."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


def as_list(value: Any) -> Any:
    """The value itself if it is a list, else a list of it."""
    return value if isinstance(value, list) else [value]


Float = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Float, Field(ge=0, le=1)]
Positive = Annotated[Float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _differ(values: list[float]) -> list[float] | float:
    """Refuse a rate that stands twice. A list of one rate is that rate."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("rates", "Input should be rates that differ")
    return values if len(values) > 1 else values[0]


# The names of the tags are left out of messages (config._explain).
Rates = Annotated[
    Annotated[Positive, Tag("constrained-rate")]
    | Annotated[list[Positive], Field(min_length=1), AfterValidator(_differ), Tag("list[rate]")],
    Discriminator(lambda value: "list[rate]" if isinstance(value, list) else "constrained-rate"),
]
