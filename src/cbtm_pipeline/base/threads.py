"""Computing in one thread of torch, where the number of threads would decide the last bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[int]:
    """Let torch use one thread for what this thread calls inside. Yields the number of threads before."""
    n_threads = use_one_thread()
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)


def use_one_thread() -> int:
    """Let torch use one thread for what this thread calls. Returns the number of threads before.

    torch keeps this number for each thread. It sets it when a thread first asks for it or computes, so it is
    asked for first: a number that was set before would be lost.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return n_threads
