"""A Slurm cluster in a box: the real daemons on this machine, for tests and for trying the pipeline by hand.

    python tests/slurm/box.py start DIR      # prints the line that points Slurm's commands at the box
    python tests/slurm/box.py status DIR
    python tests/slurm/box.py stop DIR

Four nodes, gpu1 to gpu4, each with 4 CPUs, 8 GB and two GPUs that are none; the partitions are in etc/slurm.conf. Everything lives in
DIR and talks over the loopback interface: no systemd, nothing of the machine is changed, boxes run side by side. It needs Slurm's Debian
packages, which `install` gets where it may. Root is needed for them, not for the box: daemons run as whoever starts them.
"""

import argparse
import contextlib
import fcntl
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ETC = Path(__file__).parent / "etc"
FILES = (
    "cgroup.conf",
    "gres.conf",
    "mariadb.cnf",
    "mariadb.sql",
    "slurmdbd.conf",
    "slurm.conf",
)  # the last says that all are there
NODES = ("gpu1", "gpu2", "gpu3", "gpu4")
DAEMONS = ("slurmctld", *NODES, "slurmdbd", "mariadbd", "munged")
PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")
SQUEUE_FIELDS = (
    "JobID",
    "Name",
    "State",
    "Reason",
    "NodeList",
    "Partition",
    "Account",
    "RestartCnt",
    "StartTime",
    "Comment",
)
SACCT_FIELDS = (
    "JobID",
    "JobName",
    "State",
    "ExitCode",
    "NodeList",
    "Partition",
    "Account",
    "Start",
    "End",
    "Comment",
)
# Daemons live where the PATH of ordinary people does not look.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def install() -> str | None:
    """Install Slurm with apt-get if it is not there. Returns None when it is there, else the reason in one line."""
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


def wait(condition: Callable[[], object], timeout: float = 60, what: str = "condition") -> None:
    """Poll `condition` until it is true; TimeoutError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not so after {timeout:g} s")
        time.sleep(0.05)


def free_ports() -> int:
    """A tenth of the first of ten free ports, below those that the system hands out by itself."""
    while True:
        tenth = random.SystemRandom().randrange(1000, 3200)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for i in range(10):
                stack.enter_context(socket.socket()).bind(("", 10 * tenth + i))
            return tenth


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty for none, and for one that is over."""
    with contextlib.suppress(OSError):
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(item.split("=", 1) for item in content.split("\0") if "=" in item)
    return {}


