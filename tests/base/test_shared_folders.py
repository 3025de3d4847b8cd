"""Folders to which others may write: their links are not followed, their records not believed."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cbtm_pipeline.base import artifact, cli, lock, publish, trust
from cbtm_pipeline.slurm import commands, events
from cbtm_pipeline.slurm.launcher import Launcher


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user that somebody wants to change."""
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


def test_a_link_at_a_temporary_name_is_not_followed(tmp_path: Path, victim: Path) -> None:
    planted = tmp_path / f".a.json.{publish._HOST}-{os.getpid()}.tmp"
    planted.symlink_to(victim)
    artifact.write_json(tmp_path / "a.json", {"a": 1})
    assert victim.read_text() == "mine"
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert not (tmp_path / "a.json").is_symlink()


def test_the_next_temporary_name_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with publish.publish(tmp_path / "x") as tmp:
            names.add(tmp.name)
            tmp.touch()
    assert len(names) == 3


def test_a_strange_temporary_name_stops_nobody(tmp_path: Path) -> None:
    for name in (f".x.{publish._HOST}-me.tmp", f".x.{publish._HOST}-{10**30}.tmp"):
        (tmp_path / name).touch()
    with publish.publish(tmp_path / "x") as tmp:
        tmp.touch()
    assert (tmp_path / "x").exists()


def test_a_link_where_a_folder_for_temporary_files_goes(tmp_path: Path, victim: Path) -> None:
    (tmp_path / ".staging").symlink_to(tmp_path, target_is_directory=True)
    (publish.fresh(tmp_path / ".staging") / "victim").write_text("theirs")
    assert victim.read_text() == "mine"
    assert not (tmp_path / ".staging").is_symlink()
    publish.fresh(tmp_path / ".staging")
    assert not list((tmp_path / ".staging").iterdir())


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lock": (".lock", lock.hold),
    "history": (events.FILE, lambda folder: events.add(folder, "started")),
    "log": ("x.log", lambda folder: cli._LogFile(folder / "x.log")),
    "queue": (".queue.lock", commands.shared_queue),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("plant", ["link", "pipe"])
def test_a_link_or_pipe_at_a_file_that_is_kept_open(
    tmp_path: Path, victim: Path, kind: str, plant: str
) -> None:
    name, write = WRITERS[kind]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(victim) if plant == "link" else os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=r"a link or no file\. Expected a file of this run\. Remove it"):
        write(folder)
    assert victim.read_text() == "mine"


def test_a_lock_record_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_bytes(b"x" * 100_000)
    os.truncate(path, 1 << 40)
    assert len(lock._read(path)) <= lock._SIZE


@pytest.mark.parametrize("job_id", ["--user=me", "1; rm -rf /", 7.5, [1], True, "1 2", ""])
def test_a_record_that_names_no_job_is_not_believed(tmp_path: Path, job_id: object) -> None:
    launcher = Launcher(tmp_path, {"work": None}, 0, 0)
    record = {"job_id": "12", "token": "t", "fingerprint": "f", "submitted": 1.5}
    events.write_json(tmp_path / "job.json", record)
    assert launcher._record() == record
    events.write_json(tmp_path / "job.json", {**record, "job_id": job_id})
    assert launcher._record() is None


@pytest.mark.parametrize("content", ["[]", "{}", "[" * 100_000, "null", '{"job_id": "1"}', '{"asked": "x"}'])
def test_records_that_are_none_are_nothing(tmp_path: Path, content: str) -> None:
    for name in ("job.json", "queue.json", events.FILE):
        (tmp_path / name).write_text(content + "\n")
    assert Launcher(tmp_path, {"work": None}, 0, 0)._record() is None
    assert commands._cached(tmp_path / "queue.json")["jobs"] == []
    assert events.read(tmp_path) == []


# --- folders from which code runs ---------------------------------------------------------------------------

LAUNCH = [sys.executable, "-m", "cbtm_pipeline.slurm.launch", "--name", "x", "--resources"]
LAUNCH += ['{"slurm_partition": "p", "runtime": 1, "mem_mb": 1}', "--folder"]


def test_a_job_from_a_folder_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    outdir = tmp_path / "results"
    outdir.mkdir()
    outdir.chmod(0o777)
    run = subprocess.run([*LAUNCH, outdir / "slurm", "--", "true"], capture_output=True, text=True)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"{outdir}: everybody may write there, and so run code as you in a job of Slurm. ")
    assert f"Run chmod o-w {outdir}, or choose another outdir." in line
    assert not list(outdir.iterdir())
    outdir.chmod(0o755)
    trust.refuse_open(outdir / "slurm")


def test_who_may_write(tmp_path: Path) -> None:
    folder = tmp_path / "project/results"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    (tmp_path / "project").chmod(0o755)
    assert [other for other in trust.others(folder) if tmp_path in other.folder.parents] == []
    (tmp_path / "project").chmod(0o1777)  # as /tmp: nobody can rename what is ours there
    trust.refuse_open(folder)
    with pytest.raises(ValueError, match="project: everybody"):
        trust.refuse_open(tmp_path / "project")
    (tmp_path / "project").chmod(0o777)
    with pytest.raises(ValueError, match="project: everybody"):
        trust.refuse_open(folder)
    assert trust.local_warning(folder) is not None


def test_a_folder_of_a_group_gets_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, gid = tmp_path / "lab", 54321 if os.geteuid() == 0 else max(os.getgroups())
    folder.mkdir()
    os.chown(folder, -1, gid)
    folder.chmod(0o2775)
    if trust._is_own_group(gid):
        pytest.skip("this user has no group with others")
    trust.refuse_open(folder / "slurm")
    caplog.set_level(logging.WARNING, "cbtm")
    for _ in range(2):
        trust.warn_once(folder / "slurm/x", folder / ".warned")
    (line,) = caplog.messages
    assert line.startswith(
        f"{folder}: group {trust._name(__import__('grp').getgrgid, gid)} may write there, too"
    )
    assert line.endswith(f"run chmod g-w {folder}")
