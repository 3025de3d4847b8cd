"""Ctrl-C for a run: it reaches the jobs also if only Snakemake gets it.

A terminal sends Ctrl-C to Snakemake and to its jobs. `kill -INT` and other programs send it to Snakemake
alone, which then waits for its jobs to end by themselves, perhaps for days.
"""

import contextlib
import signal
import threading
import time

GRACE_S = 1.0  # by then, a job that the terminal has told is ending, and one signal more does no harm


def pass_on() -> None:
    """From now on, pass SIGINT on to the processes that this one has started. Call it in the main thread.

    Where SIGINT is ignored, as in the background of a script, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    told = [float("-inf")]

    def handle(number: int, frame: object) -> None:
        now = time.monotonic()
        if now - told[0] < GRACE_S:  # the same Ctrl-C, by another way
            return
        told[0] = now
        timer = threading.Timer(GRACE_S, tell_children)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)


def tell_children() -> None:
    """Send SIGINT to the processes that this one has started."""
    import psutil  # Snakemake needs it, and the jobs do not

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            child.send_signal(signal.SIGINT)
