"""A Slurm cluster in a box: the real daemons on this machine, for tests and for trying the pipeline by hand.

    python tests/slurm/box.py start DIR      # prints the line that points Slurm's commands at the box
    python tests/slurm/box.py status DIR
    python tests/slurm/box.py stop DIR

The box has four nodes, gpu1 to gpu4. Each has 4 CPUs, 8 GB and two fake GPUs. etc/slurm.conf defines the
partitions. All files are in DIR, and the daemons talk over the loopback interface. The box needs no systemd
and changes nothing of the machine, and boxes run side by side. It needs Slurm's Debian packages, which
`install` installs if it may. Only that needs root: the daemons run as the user who starts them.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, too, it is a part of its package
    sys.path.insert(0, str(Path(__file__).parents[1]))
    __package__ = "slurm"
    import slurm  # noqa: F401

from .configure import configure, write_prolog
from .machine import PATH, alive, environment, install, kill, tail, wait

NODES = ("gpu1", "gpu2", "gpu3", "gpu4")
DAEMONS = ("slurmctld", *NODES, "slurmdbd", "mariadbd", "munged")
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


class Box:
    """A cluster, whose whole state is in `folder`.

    With `accounting`, sacct answers (MariaDB, slurmdbd); the first start decides this.
    """

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
        """Start all daemons that do not run, and wait until the box is ready for jobs."""
        self._start_daemons()
        wait(lambda: self.idle_nodes() == len(NODES) or self.squeue(), 60, "four idle nodes", self.story)

    def _start_daemons(self) -> None:
        if len(str(self.folder)) > 70:
            raise ValueError(
                f"{self.folder}: {len(str(self.folder))} characters. Expected 70 at most (sockets). Take a "
                "shorter path."
            )
        if not self.conf.exists():
            configure(self.folder, self.accounting)
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

    def stop(self) -> None:
        """End every process of the box and of its jobs.

        Files stay. After a later start, jobs that were running count as lost with their nodes.
        """
        with contextlib.suppress(TimeoutError):  # it saves its state, mostly in a second
            self.stop_slurmctld(timeout=3)
        kill(pid for name in DAEMONS if (pid := self.pid(name)))
        for node in NODES:
            self.kill_slurmd(node)

    def clear(self) -> None:
        """Return to an idle cluster: start the daemons that were killed, cancel all jobs, resume the nodes.

        Slurm drains a node that fails to start or to end a job, until an administrator resumes it.
        """
        for name in DAEMONS:
            self.signal(name, signal.SIGCONT)
        write_prolog(self.folder)
        self._start_daemons()
        if self.squeue():
            self.run("scancel", "--me", "--signal=KILL", "--full")
            self.run("scancel", "--me")
        wait(self._is_clear, 60, "an idle cluster", self.story)

    def _is_clear(self) -> bool:
        """Whether all nodes are idle and no job is there. Resumes nodes that are drained or down."""
        for node, state in self.nodes().items():
            if state.startswith(("drain", "down")):  # refused if it has changed since
                self._answers("scontrol", "update", f"nodename={node}", "state=resume")
        return self.idle_nodes() == len(NODES) and not self.squeue()

    def story(self) -> str:
        """The nodes and the jobs as Slurm sees them, with its reasons, and the last lines of its log."""
        asked = [
            ("sinfo", "--Node", "--partition=gpu", "--format=%N %T %E"),
            ("squeue", "--format=%i %j %T %R"),
        ]
        answers = [subprocess.run(command, env=self.env, capture_output=True, text=True) for command in asked]
        told = [answer.stdout + answer.stderr for answer in answers]
        return "".join([*told, *(tail(self.folder / f"{name}.log") for name in ("slurmctld", *NODES))])

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
        """Kill the controller. It may forget what it learned in the last five seconds."""
        self.signal("slurmctld", signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        self._start("slurmd", "-f", str(self.conf), "-N", node, name=node)

    def kill_slurmd(self, node: str, with_jobs: bool = True) -> None:
        """Kill a node's daemon and, if `with_jobs`, all processes of its jobs.

        About 20 s later, its jobs end in NODE_FAIL.
        """
        self.signal(node, signal.SIGKILL)
        while with_jobs and (pids := self.job_pids(node)):
            kill(pids)

    def lose_node(self, node: str) -> None:
        """`kill_slurmd`, and tell the controller at once."""
        self.kill_slurmd(node)
        self.run("scontrol", "update", f"node={node}", "state=down", "reason=lost")

    def signal(self, name: str, number: int, timeout: float = 60) -> None:
        """Signal a daemon (one of DAEMONS) if it runs, and wait for its end if the signal ends it.

        SIGSTOP suspends it until SIGCONT.
        """
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
        """All processes of jobs on a node: Slurm's step daemons, children of slurmd, and their children."""
        here = {"SLURM_CONF": str(self.conf), "SLURMD_NODENAME": node}.items()
        pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        return [pid for pid in pids if here <= environment(pid).items() and pid != self.pid(node)]

    def run(self, *command: str) -> str:
        """A command's stdout without the last newline.

        Raises CalledProcessError (with its stderr) if it fails.
        """
        return subprocess.run(
            command, env=self.env, check=True, capture_output=True, text=True
        ).stdout.rstrip("\n")

    def squeue(self, *args: str) -> list[dict[str, str]]:
        """Jobs that wait or run, as {field: value}; with "--states=all", also jobs that ended lately."""
        out = self.run(
            "squeue",
            "--noheader",
            "--array",
            "--Format=" + ",".join(f"{field}:|" for field in SQUEUE_FIELDS),
            *args,
        )
        return [dict(zip(SQUEUE_FIELDS, line.split("|"), strict=False)) for line in out.splitlines()]

    def sacct(self, *args: str) -> list[dict[str, str]]:
        """Accounting rows as {field: value}, one per job; without arguments, of all jobs since midnight."""
        out = self.run(
            "sacct", "--noheader", "--parsable2", "--allocations", f"--format={','.join(SACCT_FIELDS)}", *args
        )
        return [dict(zip(SACCT_FIELDS, line.split("|"), strict=True)) for line in out.splitlines()]

    def state(self, job_id: str) -> str:
        """The controller's state of a job: PENDING, RUNNING, COMPLETED, ..."""
        return self.squeue("--states=all", f"--jobs={job_id}")[0]["State"]

    def nodes(self) -> dict[str, str]:
        """Slurm's state of each node: idle, mixed, drained, down* (* if it does not answer), ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def idle_nodes(self) -> int:
        return list(self.nodes().values()).count("idle")

    def pull_forward(self, job_id: str) -> None:
        """Let a requeued job start now, without its delay."""
        self.run("scontrol", "update", f"jobid={job_id}", "StartTime=now")

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
