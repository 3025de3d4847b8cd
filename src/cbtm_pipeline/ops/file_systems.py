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

# Types of file systems that several hosts can share.
SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "orangefs", "pvfs2", "cifs"}
SHARED |= {"smb3", "afs", "glusterfs", "9p", "virtiofs", "gfs2", "ocfs2", "juicefs", "ceph-fuse", "mfs"}
SHARED |= {"vastfs", "quobyte"}
PROBE_BYTES = 1 << 25


class Mount(NamedTuple):
    """The file system of a path: its mount point, its type and its mount options."""

    point: str
    type: str
    options: str

    @property
    def shared(self) -> bool:
        return self.type in SHARED

    @property
    def locks_stay_here(self) -> bool:
        """Whether its mount options hide file locks from other hosts. Lustre and NFS have such options."""
        return bool(re.search(r"\b(localflock|local_lock=(all|flock)|nolock)\b", self.options))


def mount_of(path: Path) -> Mount:
    """The file system of a path, which need not exist yet."""
    table = Path("/proc/self/mountinfo")
    return find_mount(existing(path).resolve(), table.read_text("utf-8", "replace") if table.exists() else "")


def find_mount(path: Path, mountinfo: str) -> Mount:
    """The file system of an absolute path, in the text of /proc/self/mountinfo."""
    best = Mount("/", "unknown", "")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        # of two mounts on one point, the later hides the earlier
        if path.is_relative_to(point) and len(point) >= len(best.point):
            kind, _, *options = right.split()
            best = Mount(point, kind.removeprefix("fuse."), ",".join([left.split()[5], *options]))
    return best


def seen_by(hosts: Collection[str], mounts: Mapping[str, Mount]) -> Iterator[Line]:
    """Whether the compute nodes `hosts` see what lies on the mounts.

    `mounts`: by the name of what lies there.
    """
    here = {host.split(".")[0] for host in hosts} == {socket.gethostname().split(".")[0]}
    for mount in dict.fromkeys(mounts.values()):
        names = ", ".join(name for name in mounts if mounts[name] == mount)
        what = f"files: {names} on {mount.point} ({mount.type})"
        if mount.shared or here:
            yield "ok", f"{what}, {'which is shared' if mount.shared else 'and every node is this machine'}"
        else:
            expected = "a shared file system (nfs, lustre, gpfs ...), as compute nodes may not see it"
            yield "warn", f"{what}. Expected {expected}. Move them"


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


class Probe(NamedTuple):
    """What a folder can do: file locks, hard links, and its write rate to the disk in bytes/s."""

    locks: bool
    links: bool
    write_rate: float


def probe(folder: Path) -> Probe:
    """Try out what a folder can do, in a subfolder that is removed again.

    Raises OSError if it cannot be written.
    """
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
    """Whether the file system of outdir has what launchers and trainings need."""
    if not found.locks:
        level = "FAIL" if for_slurm else "warn"  # a launcher needs locks, a training has a second way
        yield level, f"{outdir}: no file locks. Expected flock to work. Have it mounted so, or change outdir"
    elif mount.locks_stay_here:
        what = f"{outdir}: locks are not seen by other hosts ({mount.options})"
        yield "warn", f"{what}. Expected them to be. Run snakemake on one host only"
    if not found.links:
        expected = "them, to keep a result until its launcher takes it"
        yield "warn", f"{outdir}: no hard links. Expected {expected}. Such a job may be done again"
    if found.locks and found.links:
        rate = f"{found.write_rate / 1e6:.0f} MB/s"
        yield "ok", f"files: outdir has locks and hard links, and takes {rate}"


def _locks(path: Path) -> bool:
    """Whether a file can be locked, and the lock keeps out a second one."""
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
    """Bytes of all files below a folder; 0 if there is no folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(f"{root}/{name}").st_size
            except OSError:  # it was removed meanwhile: a run may be going on
                continue
    return total
