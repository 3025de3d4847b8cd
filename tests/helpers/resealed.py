"""Artifacts that are written again with other content, and a seal that fits."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline.base import artifact


def change_json(path: Path, **keys: Any) -> str:
    """Write a JSON artifact again with some keys replaced. Returns its seal."""
    return artifact.write_sealed(path, {**_unsealed(json.loads(path.read_text())), **keys})


def change_npz(path: Path, kind: str, meta: dict[str, Any] | None = None, **arrays: np.ndarray) -> str:
    """Write an npz artifact again with some keys of its record or some of its arrays replaced.

    Returns its seal.
    """
    old_arrays, old_meta = artifact.read_npz(path, kind)
    return artifact.write_npz(path, {**_unsealed(old_meta), **(meta or {})}, **{**old_arrays, **arrays})


def _unsealed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seal"}
