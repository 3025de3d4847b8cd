"""Which file systems are shared, and what they can do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_pipeline.ops import file_systems
from cbtm_pipeline.ops.finding import Line

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:45 / /home rw,relatime - autofs systemd-1 rw,fd=31
24 23 0:46 / /home rw,relatime - nfs4 nas:/home rw,vers=4.2,local_lock=none
25 22 0:47 / /scratch rw - lustre mds@tcp:/scratch rw,localflock
26 22 0:48 / /my\\040disk rw - fuse.juicefs jfs rw
"""


def levels(lines: Iterator[Line]) -> list[str]:
    return [level for level, _ in lines]


@pytest.mark.parametrize(
    ("path", "point", "shared", "locks_stay_here"),
    [
        ("/etc", "/", False, False),
        ("/homework", "/", False, False),
        ("/home/me/run", "/home", True, False),
        ("/scratch", "/scratch", False, True),
        ("/my disk/x", "/my disk", True, False),
    ],
)
def test_mounts(path: str, point: str, shared: bool, locks_stay_here: bool) -> None:
    mount = file_systems.find_mount(Path(path), MOUNTS)
    assert (mount.point, mount.locks_stay_here) == (point, locks_stay_here)
    assert mount.shared == shared or mount.type == "lustre"


def test_files_that_compute_nodes_do_not_see() -> None:
    mounts = {
        name: file_systems.find_mount(Path(path), MOUNTS)
        for name, path in (("outdir", "/home/x"), ("Python", "/usr"), ("this folder", "/opt"))
    }
    ((first, text), (second, _)) = file_systems.seen_by(["node1", "node2"], mounts)
    assert (first, second) == ("ok", "warn") and "outdir on /home (nfs4)" in text
    assert levels(file_systems.seen_by([file_systems.socket.gethostname()], mounts)) == ["ok", "ok"]


def test_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    found = file_systems.probe(tmp_path / "not/yet/there")
    assert found.locks and found.links and found.write_rate > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="/proc"):
        file_systems.probe(Path("/proc/results"))


def test_promises_of_a_file_system() -> None:
    here, lustre = (file_systems.find_mount(Path(path), MOUNTS) for path in ("/", "/scratch"))
    good, bad = file_systems.Probe(True, True, 1e8), file_systems.Probe(False, False, 1e8)
    assert levels(file_systems.promises(Path("out"), here, good, True)) == ["ok"]
    assert levels(file_systems.promises(Path("out"), lustre, good, True)) == ["warn", "ok"]
    assert levels(file_systems.promises(Path("out"), here, bad, True)) == ["FAIL", "warn"]
    assert levels(file_systems.promises(Path("out"), here, bad, False)) == ["warn", "warn"]


def test_used_bytes(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(b"x" * 1000)
    (tmp_path / "d").symlink_to("nowhere")
    assert file_systems.used_bytes(tmp_path) == 1000 + len("nowhere")
    assert file_systems.used_bytes(tmp_path / "none") == 0
