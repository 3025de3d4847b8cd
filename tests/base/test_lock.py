import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbtm_pipeline.base import lock
from cbtm_pipeline.base.lock import Action, Flock, Writer

QUICK = {"BEAT_S": 0.05, "PATIENCE_S": 0.8, "STALE_S": 0.8, "POLL_S": 0.05}
NEVER = 1e9
# Live holders beat sixty times before they count as dead; to see that they do not takes more polls than that.
PATIENT = {"PATIENCE_S": 3.0, "STALE_S": 3.0}
MANY_POLLS = 70


class Process:
    """See lock_driver.py."""

    def __init__(self, folder: Path, host: str, **options: Any):
        command = [sys.executable, str(Path(__file__).parents[1] / "helpers/lock_driver.py"), str(folder)]
        options = {**QUICK, "host": host, **options}
        self.process = subprocess.Popen(
            [*command, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line.strip())

    def says(self, line: str = "") -> str:
        """Send it `line`, if any, and return its next line that is no poll."""
        assert self.process.stdin
        if line:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return next(line for line in iter(lambda: self.lines.get(timeout=60), None) if line != "poll")

    def is_waiting(self, n_polls: int = 30) -> bool:
        """Whether it looks at the lock so many more times, and does not get it."""
        return all(self.lines.get(timeout=60) == "poll" for _ in range(n_polls))

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait() == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Suspend it, and return when it is suspended."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def close(self) -> None:
        """Kill it and release what belongs to it."""
        self.kill()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def start(host: str, **options: Any) -> Process:
        started.append(Process(tmp_path, host, **options))
        return started[-1]

    yield start
    for process in started:
        process.close()


def record(folder: Path) -> dict[str, Any]:
    text = (folder / ".lock").read_text()
    return json.loads(text) if text else {}


# --- the table ----------------------------------------------------------------------------------------------

TABLE = {  # the action for a record that has stood still for a moment, and from when on it is taken over
    (Flock.FREE, Writer.NOBODY): (Action.TAKE, None),
    (Flock.FREE, Writer.THIS_HOST): (Action.TAKE, None),
    (Flock.FREE, Writer.OTHER_HOST): (None, lock.PATIENCE_S),
    (Flock.HELD, Writer.NOBODY): (Action.WAIT, None),
    (Flock.HELD, Writer.THIS_HOST): (Action.WAIT, None),
    (Flock.HELD, Writer.OTHER_HOST): (None, lock.STALE_S),
    (Flock.UNSUPPORTED, Writer.NOBODY): (Action.TAKE, None),
    (Flock.UNSUPPORTED, Writer.THIS_HOST): (None, lock.PATIENCE_S),
    (Flock.UNSUPPORTED, Writer.OTHER_HOST): (None, lock.PATIENCE_S),
}


@pytest.mark.parametrize(("flock", "writer"), list(itertools.product(Flock, Writer)))
def test_the_table(flock: Flock, writer: Writer) -> None:
    action, limit = TABLE[flock, writer]
    for changed in (False, True):
        if action:
            assert {lock.decide(flock, writer, still_s, changed) for still_s in (0.0, NEVER)} == {action}
        if limit:
            before, after = (lock.decide(flock, writer, limit + s, changed) for s in (-0.1, 0.1))
            assert (before, after) == (Action.WAIT if changed else Action.WATCH, Action.TAKE_OVER)


def test_a_record_has_changed_when_it_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    watch = lock._Watch(path)
    seen = []
    for text in (
        "",
        '{"host": "x", "beat": 0}',
        '{"host": "x", "beat": 0}',
        '{"host": "x", "beat": 1}',
        "7",
        "",
    ):
        path.write_text(text)
        watch.look()
        seen.append((watch.changed, watch.writer))
    other = Writer.OTHER_HOST
    assert seen[:4] == [(False, Writer.NOBODY), (False, other), (False, other), (True, other)]
    assert seen[4:] == [(True, other), (True, Writer.NOBODY)]


# --- on one host, flock is all ------------------------------------------------------------------------------


def test_a_second_process_gets_the_name_of_the_holder(tmp_path, start):
    first = start("here", STALE_S=0.0)
    assert first.says() == "held"
    first.stop()  # while it holds the lock it is alive, whatever its record says
    error = start("here", STALE_S=0.0).says()
    assert "another run is writing here" in error
    assert f"process {first.process.pid} on " in error


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


# --- between hosts, the record is ---------------------------------------------------------------------------


def test_the_record(tmp_path, start):
    first = start("node1")
    assert first.says() == "held"
    beats: set[int] = set()
    while len(beats) < 3:  # it beats on; if it did not, the test would reach its time limit
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
def test_a_strange_record_is_one_of_a_dead_host(tmp_path, start, text):
    (tmp_path / ".lock").write_text(text)
    assert start("node2").says() == "held after waiting"


@pytest.mark.parametrize("locks", ["shared", "local", "none"])
def test_a_live_host_is_not_succeeded(tmp_path, start, locks):
    first = start("node1", locks=locks)
    assert first.says() == "held"
    error = start("node2", locks=locks, **PATIENT).says()
    assert "another run is writing here" in error
    assert " on node1" in error
    second = start("node3", locks=locks, wait=True, **PATIENT)
    assert second.is_waiting(MANY_POLLS)
    assert first.says("check") == "mine"
    first.end()
    assert second.says() == "held after waiting"


@pytest.mark.parametrize("locks", ["shared", "local", "none"])
def test_a_holder_that_comes_back_to_life_finds_a_successor(tmp_path, start, locks):
    first = start("node1", locks=locks)
    assert first.says() == "held"
    first.stop()
    other = "PATIENCE_S" if locks == "shared" else "STALE_S"  # a suspended process keeps its lock
    second = start("node2", locks=locks, **{other: NEVER})
    assert second.says() == "held after waiting"
    first.process.send_signal(signal.SIGCONT)
    error = first.says("check")
    assert "taken over by another process" in error
    assert " on node2" in error
    first.end()
    assert second.says("check") == "mine"
    assert record(tmp_path)["host"] == "node2"
    third = start("node3", locks=locks, **PATIENT)
    assert third.says().startswith(f"{tmp_path}: another run is writing here")


def test_without_locks_the_record_counts_on_one_host_too(start):
    first = start("here", locks="none")
    assert first.says() == "held"
    assert "another run is writing here" in start("here", locks="none", **PATIENT).says()
    first.kill()
    assert start("here", locks="none").says() == "held after waiting"


def test_of_two_that_start_in_the_same_moment_one_goes_on(tmp_path, start):
    first = start("node1", locks="local", BEAT_S=NEVER)
    assert first.says() == "held"
    (tmp_path / ".lock").write_text("")  # the second one finds the file as it was before the first one wrote
    second = start("node2", locks="local")
    assert second.says() == "held"
    assert " on node2" in first.says("check")
    first.end()
    assert second.says("check") == "mine"


def test_slurm_is_named(tmp_path, start, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    first = start("node1")
    assert first.says() == "held"
    assert {"slurm_job": "123", "restart": "2"}.items() <= record(tmp_path).items()
    assert first.says("check") == "mine"
