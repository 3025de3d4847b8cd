"""File systems: whether compute nodes see them, and whether locks and hard links work on them."""

import fcntl
import os
import re
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline.ops.finding import Line

SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "wekafs",
    "panfs",
    "orangefs",
    "pvfs2",
    "cifs",
    "smb3",
    "afs",
    "glusterfs",
}
SHARED |= {"9p", "virtiofs", "gfs2", "ocfs2", "juicefs", "ceph-fuse", "mfs", "vastfs", "quobyte"}
PROBE_BYTES = 1 << 25


class Mount(NamedTuple):
    """Where a path lies: mount point, type of the file system, mount options."""

    point: str
    type: str
    options: str

    @property
    def shared(self) -> bool:
        return self.type in SHARED

    @property
    def locks_stay_here(self) -> bool:
        """Whether it was mounted so that other hosts do not see file locks (Lustre and NFS can be)."""
        return bool(re.search(r"\b(localflock|local_lock=(all|flock)|nolock)\b", self.options))


def mount_of(path: Path) -> Mount:
    """The file system that holds a path, or will."""
    table = Path("/proc/self/mountinfo")
    return find_mount(existing(path).resolve(), table.read_text("utf-8", "replace") if table.exists() else "")


def find_mount(path: Path, mountinfo: str) -> Mount:
    """The file system of an absolute path, in the text of /proc/self/mountinfo."""
    best = Mount("/", "unknown", "")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        if path.is_relative_to(point) and len(point) >= len(
            best.point
        ):  # of two on one point, the later hides the earlier
            kind, _, *options = right.split()
            best = Mount(point, kind.removeprefix("fuse."), ",".join([left.split()[5], *options]))
    return best


def seen_by(hosts: Collection[str], mounts: Mapping[str, Mount]) -> Iterator[Line]:
    """Whether compute nodes of these names see what lies on the mounts."""
    here = {host.split(".")[0] for host in hosts} == {socket.gethostname().split(".")[0]}
    for mount in dict.fromkeys(mounts.values()):
        what = f"files: {', '.join(name for name in mounts if mounts[name] == mount)} on {mount.point} ({mount.type})"
        if mount.shared or here:
            yield "ok", f"{what}, {'which is shared' if mount.shared else 'and every node is this machine'}"
        else:
            yield (
                "warn",
                f"{what}. Expected a shared file system (nfs, lustre, gpfs ...), as compute nodes may not see it. Move them",
            )


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


class Probe(NamedTuple):
    """What a folder can do. `write_rate` in bytes/s, to the disk."""

    locks: bool
    links: bool
    write_rate: float


def probe(folder: Path) -> Probe:
    """Try it out, in a folder that is removed again. Raises OSError where nothing can be written."""
    with tempfile.TemporaryDirectory(prefix=".cbtm-doctor-", dir=existing(folder)) as own:
        path, content = Path(own, "probe"), os.urandom(1 << 20)
        began = time.monotonic()
        with path.open("wb") as file:
            for _ in range(PROBE_BYTES >> 20):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rate = PROBE_BYTES / (time.monotonic() - began)
        try:
            path.with_name("link").hardlink_to(path)
            links = True
        except OSError:
            links = False
        return Probe(_locks(path), links, rate)


def promises(outdir: Path, mount: Mount, found: Probe, for_slurm: bool) -> Iterator[Line]:
    """What a file system has to keep for launchers and trainings."""
    if not found.locks:  # a launcher cannot do without, a training has a second way
        yield (
            "FAIL" if for_slurm else "warn",
            f"{outdir}: no file locks. Expected flock to work. Have it mounted so, or change outdir",
        )
    elif mount.locks_stay_here:
        yield (
            "warn",
            f"{outdir}: locks are not seen by other hosts ({mount.options}). Expected them to be. Run snakemake on one host only",
        )
    if not found.links:
        yield (
            "warn",
            f"{outdir}: no hard links. Expected them, to keep a result that nobody waits for. Such a job is done again",
        )
    if found.locks and found.links:
        yield "ok", f"files: outdir has locks and hard links, and takes {found.write_rate / 1e6:.0f} MB/s"


def _locks(path: Path) -> bool:
    """Whether a lock can be had, and keeps out a second one."""
    with path.open("rb") as first, path.open("rb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def used_bytes(folder: Path) -> int:
    """What lies below a folder already."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(f"{root}/{name}").st_size
            except OSError:  # gone meanwhile: a run may be going on
                continue
    return total
