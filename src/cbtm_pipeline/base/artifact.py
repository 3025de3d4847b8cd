"""Artifacts, the files between rules: each is whole or absent, and says what it is and what it was made from.

Every artifact carries a *meta* record `{"format", "kind", "made_from", ...}`: in JSON files at the top level,
in npz files as the array `meta`, in Arrow and Parquet files in the schema's metadata. `made_from` maps the
names of the inputs to their identities (see `identity`). With it, a reader refuses files that do not belong
together.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.base.publish import publish

FORMAT = 1


def identity(path: str | Path) -> str:
    """Content hash of a file (blake2b, 16 bytes, hexadecimal)."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fingerprint(value: Any) -> str:
    """Hash of a JSON-like value, independent of key order."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def make_meta(kind: str, made_from: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """The meta record of an artifact, with the entries `more`."""
    return {"format": FORMAT, "kind": kind, "made_from": dict(made_from), **more}


def check_meta(path: str | Path, meta: Any, kind: str) -> dict[str, Any]:
    """Return `meta` if it describes an artifact of this kind and format, else raise ValueError."""
    found = meta.get("kind") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or found != kind:
        raise ValueError(
            f"{path}: {found or 'no artifact of this pipeline'}. Expected {kind}. Check the path."
        )
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: format {meta.get('format')}. Expected format {FORMAT}. {make_again(path)}")
    return meta


def check_made_from(path: str | Path, meta: Mapping[str, Any], name: str, expected: str) -> None:
    """Raise ValueError unless the artifact at `path` was made from the input `name` with this identity."""
    found = meta["made_from"].get(name)
    if found != expected:
        raise ValueError(
            f"{path}: made from another {name} ({found}). Expected {expected}. {make_again(path)}"
        )


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys. Raises ValueError for NaN and infinity, which JSON does not have."""
    with publish(path) as tmp:
        tmp.write_text(
            json.dumps(content, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8"
        )


def read_json(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read a JSON file. Raises ValueError if it is no JSON or, with `kind`, no artifact of this kind."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}). Expected {kind or 'JSON'}. {make_again(path)}"
        ) from error
    return check_meta(path, content, kind) if kind else content


def write_npz(path: str | Path, meta: Mapping[str, Any], **arrays: np.ndarray) -> None:
    """Write arrays and their meta record as an uncompressed npz."""
    meta_bytes = np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8)
    with publish(path) as tmp, tmp.open("wb") as file:
        np.savez(file, allow_pickle=False, meta=meta_bytes, **arrays)


def read_npz(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the meta record of an npz artifact.

    Raises ValueError if it is damaged or of another kind.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as npz:
            arrays = {name: npz[name] for name in npz.files}
        meta = json.loads(arrays.pop("meta").tobytes())
    except (ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: unreadable ({error}). Expected {kind}. {make_again(path)}") from error
    except OSError:
        raise
    except Exception as error:  # zipfile.BadZipFile, zlib.error and more: damage has many types
        raise ValueError(f"{path}: damaged ({error}). Expected {kind}. {make_again(path)}") from error
    return arrays, check_meta(path, meta, kind)
