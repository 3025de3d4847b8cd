import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cbtm_pipeline import lock

HOLD = "import sys, time; from cbtm_pipeline import lock; lock.hold(sys.argv[1]); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(ValueError, match=rf'another run is writing here \(.*"pid": {holder.pid}'):
        lock.hold(tmp_path)


def test_a_killed_holder_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock.hold(tmp_path)


def test_waiting_ends_when_the_holder_does(tmp_path: Path, holder: subprocess.Popen) -> None:
    code = "import sys; from cbtm_pipeline import lock; lock.hold(sys.argv[1], wait=True)"
    waiting = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    time.sleep(2)
    assert waiting.poll() is None
    holder.kill()
    assert waiting.wait(timeout=30) == 0
