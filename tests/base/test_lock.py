import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbtm_pipeline.base import lock

QUICK = {"BEAT_S": 0.05, "PATIENCE_S": 0.8, "STALE_S": 0.8, "POLL_S": 0.05}
NEVER = 1e9


class Process:
    """See lock_driver.py."""

    def __init__(self, folder: Path, host: str, **options: Any):
        command = [sys.executable, str(Path(__file__).parents[1] / "helpers/lock_driver.py"), str(folder)]
        options = {**QUICK, "host": host, **options}
        self.folder = folder
        self.process = subprocess.Popen(
            [*command, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self, line: str = "") -> str:
        """Its next line, after it was told this one."""
        assert self.process.stdin
        assert self.process.stdout
        if line:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait() == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Suspend it, for sure and not in the middle of a write."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def is_waiting(self) -> bool:
        """Whether it has nothing to say for longer than QUICK would have it wait, while its folder's holder beats on."""
        time.sleep(1.8)
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)
        nothing = not self.process.stdout.readline()
        os.set_blocking(self.process.stdout.fileno(), True)
        return nothing and self.process.poll() is None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def start(host: str, **options: Any) -> Process:
        started.append(Process(tmp_path, host, **options))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()
        for stream in (process.process.stdin, process.process.stdout):
            assert stream
            stream.close()


def record(folder: Path) -> dict[str, Any]:
    text = (folder / ".lock").read_text()
    return json.loads(text) if text else {}


# --- on one host, flock is all ----------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_holds_the_folder(tmp_path, start):
    first = start("here", STALE_S=0.0)
    assert first.says() == "held"
    first.stop()  # as long as it holds the lock it is alive, whatever its record says
    error = start("here", STALE_S=0.0).says()
    assert "another run is writing here" in error
    assert f'"pid": {first.process.pid}' in error


def test_a_killed_holder_leaves_no_lock(tmp_path, start):
    first = start("here")
    assert first.says() == "held"
    first.kill()
    assert record(tmp_path)["pid"] == first.process.pid
    assert start("here", PATIENCE_S=NEVER).says() == "held"


def test_waiting_ends_when_the_holder_does(start):
    first = start("here")
    assert first.says() == "held"
    second = start("here", wait=True)
    assert second.is_waiting()
    first.kill()
    assert second.says() == "held after waiting"


def test_in_this_process(tmp_path, start, monkeypatch):
    monkeypatch.setattr(lock, "_held", [])
    lock.check()
    first = start("here")
    assert first.says() == "held"
    first.end()
    assert lock.hold(tmp_path) is False
    lock.check()
    for gone in (True, False):
        (tmp_path / ".lock").unlink() if gone else (tmp_path / ".lock").write_text(
            '{"host": "node2", "pid": 7}'
        )
        with pytest.raises(
            ValueError,
            match=r"taken over by another process \(" + ("its lock file is .* gone" if gone else ".*node2"),
        ):
            lock.check()


# --- between hosts, the record is -------------------------------------------------------------------------------------


def test_the_record(tmp_path, start):
    first = start("node1")
    assert first.says() == "held"
    beats, until = set(), time.monotonic() + 60
    while len(beats) < 3:
        assert time.monotonic() < until
        found = record(tmp_path)  # whole whenever it is read
        assert found == {**found, "host": "node1", "pid": first.process.pid}
        beats.add(found["beat"])
    first.says("fork")  # the end of a fork is not that of the holder
    assert first.says("check") == "mine"
    assert record(tmp_path)["pid"] == first.process.pid


def test_a_beating_thread_keeps_no_process_alive_and_its_end_leaves_nothing_to_wait_for(tmp_path, start):
    first = start("node1", BEAT_S=NEVER)
    assert first.says() == "held"
    first.end()
    assert record(tmp_path) == {}
    assert start("node2", PATIENCE_S=NEVER).says() == "held"


@pytest.mark.parametrize("locks", ["shared", "local", "none"])
def test_a_dead_host_is_succeeded(tmp_path, start, locks):
    first = start("node1", locks=locks)
    assert first.says() == "held"
    first.kill()
    assert start("node2", locks=locks, PATIENCE_S=NEVER, STALE_S=NEVER, wait=True).is_waiting()
    second = start("node3", locks=locks)
    assert second.says() == "held after waiting"
    assert (second.says("check"), record(tmp_path)["host"]) == ("mine", "node3")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("text", ['{"host": "node1", "pid": 7}', '{"host"', "[7]", "7"])
def test_so_is_whoever_left_a_strange_record(tmp_path, start, text):
    (tmp_path / ".lock").write_text(text)
    assert start("node2").says() == "held after waiting"


@pytest.mark.parametrize("locks", ["shared", "local", "none"])
def test_a_live_host_is_not(tmp_path, start, locks):
    first = start("node1", locks=locks)
    assert first.says() == "held"
    error = start("node2", locks=locks).says()
    assert "another run is writing here" in error
    assert '"host": "node1"' in error
    second = start("node3", locks=locks, wait=True)
    assert second.is_waiting()
    assert first.says("check") == "mine"
    first.end()
    assert second.says() == "held after waiting"


@pytest.mark.parametrize("locks", ["shared", "local", "none"])
def test_who_comes_back_to_life_finds_a_successor(tmp_path, start, locks):
    first = start("node1", locks=locks)
    assert first.says() == "held"
    first.stop()
    other = "PATIENCE_S" if locks == "shared" else "STALE_S"  # a suspended process keeps its lock
    second = start("node2", locks=locks, **{other: NEVER})
    assert second.says() == "held after waiting"
    first.process.send_signal(signal.SIGCONT)
    error = first.says("check")
    assert "taken over by another process" in error
    assert '"host": "node2"' in error
    first.end()
    assert second.says("check") == "mine"
    assert record(tmp_path)["host"] == "node2"
    assert start("node3", locks=locks).says().startswith(f"{tmp_path}: another run is writing here")


def test_without_locks_the_record_counts_on_one_host_too(start):
    first = start("here", locks="none")
    assert first.says() == "held"
    assert "another run is writing here" in start("here", locks="none").says()
    first.kill()
    assert start("here", locks="none").says() == "held after waiting"


def test_of_two_that_start_in_the_same_moment_one_goes_on(tmp_path, start):
    first = start("node1", locks="local", BEAT_S=NEVER)
    assert first.says() == "held"
    (tmp_path / ".lock").write_text("")  # what the other one has seen
    second = start("node2", locks="local")
    assert second.says() == "held"
    assert '"host": "node2"' in first.says("check")
    first.end()
    assert second.says("check") == "mine"


def test_slurm_is_named(tmp_path, start, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    first = start("node1")
    assert first.says() == "held"
    assert {"slurm_job": "123", "restart": "2"}.items() <= record(tmp_path).items()
    assert first.says("check") == "mine"
