"""The default config with some keys changed."""

import copy
from pathlib import Path
from typing import Any

import yaml

DEFAULT: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "config.yaml").read_text())


def changed(**keys: Any) -> dict[str, Any]:
    """The default config with dotted keys (section__key) replaced or added."""
    content = copy.deepcopy(DEFAULT)
    for key, value in keys.items():
        *sections, last = key.split("__")
        node = content
        for section in sections:
            node = node[section]
        node[last] = value
    return content
