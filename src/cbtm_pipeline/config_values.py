"""The kinds of values that keys of the config take. Each refuses what cannot be meant, in one line.

`config` names a kind for each key.
"""

import math
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from cbtm_pipeline.config_errors import refuse, show
from cbtm_pipeline.mixture.routers import ROUTERS


def _number(value: Any) -> Any:
    """Take `2e-4` as a number, which YAML 1.1 reads as text."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


def as_list(value: Any) -> Any:
    """One value as a list of one."""
    return value if isinstance(value, list) else [value]


LARGEST = 2**63 - 1  # whole numbers of Arrow, torch and JSON
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]  # finite, whatever the key
Share = Annotated[Float, Field(ge=0, le=1)]
Positive = Annotated[Float, Field(gt=0)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]


def _differ(values: list[float]) -> list[float] | float:
    """Refuse a rate that stands twice. A list of one rate is that rate."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("rates", "Input should be rates that differ")
    return values if len(values) > 1 else values[0]


# A learning rate, or several to search. The names of the tags are left out of messages (config_errors).
Rates = Annotated[
    Annotated[Positive, Tag("constrained-rate")]
    | Annotated[list[Positive], Field(min_length=1), AfterValidator(_differ), Tag("list[rate]")],
    Discriminator(lambda value: "list[rate]" if isinstance(value, list) else "constrained-rate"),
]

TAG_KEY = r"[^\s=:]+"
OF_EXPERTS = "experts"  # the key of section tags that holds the tags of single experts
Name = Annotated[str, Field(pattern=r"\S")]  # a revision on the hub, or a name
Source = Annotated[Name, AfterValidator(os.path.expanduser)]  # a folder, a file or a name
Paths = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


def _router(name: str) -> str:
    """Refuse a name that is not in the table of routers."""
    if name not in ROUTERS:
        names = " or ".join(map(repr, ROUTERS))
        raise PydanticCustomError("router", "Input should be {names}", {"names": names})
    return name


RouterName = Annotated[str, AfterValidator(_router)]


def outdir(name: str) -> str:
    """The name of the folder of all outputs, with the user's home for `~`.

    Refuses names that Snakemake takes for patterns of names, and those of no folder for a run.
    """
    expected = None
    path = os.path.expanduser(name)  # noqa: PTH111 (as it is written: "./a" stays "./a")
    if not name.strip() or os.path.abspath(path) in ("/", "//"):  # noqa: PTH100
        expected = "a folder of its own, such as results"
    elif path.startswith("~"):
        expected = "a folder, and ~ only for the home of a user of this machine"
    elif not path.isprintable() or set(path) & set("{}<>"):
        expected = "printable characters, and none of { } < >, which Snakemake replaces"
    elif "://" in path:
        expected = "a folder of this machine"
    if expected:
        refuse("outdir", name, expected)
    return path


def scratch(given: dict[str, Any]) -> dict[str, Any]:
    """Section model.scratch as it comes back from JSON, in which the config is written for the jobs.

    Keys become text. Refuses values that JSON does not have.
    """
    return _as_json("model.scratch", given)


def _as_json(where: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_json(f"{where}.{key}", inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_json(f"{where}.{number}", inner) for number, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        refuse(where, value, "a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        refuse(where, value, f"a whole number up to {LARGEST}")
    if value is not None and not isinstance(value, str | int | float):
        refuse(where, value, "text, a number, true, false, null, a list or a section")
    return value


def tags(given: dict[str, Any]) -> dict[str, Any]:
    """Refuse values that are no names. `experts` has the tags of single experts; their names become text."""
    own = given.get(OF_EXPERTS, {})
    if not isinstance(own, dict) or not all(isinstance(some, dict) for some in own.values()):
        refuse(f"tags.{OF_EXPERTS}", own, 'tags by expert, such as {"3": {licence: mit}}')
    shared = {key: value for key, value in given.items() if key != OF_EXPERTS}
    for where, some in {
        "tags": shared,
        **{f"tags.{OF_EXPERTS}.{name}": some for name, some in own.items()},
    }.items():
        for key, value in some.items():
            if not re.fullmatch(TAG_KEY, str(key)):
                refuse(where, key, "a key without spaces, = and :")
            if not isinstance(value, str):
                refuse(f"{where}.{key}", value, "string")
            if not value.strip():
                refuse(f"{where}.{key}", value, "a name")
    experts = {OF_EXPERTS: {str(name): dict(some) for name, some in own.items()}} if own else {}
    return {**shared, **experts}


_STRANGE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def check_text(where: str, content: Any) -> None:
    """Raise ValueError for text that is no UTF-8 (`"\\ud800"` in YAML), which no file could hold.

    Bytes of file names that are no UTF-8 may stay, as Python writes them.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            check_text(where, key)
            check_text(f"{where}.{key}" if where else str(key), value)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            check_text(f"{where}.{number}", value)
    elif isinstance(content, str) and _STRANGE.search(content):
        raise ValueError(f"{where}: {show(content)}. Expected valid UTF-8. Change it in your config.")


Outdir = Annotated[str, AfterValidator(outdir)]
Scratch = Annotated[dict[str, Any], AfterValidator(scratch)]
Tags = Annotated[dict[Annotated[str, Field(pattern=f"^{TAG_KEY}$")], Any], AfterValidator(tags)]
