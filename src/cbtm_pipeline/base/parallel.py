"""Work on one item after the other, a few at a time, with the results in order: memory holds as many items as there are workers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_order(pool: Executor, function: Callable[[A], B], items: Iterable[A], n_ahead: int) -> Iterator[B]:
    """Yield `function(item)` of every item, in order; at most `n_ahead` further items are taken before a result is handed out.

    Raises what `function` raises.
    """
    running: deque[Future[B]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        del item
        if len(running) > n_ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
