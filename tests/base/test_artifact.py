import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_npz_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    meta = artifact.make_meta("vectors", {"shards": "1"}, note="é")
    artifact.write_npz(path, meta, x=np.arange(5), y=np.zeros((2, 3), np.float32))
    arrays, found = artifact.read_npz(path, "vectors")
    assert found == meta and arrays["y"].shape == (2, 3) and arrays["x"].tolist() == [0, 1, 2, 3, 4]
    artifact.check_made_from(path, found, "shards", "1")
    with pytest.raises(ValueError, match=r"made from another shards \(1\)\. Expected 2\. .*snakemake"):
        artifact.check_made_from(path, found, "shards", "2")
    with pytest.raises(ValueError, match="vectors. Expected clusterer"):
        artifact.read_npz(path, "clusterer")


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:60] + b"\xff" * 40 + b[100:]]
)
def test_damaged_npz_is_a_clear_error(tmp_path: Path, damage) -> None:
    path = tmp_path / "a.npz"
    artifact.write_npz(path, artifact.make_meta("vectors", {}), x=np.arange(500))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.npz: .*Expected vectors"):
        artifact.read_npz(path, "vectors")


def test_npz_bytes_are_a_function_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        artifact.write_npz(
            tmp_path / name, artifact.make_meta("vectors", {"b": "2", "a": "1"}), x=np.arange(9)
        )
    assert artifact.identity(tmp_path / "a") == artifact.identity(tmp_path / "b")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifact.write_json(path, {**artifact.make_meta("shards", {}), "b": 1.5, "a": "é"})
    assert artifact.read_json(path, "shards")["a"] == "é"
    with pytest.raises(ValueError, match="NaN|Out of range"):
        artifact.write_json(path, {"x": float("nan")})
    path.write_text('{"kind": "shards", "format": 99}')
    with pytest.raises(ValueError, match="format 99. Expected format 1"):
        artifact.read_json(path, "shards")
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        artifact.read_json(path, "shards")


def test_fingerprint_ignores_key_order() -> None:
    assert artifact.fingerprint({"a": 1, "b": [2]}) == artifact.fingerprint({"b": [2], "a": 1})
    assert artifact.fingerprint({"a": 1}) != artifact.fingerprint({"a": 2})
