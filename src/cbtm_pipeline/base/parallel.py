"""Parallel work on a stream of items, with the results in order. Memory holds only a few items at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_order(pool: Executor, function: Callable[[A], B], items: Iterable[A], n_ahead: int) -> Iterator[B]:
    """Yield `function(item)` of every item, in order.

    Before a result is yielded, at most `n_ahead` items after its own have been taken. Raises what `function`
    raises.
    """
    running: deque[Future[B]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        del item
        if len(running) > n_ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