def alive(pid: int) -> bool:
    """False once all threads are over: a process that nobody has waited for yet keeps no port."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return status[0] not in "ZX" or int(status[17]) > 1  # state, number of threads
    return False


def kill(pids: Iterable[int]) -> None:
    """SIGKILL, and wait for the end."""
    pids = list(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait(lambda: not any(map(alive, pids)), 30, f"end of processes {pids}")


class Box:
    """A cluster whose whole state lies in `folder`. With `accounting`, settled by the first start, sacct answers (MariaDB, slurmdbd)."""

    def __init__(self, folder: Path | str, accounting: bool = True) -> None:
        self.folder = Path(folder).absolute()
        self.conf = self.folder / "slurm.conf"
        self.accounting = "AccountingStorage" in self.conf.read_text() if self.conf.exists() else accounting
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE", "SACCT"))
        }
        self.env = {**clean, "PATH": PATH, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start what does not run and wait until the box is ready for jobs."""
        if len(str(self.folder)) > 70:
            raise ValueError(
                f"{self.folder}: {len(str(self.folder))} characters. Expected 70 at most (sockets). Take a shorter path."
            )
        if not self.conf.exists():
            self._configure()
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "seed", "log")]
        self._start(
            "munged",
            "--force",
            *files,
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid",
        )
        if self.accounting:
            self._start_accounting()
        for node in NODES:
            self.start_slurmd(node)
        self.start_slurmctld()
        wait(
            lambda: self.idle_nodes() == len(NODES) or self.squeue(),
            60,
            f"four idle nodes (see {self.folder}/*.log)",
        )

    def stop(self) -> None:
        """End every process of the box, those of its jobs as well. Files stay; a later start finds jobs that ran lost with their nodes."""
        with contextlib.suppress(TimeoutError):  # it saves its state, mostly in a second
            self.stop_slurmctld(timeout=3)
        kill(pid for name in DAEMONS if (pid := self.pid(name)))
        for node in NODES:
            self.kill_slurmd(node)

    def clear(self) -> None:
        """Back to an idle cluster: start what was killed, cancel all jobs."""
        for name in DAEMONS:
            self.signal(name, signal.SIGCONT)
        self.start()
        if self.squeue():
            self.run("scancel", "--me", "--signal=KILL", "--full")
            self.run("scancel", "--me")
        wait(lambda: self.idle_nodes() == len(NODES) and not self.squeue(), 60, "an idle cluster")

    def start_slurmctld(self) -> None:
        self._start("slurmctld", "-f", str(self.conf))
        wait(
            lambda: self._answers("scontrol", "ping"),
            60,
            f"answer of slurmctld (see {self.folder}/slurmctld.log)",
        )

    def stop_slurmctld(self, timeout: float = 60) -> None:
        """End the controller as an administrator does: it saves its state, which can take seconds."""
        self.signal("slurmctld", signal.SIGTERM, timeout)

    def kill_slurmctld(self) -> None:
        """What the controller learned in the last five seconds can be lost."""
        self.signal("slurmctld", signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        self._start("slurmd", "-f", str(self.conf), "-N", node, name=node)

    def kill_slurmd(self, node: str, with_jobs: bool = True) -> None:
        """SIGKILL a node's daemon and, with `with_jobs`, all that its jobs run there. Some 20 s later its jobs end in NODE_FAIL."""
        self.signal(node, signal.SIGKILL)
        while with_jobs and (pids := self.job_pids(node)):
            kill(pids)

    def lose_node(self, node: str) -> None:
        """`kill_slurmd`, and the controller hears of it at once."""
        self.kill_slurmd(node)
        self.run("scontrol", "update", f"node={node}", "state=down", "reason=lost")

    def signal(self, name: str, number: int, timeout: float = 60) -> None:
        """Signal a daemon (one of DAEMONS), if it runs, and wait for its end if it has to end. SIGSTOP makes it hang until SIGCONT."""
        if pid := self.pid(name):
            os.kill(pid, number)
            wait(
                lambda: number in (signal.SIGSTOP, signal.SIGCONT) or not alive(pid),
                timeout,
                f"end of {name}",
            )

    def pid(self, name: str) -> int | None:
        """The process of a daemon (one of DAEMONS), if it runs."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if environment(pid).get("SLURM_CONF") == str(self.conf) else None

    def job_pids(self, node: str) -> list[int]:
        """All processes of jobs on a node: Slurm's step daemons, which inherit from slurmd, and what they started."""
        here = {"SLURM_CONF": str(self.conf), "SLURMD_NODENAME": node}.items()
        pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        return [pid for pid in pids if here <= environment(pid).items() and pid != self.pid(node)]

    def run(self, *command: str) -> str:
        """A command's stdout without the last newline; CalledProcessError (with its stderr) if it fails."""
        return subprocess.run(
            command, env=self.env, check=True, capture_output=True, text=True
        ).stdout.rstrip("\n")

    def squeue(self, *args: str) -> list[dict[str, str]]:
        """Jobs that wait or run as {field: value}; with "--states=all" also those that ended in the last five minutes."""
        out = self.run(
            "squeue",
            "--noheader",
            "--array",
            "--Format=" + ",".join(f"{field}:|" for field in SQUEUE_FIELDS),
            *args,
        )
        return [dict(zip(SQUEUE_FIELDS, line.split("|"), strict=False)) for line in out.splitlines()]

    def sacct(self, *args: str) -> list[dict[str, str]]:
        """Accounting rows as {field: value}, one for each job; without arguments for all jobs since midnight."""
        out = self.run(
            "sacct", "--noheader", "--parsable2", "--allocations", f"--format={','.join(SACCT_FIELDS)}", *args
        )
        return [dict(zip(SACCT_FIELDS, line.split("|"), strict=True)) for line in out.splitlines()]

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... as the controller has it."""
        return self.squeue("--states=all", f"--jobs={job_id}")[0]["State"]

    def idle_nodes(self) -> int:
        return (
            self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T").split().count("idle")
        )

    def pull_forward(self, job_id: str) -> None:
        """Let a requeued job start now, without its delay."""
        self.run("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    def _configure(self) -> None:
        for name in ("state", "spool", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            (self.folder / f"dev/nvidia{i}").symlink_to("/dev/null")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        address = ""
        with contextlib.suppress(OSError):
            address = socket.gethostbyname(socket.gethostname())
        private = address.startswith(
            "127."
        )  # Slurm can listen on one address only if the host's own name leads to it
        values = {
            "folder": self.folder,
            "host": socket.gethostname().partition(".")[0],
            "address": address if private else "127.0.0.1",
            "listen": "NoInAddrAny,NoCtldInAddrAny" if private else "",
            "ports": free_ports(),
            "user": pwd.getpwuid(os.geteuid()).pw_name,
            "password": os.urandom(16).hex(),
            # As on most clusters, jobs are tracked by freezer cgroups (version 1), if these can be made.
            "proctrack": "cgroup" if os.access("/sys/fs/cgroup/freezer", os.W_OK) else "linuxproc",
        }
        for name in FILES:
            lines = (ETC / name).read_text().format(**values).splitlines(keepends=True)
            (self.folder / name).touch(mode=0o600)  # slurmdbd insists
            (self.folder / name).write_text(
                "".join(x for x in lines if self.accounting or not x.startswith("Accounting"))
            )

    def _start_accounting(self) -> None:
        options = f"--defaults-file={self.folder}/mariadb.cnf"
        if not (self.folder / "mariadb").exists():
            self.run(
                "mariadb-install-db", options, "--skip-test-db", "--auth-root-authentication-method=normal"
            )
        self._start("setsid", "--fork", "mariadbd", options, name="mariadbd")
        self._start("slurmdbd")
        wait(
            lambda: self._answers("sacctmgr", "show", "cluster"),
            60,
            f"answer of slurmdbd (see {self.folder}/slurmdbd.log)",
        )
        if not self.run("sacctmgr", "--noheader", "show", "cluster"):
            self.run("sacctmgr", "--immediate", "add", "cluster", "box")

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self.env, capture_output=True).returncode == 0

    def _start(self, *command: str, name: str = "") -> None:
        name = name or command[0]
        if self.pid(name) is None:
            (self.folder / f"{name}.pid").unlink(missing_ok=True)
            env = {**self.env, "SLURMD_NODENAME": name} if name in NODES else self.env
            with (self.folder / f"{name}.out").open("wb") as out:
                run = subprocess.run(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder
                )
            if run.returncode:
                raise OSError(
                    f"{name}: exit code {run.returncode}. Expected a daemon. See {self.folder}/{name}.out."
                )
            wait(lambda: self.pid(name), 60, f"start of {name} (see {self.folder}/{name}.out)")


def main() -> None:
    parser = argparse.ArgumentParser(description="A Slurm cluster in a box.")
    parser.add_argument("action", choices=["start", "stop", "status"])
    parser.add_argument("folder", metavar="DIR", type=Path, help="where everything of the box lies")
    parser.add_argument(
        "--no-accounting", action="store_true", help="no MariaDB, no slurmdbd: sacct does not answer"
    )
    args = parser.parse_args()
    box = Box(args.folder, accounting=not args.no_accounting)
    if args.action == "start":
        if reason := install():
            raise ValueError(f"Slurm: {reason}.")
        box.start()
        print(f"export SLURM_CONF={box.conf}")
    elif args.action == "stop":
        box.stop()
    else:
        print("running: " + (" ".join(name for name in DAEMONS if box.pid(name)) or "nothing"))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(str(error))
