"""What the box needs of this machine: Slurm's packages, free ports, and its processes."""

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")
# The daemons are in folders that are not in the PATH of ordinary users.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def install() -> str | None:
    """Install Slurm with apt-get if it is missing.

    Returns None if Slurm is there, else the reason in one line.
    """
    if os.environ.get("CBTM_NO_SLURM"):
        return "CBTM_NO_SLURM is set"
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if not missing:
        return None
    reason = f"{missing[0]} is not installed and apt-get"
    if shutil.which("apt-get") is None:
        return f"{reason} is not there"
    if os.geteuid() != 0:
        return f"{reason} needs root"
    policy = Path("/usr/sbin/policy-rc.d")
    with (Path(tempfile.gettempdir()) / "slurm-box-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = policy.read_bytes() if policy.exists() else None
        policy.write_text("#!/bin/sh\nexit 101\n")  # keeps the packages from starting their own daemons
        policy.chmod(0o755)
        try:
            for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
                apt = [
                    "apt-get",
                    "-q",
                    "-o",
                    "Acquire::Retries=1",
                    "-o",
                    "Acquire::http::Timeout=10",
                    *command,
                ]
                run = subprocess.run(
                    apt,
                    env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                    capture_output=True,
                    text=True,
                )
                if run.returncode:
                    return (
                        f"{reason} {command[0]} failed: {(run.stderr or run.stdout).strip().splitlines()[-1]}"
                    )
        finally:
            if before is None:
                policy.unlink()
            else:
                policy.write_bytes(before)
    return None


def wait(
    condition: Callable[[], object],
    timeout: float = 60,
    what: str = "condition",
    story: Callable[[], str] | None = None,
) -> None:
    """Poll `condition` until it is true; TimeoutError after `timeout` seconds, with what `story` tells."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            told = f"\n{story()}" if story else ""
            raise TimeoutError(f"{what}: not so after {timeout:g} s{told}")
        time.sleep(0.05)


def tail(path: Path, n: int = 15) -> str:
    """The last lines of a file, under its name; empty if there is no such file."""
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace").splitlines()
        return "\n".join([f"--- {path}", *lines[-n:], ""])
    return ""


def free_ports() -> int:
    """The first of ten free ports, divided by ten. They are below those that the system assigns."""
    while True:
        tenth = random.SystemRandom().randrange(1000, 3200)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for i in range(10):
                stack.enter_context(socket.socket()).bind(("", 10 * tenth + i))
            return tenth


def environment(pid: int) -> dict[str, str]:
    """The environment with which a process was started; empty if there is no such process or it has ended."""
    with contextlib.suppress(OSError):
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(item.split("=", 1) for item in content.split("\0") if "=" in item)
    return {}


def alive(pid: int) -> bool:
    """Whether a process runs. One whose threads have all ended does not count: it keeps no port."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return status[0] not in "ZX" or int(status[17]) > 1  # state, number of threads
    return False


def kill(pids: Iterable[int]) -> None:
    """Send SIGKILL to the processes, and wait for their end."""
    pids = list(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait(lambda: not any(map(alive, pids)), 30, f"end of processes {pids}")
