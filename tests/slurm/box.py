"""A Slurm cluster in a box: the real daemons on this machine, for tests and for trying the pipeline by hand.

    python tests/slurm/box.py start DIR      # prints the line that points Slurm's commands at the box
    python tests/slurm/box.py status DIR
    python tests/slurm/box.py stop DIR

Four nodes gpu1 to gpu4, each with 4 CPUs, 8 GB and two GPUs that are no GPUs. Everything listens on 127.0.0.1 and lives in DIR: nothing else
of the machine is touched, several boxes run side by side, no systemd. Needs root and Slurm's Debian packages, which `install` fetches; without
them it says what is missing. As another user the daemons run as that user, and processes are tracked without cgroups.
"""

import argparse
import contextlib
import fcntl
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("gpu1", "gpu2", "gpu3", "gpu4")
PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")
SQUEUE_FIELDS = ("JobID", "Name", "State", "Reason", "NodeList", "Partition", "Account", "RestartCnt", "StartTime", "Comment")
SACCT_FIELDS = ("JobID", "JobName", "State", "ExitCode", "NodeList", "Partition", "Account", "Start", "End", "Comment")
# Daemons of a distribution live where the PATH of ordinary people does not look.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# Jobs of two boxes meet in one cgroup per node name and job id, so the ids of a box start at its own number.
# A requeued job waits for cred_expire seconds (120 by default) before it may start again.
SLURM_CONF = """\
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool/%n
FirstJobId={first_job}
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=300
SlurmdTimeout=10
ReturnToService=2
PropagateResourceLimits=NONE
GresTypes=gpu
SlurmdParameters=config_overrides
{accounting}
NodeName=DEFAULT CPUs=4 RealMemory=8192 Gres=gpu:fake:2
{nodes}
PartitionName=DEFAULT Nodes=ALL DefaultTime=60 DefMemPerCPU=1024 PriorityTier=1
PartitionName=gpu Default=YES
PartitionName=short DefaultTime=1 MaxTime=1
PartitionName=preempt PreemptMode=REQUEUE
PartitionName=preemptc PreemptMode=CANCEL
PartitionName=high PriorityTier=100 PreemptMode=OFF
"""
ACCOUNTING_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
AccountingStoreFlags=job_comment
AccountingStorageTRES=gres/gpu"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=box
StoragePass={password}
StorageLoc=box
"""
# Nothing in the box has to survive a power cut.
MARIADB_OPTIONS = (
    f"--user={pwd.getpwuid(os.geteuid()).pw_name}",
    "--bind-address=127.0.0.1",
    "--innodb-buffer-pool-size=64M",
    "--innodb-lock-wait-timeout=900",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=2",
    "--performance-schema=OFF",
)


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def install() -> str | None:
    """Install Slurm with apt-get if its programs are missing. Returns None if they are there, else the reason in one line."""
    if os.environ.get("CBTM_NO_SLURM"):
        return "CBTM_NO_SLURM is set"
    if not missing():
        return None
    reason = f"{missing()[0]} is not installed"
    if shutil.which("apt-get") is None:
        return f"{reason} and there is no apt-get"
    if os.geteuid() != 0:
        return f"{reason} and apt-get needs root"
    policy = Path("/usr/sbin/policy-rc.d")
    with (Path(tempfile.gettempdir()) / "slurm-box-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = policy.read_bytes() if policy.exists() else None
        policy.write_text("#!/bin/sh\nexit 101\n")  # the packages must not start daemons of their own
        policy.chmod(0o755)
        try:
            for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
                run = subprocess.run(
                    ["apt-get", "-q", *command], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True
                )
                if run.returncode:
                    return f"{reason} and apt-get {command[0]} failed: {(run.stderr or run.stdout).strip().splitlines()[-1]}"
        finally:
            if before is None:
                policy.unlink()
            else:
                policy.write_bytes(before)
    return f"{missing()[0]} is not installed by apt-get" if missing() else None


def wait(condition: Callable[[], object], timeout: float = 60, what: str = "the condition") -> None:
    """Poll `condition` until it is true; TimeoutError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not so after {timeout:g} s")
        time.sleep(0.05)


def free_port(n_ports: int) -> int:
    """The first of `n_ports` free neighbouring ports, below those that the system hands out by itself."""
    while True:
        base = random.SystemRandom().randrange(10000, 32000, 10)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + n_ports):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return base


