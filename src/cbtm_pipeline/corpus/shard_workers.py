"""The worker processes of rule `shard`."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from cbtm_pipeline.base import parallel

SHARED_MEMORY = "/dev/shm"
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]  # like map


@contextmanager
def workers(n_workers: int) -> Iterator[InOrder]:
    """A map over worker processes, which hold a few items at a time.

    With one worker, the map of this process. Raises ValueError if a worker is killed.
    """
    if n_workers == 1:
        yield map
        return
    # A forked process would not survive the threads that libraries have started.
    context = multiprocessing.get_context("spawn")
    try:
        context.Lock()
    except OSError as error:  # raised later, it would blame the file that is being written
        raise ValueError(
            f"{SHARED_MEMORY}: {error.strerror}. Expected shared memory for worker processes. Let all write "
            "there, make room, or have one worker: snakemake --set-threads shard=1, or --workers 1."
        ) from error
    with ProcessPoolExecutor(n_workers, context, _start_worker) as pool:
        try:
            yield lambda function, items: parallel.in_order(pool, function, items, n_workers)
        except BrokenProcessPool as error:
            raise ValueError(
                "shard: a worker was killed. Expected it to return its shard. "
                "If memory ran out, lower corpus.shard_bytes or --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the work is parallel over the workers already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the parent ends.

    Else a killed run would leave workers that write among the next shards.
    """
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
