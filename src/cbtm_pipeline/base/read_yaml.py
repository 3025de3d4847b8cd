"""Read YAML that a person wrote: each key stands once, and the content is a tree that JSON could hold.

YAML forbids to repeat a key, and PyYAML takes the last silently. YAML allows a part that holds itself, and
parts that are used many times, of which ten lines can make more than a memory holds. Both are refused.
"""

import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 50  # sections and lists inside each other
MAX_VALUES = 1_000_000  # in all, those of a part that is used again counted again


class Refused(ValueError):
    """What is no tree of values: a key twice, a part that holds itself."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader. Raises Refused for a key that a mapping has already."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                where = f"in line {lines[name]} and again in line {line}"
                raise Refused(f"{key.value} {where}. Expected each key once. Remove one, or join the two.")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read(path: str | Path, loader: type[Loader] = Loader, expected: str = "the keys of config.yaml") -> Any:
    """The content of a YAML or JSON file.

    Raises ValueError, with the line, for what is not YAML or no tree; OSError.
    """
    path = Path(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: not a file. Expected {expected} in a file. Write them to one.")
    try:
        return parse(path.read_text("utf-8-sig"), loader)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        found = f"its byte {error.start} is not UTF-8"
        raise ValueError(f"{path}: not YAML ({found}). Expected {expected}. Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML{_reason(error)}. Expected {expected}. Mend the file.") from error


def parse(text: str, loader: type[Loader] = Loader) -> Any:
    """The content of YAML. Raises Refused, and what PyYAML raises for text that is not YAML."""
    try:
        content = yaml.load(text, loader)
    except RecursionError:
        raise Refused(_too_deep("nested too deep")) from None
    except (ValueError, TypeError) as error:  # such as a date in month 13, or a list as a key
        if isinstance(error, Refused):
            raise
        raise Refused(f"{error}. Expected text, numbers, lists and sections. Mend the value.") from None
    _check_tree(content)
    return content


def _too_deep(found: str) -> str:
    return f"{found}. Expected at most {MAX_DEPTH} lists and sections inside each other. Write it plainly."


def _check_tree(content: Any) -> None:
    """Raise Refused for a part that holds itself or is nested too deep, and for too many values in all."""
    n_values, todo = 0, [(content, 0)]
    while todo:
        value, depth = todo.pop()
        n_values += 1
        if depth > MAX_DEPTH:
            raise Refused(_too_deep("a part that holds itself, or is nested too deep"))
        if n_values > MAX_VALUES:
            raise Refused(
                f"more than {MAX_VALUES} values. Expected a config. Name a folder or a glob for many files."
            )
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo += [(one, depth + 1) for one in inner]


def _reason(error: yaml.YAMLError) -> str:
    """Where and why text is not YAML: ` in line 3 (...)`."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "it breaks off"
    return f"{f' in line {mark.line + 1}' if mark else ''} ({' '.join(str(reason).split())})"