def environment(pid: int) -> dict[str, str]:
    """A process's environment as it was started; empty if there is no such process (or it is over and not yet reaped)."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in content.split("\0") if "=" in item)


def cgroup_works() -> bool:
    """True if jobs can be tracked as on most clusters: by a freezer cgroup (version 1) that may be made here."""
    probe = Path(f"/sys/fs/cgroup/freezer/slurm-box-{os.getpid()}")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


class Box:
    """A cluster whose whole state lies in `folder`. With `accounting`, sacct answers (MariaDB and slurmdbd run)."""

    def __init__(self, folder: Path | str, accounting: bool = True) -> None:
        self.folder = Path(folder).absolute()
        self.accounting = accounting
        self.conf = self.folder / "slurm.conf"
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN", "SACCT", "SQUEUE"))}
        self.env = {**clean, "PATH": PATH, "SLURM_CONF": str(self.conf)}

    # ---- the whole box ----

    def start(self) -> None:
        """Start what does not run. Slurm's configuration is written by the first start and kept."""
        if len(str(self.folder)) > 70:
            raise ValueError(
                f"{self.folder}: {len(str(self.folder))} characters. Expected 70 at most, for the sockets. Choose a shorter path."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.conf.exists():
            self._configure()
        self._start("munged", "--force", "--num-threads=2", *(f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "seed", "log")),
                    f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid")  # fmt: skip
        if self.accounting:
            self._start_accounting()
        for node in NODES:
            self.start_slurmd(node)
        self.start_slurmctld()
        wait(lambda: self.idle_nodes() == len(NODES) or self.squeue(), 30, f"four idle nodes (see {self.folder}/*.log)")

    def stop(self) -> None:
        """Kill every process of the box, its jobs' as well. Files stay, and a later start goes on with them."""
        names = ["slurmctld", *NODES, "slurmdbd", "mariadbd", "munged"]
        pids = [pid for name in names if (pid := self.pid(name))]
        self._kill(pids)
        self._kill([pid for node in NODES for pid in self.job_pids(node)])

    def running(self) -> list[str]:
        return [name for name in ("munged", "mariadbd", "slurmdbd", "slurmctld", *NODES) if self.pid(name)]

    def _configure(self) -> None:
        host, user, base = socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name, free_port(3 + len(NODES))
        password = os.urandom(16).hex()
        values = {"folder": self.folder, "host": host, "user": user, "port": base, "dbd_port": base + 1, "sql_port": base + 2}
        for name in ("state", "spool", "dev"):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        for i in range(2):  # Slurm takes only a device for a GPU
            (self.folder / f"dev/nvidia{i}").symlink_to("/dev/null")
        gres = f"Name=gpu Type=fake File={self.folder}/dev/nvidia[0-1]\n"
        (self.folder / "gres.conf").write_text("".join(f"NodeName={node} {gres}" for node in NODES))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.folder / "init.sql").write_text(
            f"CREATE DATABASE IF NOT EXISTS box; CREATE USER IF NOT EXISTS box@127.0.0.1 IDENTIFIED BY '{password}';"
            " GRANT ALL ON box.* TO box@127.0.0.1;\n".replace("; ", ";\n")
        )
        dbd = self.folder / "slurmdbd.conf"
        dbd.touch(mode=0o600)
        dbd.write_text(SLURMDBD_CONF.format(**values, password=password))
        self.conf.write_text(
            SLURM_CONF.format(
                **values,
                first_job=base * 100,
                proctrack="cgroup" if cgroup_works() else "linuxproc",
                accounting=ACCOUNTING_CONF.format(**values) if self.accounting else "AccountingStorageType=accounting_storage/none",
                nodes="\n".join(
                    f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={base + 3 + i}" for i, node in enumerate(NODES)
                ),
            )
        )

    def _start_accounting(self) -> None:
        data = self.folder / "mariadb"
        if not data.exists():
            self.run(
                "mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db", "--auth-root-authentication-method=normal"
            )
        port = re.search("StoragePort=(.*)", (self.folder / "slurmdbd.conf").read_text())[1]  # type: ignore[index]
        self._start("setsid", "--fork", "mariadbd", "--no-defaults", f"--datadir={data}", f"--port={port}", f"--socket={self.folder}/sql.socket",
                    f"--pid-file={self.folder}/mariadbd.pid", f"--init-file={self.folder}/init.sql", *MARIADB_OPTIONS, name="mariadbd")  # fmt: skip
        self._start("slurmdbd")
        wait(lambda: self._answers("sacctmgr", "--immediate", "show", "cluster"), 30, f"slurmdbd (see {self.folder}/slurmdbd.log)")
        if not self.run("sacctmgr", "--noheader", "show", "cluster"):
            self.run("sacctmgr", "--immediate", "add", "cluster", "box")

    # ---- its parts ----

    def start_slurmctld(self) -> None:
        self._start("slurmctld", "-f", str(self.conf))
        wait(lambda: self._answers("scontrol", "ping"), 30, f"slurmctld (see {self.folder}/slurmctld.log)")

    def stop_slurmctld(self) -> None:
        """End the controller as `systemctl stop` does: it saves its state first, which takes seconds."""
        if pid := self.pid("slurmctld"):
            os.kill(pid, signal.SIGTERM)
            wait(lambda: not environment(pid), 60, "the end of slurmctld")

    def kill_slurmctld(self) -> None:
        self._kill([pid for pid in [self.pid("slurmctld")] if pid])

    def start_slurmd(self, node: str) -> None:
        self._start("slurmd", "-f", str(self.conf), "-N", node, name=node)

    def kill_slurmd(self, node: str, with_jobs: bool = True) -> None:
        """Lose a node: SIGKILL to its daemon and, with `with_jobs`, to everything that its jobs run. NODE_FAIL follows within about 20 s."""
        self._kill([pid for pid in [self.pid(node)] if pid])
        if with_jobs:
            self._kill(self.job_pids(node))

    def pid(self, name: str) -> int | None:
        """The process of a daemon (or of a node), if it runs."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if environment(pid).get("SLURM_CONF") == str(self.conf) else None

    def job_pids(self, node: str) -> list[int]:
        """All processes of jobs on a node: Slurm's step daemons, which inherit the environment of slurmd, and what they started."""
        pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        here = {"SLURM_CONF": str(self.conf), "SLURMD_NODENAME": node}
        return [pid for pid in pids if pid != self.pid(node) and here.items() <= environment(pid).items()]

    # ---- what people and tests ask ----

    def run(self, *command: str) -> str:
        """A client's stdout, without the last newline; a command that fails raises CalledProcessError."""
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout.rstrip("\n")

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self.env, capture_output=True).returncode == 0

    def squeue(self, *args: str) -> list[dict[str, str]]:
        """Jobs that wait or run (with "--states=all" also those that ended in the last five minutes)."""
        out = self.run("squeue", "--noheader", "--array", "--Format=" + ",".join(f"{field}:|" for field in SQUEUE_FIELDS), *args)
        return [dict(zip(SQUEUE_FIELDS, line.split("|"), strict=False)) for line in out.splitlines()]

    def sacct(self, *args: str) -> list[dict[str, str]]:
        """Accounting rows; without arguments all jobs of today, one row each (--allocations)."""
        out = self.run("sacct", "--noheader", "--parsable2", "--allocations", f"--format={','.join(SACCT_FIELDS)}", *args)
        return [dict(zip(SACCT_FIELDS, line.split("|"), strict=True)) for line in out.splitlines()]

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... as the controller knows it."""
        return self.squeue("--states=all", f"--jobs={job_id}")[0]["State"]

    def idle_nodes(self) -> int:
        return self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T").split().count("idle")

    def pull_forward(self, job_id: str) -> None:
        """Let a requeued job start now rather than in two minutes."""
        self.run("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    # ---- processes ----

    def _start(self, *command: str, name: str | None = None) -> None:
        name = name or command[0]
        if self.pid(name) is None:
            (self.folder / f"{name}.pid").unlink(missing_ok=True)
            marks = {"SLURMD_NODENAME": name} if name in NODES else {}
            with (self.folder / f"{name}.out").open("wb") as out:
                run = subprocess.run(command, env={**self.env, **marks}, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder)
            if run.returncode:
                raise OSError(
                    f"{name}: exit {run.returncode}. {(self.folder / f'{name}.out').read_text().strip()} See {self.folder}/{name}.log."
                )
            wait(lambda: self.pid(name), 30, f"{name} (see {self.folder}/{name}.log)")

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait(lambda: not any(environment(pid) for pid in pids), 30, f"the end of processes {pids}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A Slurm cluster in a box.")
    parser.add_argument("action", choices=["start", "stop", "status"])
    parser.add_argument("folder", metavar="DIR", type=Path, help="where everything of the box lies")
    parser.add_argument("--no-accounting", action="store_true", help="no MariaDB, no slurmdbd: sacct does not answer")
    args = parser.parse_args()
    box = Box(args.folder, accounting=not args.no_accounting)
    if args.action == "start":
        if reason := install():
            sys.exit(f"Slurm: {reason}.")
        box.start()
        print(f"export SLURM_CONF={box.conf}")
    elif args.action == "stop":
        box.stop()
    else:
        print("running: " + (" ".join(box.running()) or "nothing"))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
