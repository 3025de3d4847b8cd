"""Write the configuration of a box from the templates in etc/."""

import contextlib
import os
import pwd
import socket
from pathlib import Path

from .machine import free_ports

ETC = Path(__file__).parent / "etc"
# slurm.conf is the last: once it is there, all are.
FILES = ("cgroup.conf", "gres.conf", "mariadb.cnf", "mariadb.sql", "slurmdbd.conf", "slurm.conf")


def configure(folder: Path, accounting: bool) -> None:
    """Write all that the daemons read, and the folders that they write to."""
    for name in ("state", "spool", "dev"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(2):
        (folder / f"dev/nvidia{i}").symlink_to("/dev/null")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    address = ""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
    private = address.startswith(
        "127."
    )  # only then can Slurm listen on this one address: by the host's own name
    values = {
        "folder": folder,
        "host": socket.gethostname().partition(".")[0],
        "address": address if private else "127.0.0.1",
        "listen": "NoInAddrAny,NoCtldInAddrAny" if private else "",
        "ports": free_ports(),
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "password": os.urandom(16).hex(),
        # As on most clusters, jobs are tracked by freezer cgroups (version 1), if these can be made.
        "proctrack": "cgroup" if os.access("/sys/fs/cgroup/freezer", os.W_OK) else "linuxproc",
    }
    write_prolog(folder)
    for name in FILES:
        lines = (ETC / name).read_text().format(**values).splitlines(keepends=True)
        (folder / name).touch(mode=0o600)  # slurmdbd requires it
        (folder / name).write_text("".join(x for x in lines if accounting or not x.startswith("Accounting")))


def write_prolog(folder: Path, script: str = "exit 0") -> None:
    """What runs on a node before each job's start. If it fails, Slurm drains the node and holds the job."""
    prolog = folder / "prolog"
    new = prolog.with_suffix(".new")
    new.write_text(f"#!/bin/sh\n{script}\n")
    new.chmod(0o755)
    new.rename(prolog)
