"""Artifacts are whole or absent; whatever happens to one, a reader gets what was written or refuses it."""

import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import every_damage
from cbtm_pipeline.base import artifact


def test_publish_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.txt"
    with artifact.publish(target) as tmp:
        tmp.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    with pytest.raises(RuntimeError), artifact.publish(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["x.txt"]


def test_publish_passes_on_errors_about_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, artifact.publish(tmp_path / "x"):
        (tmp_path / "input").read_bytes()
    assert str(error.value.filename) == str(tmp_path / "input")


def test_publish_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    code = (
        "import os, signal, sys; from cbtm_pipeline.base import artifact\n"
        "with artifact.publish(sys.argv[1]) as tmp:\n"
        "    tmp.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1 and not target.exists()
    with artifact.publish(target) as tmp:
        tmp.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, artifact.publish(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


# npz

META = artifact.make_meta("vectors", {"shards": "1"}, {"share": 0.5}, note="é")


def test_npz_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    seal = artifact.write_npz(path, META, x=np.arange(5), y=np.zeros((2, 3), np.float32))
    arrays, found = artifact.read_npz(path, "vectors")
    assert found == {**META, "seal": seal} and found["made_with"] == {"share": 0.5}
    assert arrays["y"].shape == (2, 3) and arrays["x"].tolist() == [0, 1, 2, 3, 4]
    assert artifact.read_record(path, "vectors") == found
    artifact.check_made_from(path, found, "shards", "1")
    with pytest.raises(ValueError, match=r"made from another shards \(1\)\. Expected 2\. .*snakemake"):
        artifact.check_made_from(path, found, "shards", "2")
    for read in (artifact.read_npz, artifact.read_record):
        with pytest.raises(ValueError, match="vectors. Expected clusterer"):
            read(path, "clusterer")
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.npz", "vectors")


def test_numpy_and_zipfile_open_a_sealed_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    seal = artifact.write_npz(path, META, x=np.arange(5))
    with np.load(path, allow_pickle=False) as npz:
        assert npz["x"].tolist() == [0, 1, 2, 3, 4]
        assert json.loads(npz["meta"].tobytes()) == META
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == seal.encode()
        assert archive.namelist() == ["meta.npy", "x.npy"]


def test_seal_of_an_npz_is_a_function_of_its_content(tmp_path: Path) -> None:
    seals = []
    for name, made_from, x in (
        ("a", {"b": "2", "a": "1"}, 0),
        ("b", {"a": "1", "b": "2"}, 0),
        ("c", {"a": "1", "b": "3"}, 0),
        ("d", {"a": "1", "b": "2"}, 1),
    ):
        meta = artifact.make_meta("vectors", made_from)
        seals.append(artifact.write_npz(tmp_path / name, meta, x=np.arange(9) + x))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(set(seals)) == 3


def test_every_flipped_bit_and_every_cut_of_an_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    artifact.write_npz(path, META, x=np.arange(3, dtype=np.int32))
    every_damage.check_refused(path, lambda: artifact.read_npz(path, "vectors"))


def test_record_of_a_damaged_npz_is_refused_or_right(tmp_path: Path) -> None:
    """Only the arrays are not read for the record, and the seal is what the file claims."""
    path = tmp_path / "a.npz"
    seal = artifact.write_npz(path, META, x=np.arange(3, dtype=np.int32))
    seals = []
    for damage in every_damage.damages(path):
        try:
            found = artifact.read_record(path, "vectors")
        except ValueError as error:
            assert str(error).startswith(f"{path}: damaged"), damage
        else:
            seals.append(found.pop("seal"))
            assert found == META, damage
    assert seals.count(seal) > 8 * 3 * 4, "damages of the array"


def test_npz_without_a_seal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, meta=np.frombuffer(json.dumps(META).encode(), np.uint8), x=np.arange(3))
    for read in (artifact.read_npz, artifact.read_record):
        with pytest.raises(ValueError, match=r"a\.npz: damaged \(it has no seal\)\. Expected vectors"):
            read(path, "vectors")


def test_pickled_objects_in_an_npz_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match="allow_pickle"):
        artifact.write_npz(path, META, x=np.array([{}], object))
    assert not path.exists()


# JSON


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {**artifact.make_meta("shards", {}, {"k": 2}), "b": 1.5, "a": "é", "c": [1, None, {"d": True}]}
    seal = artifact.write_sealed(path, content)
    assert artifact.read_sealed(path, "shards") == {**content, "seal": seal}
    assert artifact.read_record(path, "shards") == artifact.read_json(path) == {**content, "seal": seal}
    with pytest.raises(ValueError, match="shards. Expected clusterer"):
        artifact.read_sealed(path, "clusterer")
    artifact.write_sealed(path, {**content, "format": 99})
    with pytest.raises(ValueError, match=rf"format 99\. Expected format {artifact.FORMAT}\. Make it again"):
        artifact.read_sealed(path, "shards")
    for text in ("{", "[" * 100_000, '"text"', "null", "", '{"kind": "shards", "format": 2}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: .*Expected"):
            artifact.read_sealed(path, "shards")
    with pytest.raises(FileNotFoundError):
        artifact.read_sealed(tmp_path / "none.json", "shards")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_has_only_numbers(tmp_path: Path, number: float) -> None:
    for write in (artifact.write_json, artifact.write_sealed):
        with pytest.raises(ValueError, match="NaN|Out of range"):
            write(tmp_path / "a.json", {"x": number})
    assert list(tmp_path.iterdir()) == []


def test_seal_of_json_is_a_function_of_its_content(tmp_path: Path) -> None:
    contents = [{"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, {"a": 1, "b": [2, 1]}, {"a": 1.0, "b": [1, 2]}]
    seals = [artifact.write_sealed(tmp_path / str(i), content) for i, content in enumerate(contents)]
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert seals[0] == seals[1] and len(set(seals)) == 3


def test_every_flipped_bit_and_every_cut_of_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifact.write_sealed(path, {**META, "x": [0.1, -3, True, None, "ü", {}]})
    every_damage.check_refused(path, lambda: artifact.read_sealed(path, "vectors"))


def edited_by_hand(text: str) -> str:
    return text.replace('"note": "é"', '"note": "è"')


def formatted_otherwise(text: str) -> str:
    return json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def keys_in_another_order(text: str) -> str:
    return json.dumps(dict(reversed(json.loads(text).items())), indent=1, ensure_ascii=False) + "\n"


def key_twice(text: str) -> str:
    return text.replace('"note"', '"note": "another",\n "note"')


def escaped(text: str) -> str:
    return text.replace("é", "\\u00e9")


def number_spelled_otherwise(text: str) -> str:
    return text.replace("0.5", "5e-1")


def windows_line_ends(text: str) -> str:
    return text.replace("\n", "\r\n")


def byte_order_mark(text: str) -> str:
    return "\ufeff" + text


def without_its_seal(text: str) -> str:
    content = json.loads(text)
    del content["seal"]
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    "change",
    [
        edited_by_hand,
        formatted_otherwise,
        keys_in_another_order,
        key_twice,
        escaped,
        number_spelled_otherwise,
        windows_line_ends,
        byte_order_mark,
        without_its_seal,
    ],
)
def test_json_that_somebody_changed_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    """Each content has one text, so that no change goes unseen, even one that keeps the meaning."""
    path = tmp_path / "a.json"
    artifact.write_sealed(path, META)
    text = path.read_text("utf-8")
    assert change(text) != text
    path.write_bytes(change(text).encode())
    with pytest.raises(ValueError, match=r"a\.json: (changed since it was written|not JSON).*snakemake"):
        artifact.read_sealed(path, "vectors")


# identities


def test_fingerprint_ignores_key_order() -> None:
    assert artifact.fingerprint({"a": 1, "b": [2]}) == artifact.fingerprint({"b": [2], "a": 1})
    assert artifact.fingerprint({"a": 1}) != artifact.fingerprint({"a": 2})


def test_identity_is_the_hash_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 7)
    (tmp_path / "a").write_bytes(content)
    assert artifact.identity(tmp_path / "a") == artifact.hash_of(content) != artifact.hash_of(content[1:])
    assert artifact._hash_up_to(io.BytesIO(content), len(content)) == artifact.hash_of(content)
    assert artifact._hash_up_to(io.BytesIO(content), 1 << 20) == artifact.hash_of(content[: 1 << 20])


def test_file_that_changed_after_it_was_checked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"right")
    expected = artifact.hash_of(b"right")
    for _ in range(2):
        artifact.check_file(path, expected, "Make it again.")
    path.write_bytes(b"wrong")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=rf"a: another file .*\. Expected {expected}\. Make it again\."):
        artifact.check_file(path, expected, "Make it again.")
