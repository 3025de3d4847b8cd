"""Artifacts, the files between rules: each is whole or absent, says what it is, and how it came about.

Every artifact carries a *meta* record: in JSON files at the top level, in npz files as the array `meta`, in
Arrow and Parquet files in the schema's metadata.

    format, kind     what the file is
    made_from        the identities of its inputs, by name
    made_with        the plan of its rule (plan.py): the config values that it depends on

JSON and npz artifacts carry a *seal*, too: a hash of all other bytes of the file. It is the file's identity
for those that read it. So whatever happens to the file, a reader either gets what was written, or refuses it.
"""

import errno
import functools
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline.base.errors import Advice, make_again, run_again, said
from cbtm_pipeline.base.publish import publish

FORMAT = 2
_SEAL_BYTES = 32  # hexadecimal digits of a seal
_END = struct.Struct(f"<H{_SEAL_BYTES}s")  # how a sealed npz ends: the zip comment's length, and the seal


def identity(path: str | Path) -> str:
    """Content hash of a file (blake2b, 16 bytes, hexadecimal)."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def check_file(path: Path, expected: str, advice: Advice) -> None:
    """Raise ValueError unless the file has the identity `expected`, which another file gives.

    A process reads each file only once for this. `advice` ends the message.
    """
    about = path.stat()
    found = _identity(path, about.st_ino, about.st_size, about.st_mtime_ns)
    if found != expected:
        raise ValueError(f"{path}: another file than it was ({found}). Expected {expected}. {said(advice)}")


@functools.cache
def _identity(path: Path, *_: int) -> str:
    """The identity of a file, computed again only if its inode, size or time of change is another."""
    return identity(path)


def new_hash() -> hashlib.blake2b:
    """The hash of all identities: blake2b of 16 bytes."""
    return hashlib.blake2b(digest_size=_SEAL_BYTES // 2)


def hash_of(content: bytes) -> str:
    """The hash of some bytes, as `identity` hashes a file."""
    digest = new_hash()
    digest.update(content)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Hash of a JSON-like value, independent of key order."""
    return hash_of(json.dumps(value, sort_keys=True).encode())


def make_meta(
    kind: str, made_from: Mapping[str, str], made_with: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """The meta record of an artifact, with the entries `more`. `made_with` is the plan of the rule."""
    made_by = {} if made_with is None else {"made_with": dict(made_with)}
    return {"format": FORMAT, "kind": kind, "made_from": dict(made_from), **made_by, **more}


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
            f"{path}: made from another {name} ({found}). Expected {expected}. {run_again(path)}"
        )


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys. Raises ValueError for NaN and infinity, which JSON does not have."""
    with publish(path) as tmp:
        tmp.write_text(_as_json(content), "utf-8")


def write_sealed(path: str | Path, artifact: Mapping[str, Any]) -> str:
    """Write a JSON artifact with its seal. Returns the seal."""
    seal = hash_of(_as_json(artifact).encode())
    write_json(path, {**artifact, "seal": seal})
    return seal


def read_json(path: str | Path) -> Any:
    """Read any JSON file. Raises ValueError if it is none."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}). Expected JSON. {make_again(path)}") from error


def read_sealed(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a JSON artifact, its seal included. Raises ValueError if it is damaged or of another kind."""
    try:
        text = Path(path).read_bytes().decode()  # read_text would change line ends
        content = json.loads(text)
        whole = isinstance(content, dict) and text == _as_json(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}). Expected {kind}. {make_again(path)}") from error
    check_meta(path, content, kind)
    without = {key: value for key, value in content.items() if key != "seal"}
    if not whole or content.get("seal") != hash_of(_as_json(without).encode()):
        raise ValueError(
            f"{path}: changed since it was written. Expected its content to fit its seal. {make_again(path)}"
        )
    return content


def write_npz(path: str | Path, meta: Mapping[str, Any], **arrays: np.ndarray) -> str:
    """Write arrays and their meta record as an uncompressed npz, with a seal as zip comment.

    Returns the seal.
    """
    meta_bytes = np.frombuffer(compact(meta).encode(), np.uint8)
    with publish(path) as tmp, tmp.open("w+b") as file:
        np.savez(file, allow_pickle=False, meta=meta_bytes, **arrays)
        # a zip without a comment ends with the length of the comment, two zero bytes
        file.seek(-2, os.SEEK_END)
        file.truncate()
        seal = _hash_up_to(file, file.tell())
        file.write(_END.pack(_SEAL_BYTES, seal.encode()))
    return seal


def read_npz(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the meta record of an npz artifact. The record has the seal, as in a JSON artifact.

    Raises ValueError if the file is damaged or of another kind.
    """
    try:
        with Path(path).open("rb") as file:
            seal = _seal_of_npz(file)
            if seal != _hash_up_to(file, file.seek(-_END.size, os.SEEK_END)):
                raise ValueError("its seal does not fit")
            file.seek(0)
            with np.load(file, allow_pickle=False) as npz:
                arrays = {name: npz[name] for name in npz.files}
        meta = from_compact(arrays.pop("meta").tobytes())
    except OSError:
        raise
    except Exception as error:  # zipfile.BadZipFile, zlib.error, struct.error and more: damage has many types
        raise ValueError(f"{path}: damaged ({error}). Expected {kind}. {make_again(path)}") from error
    return arrays, {**check_meta(path, meta, kind), "seal": seal}


def read_record(path: str | Path, kind: str) -> dict[str, Any]:
    """The meta record of a JSON or npz artifact. The arrays of an npz are neither read nor checked."""
    if Path(path).suffix != ".npz":
        return read_sealed(path, kind)
    try:
        with Path(path).open("rb") as file:
            seal = _seal_of_npz(file)
            file.seek(0)
            with np.load(file, allow_pickle=False) as npz:
                meta = from_compact(npz["meta"].tobytes())
    except Exception as error:  # as in read_npz
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # zipfile jumps to where a damaged file says, which may be before its start
        raise ValueError(f"{path}: damaged ({error}). Expected {kind}. {make_again(path)}") from error
    return {**check_meta(path, meta, kind), "seal": seal}


def _seal_of_npz(file: Any) -> str:
    """The seal that an open npz claims to have. Raises ValueError for a file without one."""
    if file.seek(0, os.SEEK_END) < _END.size:
        raise ValueError("too short")
    file.seek(-_END.size, os.SEEK_END)
    n_bytes, seal = _END.unpack(file.read())
    if n_bytes != _SEAL_BYTES:
        raise ValueError("it has no seal")
    return seal.decode("ascii")


def _hash_up_to(file: Any, n_bytes: int) -> str:
    """Hash of the first `n_bytes` bytes of an open file. Leaves the file's position there."""
    digest, buffer = new_hash(), memoryview(bytearray(min(n_bytes, 1 << 20)))
    file.seek(0)
    while n_bytes:
        n_read = file.readinto(buffer[: min(n_bytes, len(buffer))])
        assert n_read, "the file became shorter while it was read"
        digest.update(buffer[:n_read])
        n_bytes -= n_read
    return digest.hexdigest()


def compact(meta: Mapping[str, Any]) -> str:
    """A record as one line of JSON, for formats that keep it in a field of their own."""
    return json.dumps(meta, sort_keys=True, allow_nan=False)


def from_compact(text: str | bytes) -> dict[str, Any]:
    """The record in such a field. Raises ValueError if there is none."""
    meta = json.loads(text)
    if not isinstance(meta, dict):
        raise ValueError("no record")
    return meta


def _as_json(content: Mapping[str, Any]) -> str:
    """The text of a JSON file: sorted keys, so that equal content gives equal bytes."""
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
