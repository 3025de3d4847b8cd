"""What the user reads of a wrong config: a line for each wrong key.

`config` holds the schema; this module turns what pydantic says of a value into words.
"""

import difflib
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

OWN = "own"  # type of the errors whose message is the whole line
SHOWN = 60  # characters of a value
OF_STUDY = ("base", "grid", "runs")  # keys of ops/study.py that no config has
OF_STUDY_TODO = "Run a study with snakemake -s workflow/study.smk --configfile FILE --cores 2."
_INNER = ("function-", "list[", "constrained")  # what pydantic puts between the keys


def refuse(key: str, found: Any, expected: str) -> NoReturn:
    """Raise the error of a validator that knows the whole line."""
    raise PydanticCustomError(
        OWN, "{text}", {"text": f"{key}: {show(found)}. Expected {expected}. Change it in your config."}
    )


def explain(error: Any, schema: type[BaseModel]) -> str:
    """One line about an error of pydantic, whose keys are those of `schema`."""
    if error["type"] == OWN:
        return error["msg"]
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(_INNER))
    if error["type"] == "extra_forbidden":
        if key in OF_STUDY:
            return f"{key}: a key of a study. Expected the config of one run. {OF_STUDY_TODO}"
        near = _nearest(key, schema)
        todo = f"Did you mean {near}?" if near else "Remove it."
        return f"{key}: unknown key. Expected a key of config.yaml. {todo}"
    if error["type"] == "missing":
        return f"{key}: missing. Expected a value. Copy it from config.yaml."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if error["type"] == "too_short":
        expected = "at least one value"
    if error["type"] == "string_pattern_mismatch":
        expected = "a name, or null"
    return f"{key}: {show(error['input'])}. Expected {expected}. Change it in your config."


def _nearest(key: str, schema: type[BaseModel]) -> str | None:
    """The known key that an unknown one most probably stands for, if one is near."""
    known = _keys(schema)
    section, _, name = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    near = [k for k in known if k.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(key, siblings, 1, 0.6)
    by_name = {k.rpartition(".")[2]: k for k in reversed(known)}
    return (near or [by_name[n] for n in difflib.get_close_matches(name, by_name, 1, 0.6)] or [None])[0]


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


def show(value: Any) -> str:
    """A value as Python writes it, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4 300 digits, or a nesting without end
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
