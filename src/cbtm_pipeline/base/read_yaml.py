"""Read YAML in which each key stands once. YAML forbids to repeat one, and PyYAML takes the last silently."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class Twice(ValueError):
    """A key that stands twice in a mapping."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader. Raises Twice for a key that a mapping has already."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                where = f"in line {lines[name]} and again in line {line}"
                raise Twice(f"{key.value} {where}. Expected each key once. Remove one, or join the two.")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read(path: str | Path, loader: type[Loader] = Loader) -> Any:
    """The content of a YAML file.

    Raises ValueError for a key that stands twice, and what PyYAML raises for a file that is not YAML.
    """
    text = Path(path).read_text("utf-8")
    try:
        return yaml.load(text, loader)
    except Twice as error:
        raise ValueError(f"{path}: {error}") from None
