"""What a command writes to a terminal."""

import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def shown(*argv: object, env: Mapping[str, str], cwd: Path | None = None) -> str:
    """Run `cbtm ARGV`, which must succeed, with a terminal as stdout. Returns all that it wrote there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cbtm_pipeline", *map(str, argv)]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=env, cwd=cwd) as process:
        os.close(theirs)
        found = b""
        try:
            while part := os.read(ours, 1 << 16):
                found += part
        except OSError:  # how Linux says that the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0, found
    return found.decode().replace("\r\n", "\n")
